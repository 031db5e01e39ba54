"""Data making: the taxonomy, prompts by templates and by a server that fails, the filter, images, the page."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openai", reason="pip install l2p_fast[data]")
pytest.importorskip("datasketch", reason="pip install l2p_fast[data]")
pytest.importorskip("webdataset", reason="pip install l2p_fast[data]")
pytest.importorskip("jsonschema", reason="pip install l2p_fast[data]")
pytest.importorskip("jinja2", reason="pip install l2p_fast[data]")

from openai_server import LOST, NO_ANSWER, NO_FORM, NO_KEY, NO_MODEL, PLAIN, TOO_MANY, Fault, Server, subjects, written

from l2p_fast import data
from l2p_fast.datamaking import image_sets, painters
from l2p_fast.datamaking.filters import Bounds, WordList, filter_lines
from l2p_fast.datamaking.plan import make_plan
from l2p_fast.datamaking.records import STARTER, Prompt, alone, read_prompt_file
from l2p_fast.datamaking.taxonomy import core, read_taxonomy
from l2p_fast.datamaking.templates import Grammar, read_grammar
from l2p_fast.datamaking.texts import language_of, quoted_texts
from l2p_fast.errors import UserError
from l2p_fast.sampling.drawing import Drawing, read_settings

TAXONOMY = read_taxonomy()
LETTERS = "the same quiet hill with a tree, a gate and a small house in the soft light of an early morning in May "


def text(start: str, length: int = 250) -> str:
    """An English prompt of ``length`` characters."""
    return (f"A photograph of {start}. " + LETTERS * 4)[: length - 1] + "."


def line(prompt: str, **values) -> str:
    return json.dumps({"prompt": prompt, **values}, ensure_ascii=False)


# --- the taxonomy ---
def test_the_taxonomy_that_ships():
    sizes = TAXONOMY.sizes()
    assert len(set(TAXONOMY.subclasses().values())) == 4 and len(sizes) == 17 and len(TAXONOMY.categories) >= 1000
    assert TAXONOMY.problems() == [] and max(sizes.values()) <= 1.15 * min(sizes.values())
    words = WordList()
    for category in TAXONOMY.categories:
        assert words.find(category.en) is None and words.find(category.zh) is None
        assert language_of(category.zh) == "zh" and category.en == category.en.strip() and core(category.en)
    assert {*TAXONOMY.subclasses(), *TAXONOMY.subclasses().values()} == TAXONOMY.chinese.keys()


def test_a_taxonomy_is_read_as_it_is_written(tmp_path):
    (tmp_path / "t.txt").write_text(TAXONOMY.text())
    assert read_taxonomy(tmp_path / "t.txt") == TAXONOMY
    (tmp_path / "bad.txt").write_text("= a\n== b\na fox | 狐\nthe foxes | 狐狸\na cat | 狐\n")
    assert len(read_taxonomy(tmp_path / "bad.txt").problems()) == 2
    for wrong in ("", "a fox | 狐", "= a\n== b\na fox", "= \n"):
        (tmp_path / "bad.txt").write_text(wrong)
        with pytest.raises(UserError):
            read_taxonomy(tmp_path / "bad.txt")


def test_the_taxonomy_grows(tmp_path, capsys):
    def answer(body, number):
        names = [
            ("a red fox", "一只赤狐"),
            ("a silver thing", f"一个第{'一二三四五六七八九十'[number % 10]}物{number}件"),
        ]
        names += [(f"a new thing {'abcdefghijlmnopqrtuv'[number % 20] * 4}", "一件" + chr(0x4E00 + number) + "物")]
        names += [("a bag of {0} %s", "一个袋子"), ("a corporate logo", "一个标识")]
        return json.dumps({"categories": [{"en": en, "zh": zh} for en, zh in names]})

    with Server(answer) as server:
        argv = ["taxonomy", "--grow", "2", "--out", tmp_path / "t.txt", "--endpoint", server.url, "--llm", "m"]
        data.main([*map(str, argv)])
    said = capsys.readouterr().out
    grown = read_taxonomy(tmp_path / "t.txt")
    assert grown.problems() == [] and len(grown.categories) == len(TAXONOMY.categories) + 18
    assert "a double" in said and "not a name" in said and "a logo or a watermark" in said


# --- plans and templates ---
def test_a_plan_covers_all_categories_evenly():
    plan = make_plan(TAXONOMY, 2500, 3, Counter(), ["en", "zh"], 0.2)
    counts = Counter(brief.category.en for brief in plan)
    assert len(counts) == len(TAXONOMY.categories) and max(counts.values()) - min(counts.values()) <= 1
    assert plan[:700] == make_plan(TAXONOMY, 700, 3, Counter(), ["en", "zh"], 0.2)
    assert 0.45 < sum(brief.language == "zh" for brief in plan) / 2500 < 0.55
    assert all(brief.quoted for brief in plan if brief.category.subclass == "lettering")
    there = Counter({category.en: 5 for category in TAXONOMY.categories[5:]})
    few = make_plan(TAXONOMY, 20, 3, there, ["en"], 0.2)
    assert {brief.category for brief in few} == set(TAXONOMY.categories[:5])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_templates_write_about_everything(language):
    plan = make_plan(TAXONOMY, len(TAXONOMY.categories), 5, Counter(), [language], 0.5)
    grammar, texts = Grammar(5), []
    for brief in plan:
        prompt, quoted = grammar.write(brief)
        assert 200 <= len(prompt) <= 350 and language_of(prompt) == language and "{" not in prompt
        assert brief.category.words(language) in prompt and quoted == quoted_texts(prompt)
        assert bool(quoted) <= brief.quoted
        texts.append(prompt)
    assert len(set(texts)) == len(texts)
    _, refused, _ = filter_lines([(n, line(p)) for n, p in enumerate(texts[::4])], Bounds())
    assert not refused


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_group_has_a_grammar_of_its_own(language):
    rules, places = read_grammar(language), {(c.subclass, c.group) for c in TAXONOMY.categories}
    for subclass, group in places:
        own = rules.get(subclass, {}).keys() | rules.get(f"{subclass}/{group}", {}).keys()
        assert own >= ({"form art", "text", "detail"} if subclass == "lettering" else {"scene", "detail", "mark"}), (
            group
        )
    assert rules.keys() <= {"*", *(subclass for subclass, _ in places), *("/".join(place) for place in places)}
    words = {symbol.removeprefix("words ") for symbol in rules["lettering"] if symbol.startswith("words ")}
    assert words == {c.en for c in TAXONOMY.categories if c.subclass == "lettering"}


def test_templates_know_strange_taxonomies(tmp_path):
    (tmp_path / "t.txt").write_text("= all\n== odd\na bag of {0} %s {it} | 一袋{it}\n")
    [brief] = make_plan(read_taxonomy(tmp_path / "t.txt"), 1, 0, Counter(), ["en"], 1)
    assert "a bag of {0} %s {it} " in Grammar().write(brief)[0]


def test_prompts_by_templates_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data.main(["prompts", "--out", "whole.jsonl", "--count", "60"]) == 0
    data.main(["prompts", "--out", "p.jsonl", "--count", "25"])
    content = Path("p.jsonl").read_bytes()
    Path("p.jsonl").write_bytes(content[:-40])  # killed while it wrote
    data.main(["prompts", "--out", "p.jsonl", "--count", "60"])
    assert Path("p.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    with pytest.raises(UserError, match="made with other settings"):
        data.main(["prompts", "--out", "p.jsonl", "--count", "60", "--languages", "zh"])
    Path("other.txt").write_text("words\n")
    with pytest.raises(UserError, match="other things than prompts"):
        data.main(["prompts", "--out", "other.txt", "--count", "60"])
    assert Path("other.txt").read_text() == "words\n"


def test_the_starter_set():
    prompts, grammar = read_prompt_file("starter"), Grammar(0)
    for brief, prompt in zip(make_plan(TAXONOMY, 100, 0, Counter(), ["en", "zh"], 0.2), prompts, strict=False):
        assert brief.id == prompt.id and grammar.write(brief)[0] == prompt.prompt, "make it anew: docs/data.md"
    known = {category.en for category in TAXONOMY.categories}
    assert len(prompts) == 1000 and {p.source for p in prompts} == {"templates"}
    assert {p.category for p in prompts} <= known and len({p.category for p in prompts}) > 900
    assert all(200 <= len(p.prompt) <= 350 and p.language == language_of(p.prompt) for p in prompts[::7])
    assert sum(bool(p.quoted) for p in prompts) > 150
    assert (
        sum(file.stat().st_size for file in STARTER.parent.iterdir() if file.suffix != ".py" and file.is_file()) < 6e5
    )


# --- a server that fails ---
def ask(server, *argv, out="p.jsonl", count=12):
    words = ["--endpoint", server.url, "--llm", "tester", "--count", count, "--languages", "en", "--out", out]
    return data.main([*map(str, ["prompts", *words, "--timeout", 0.4, "--retries", 2, "--concurrency", 3, *argv])])


def test_prompts_by_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_KEY", "secret-key")
    with Server(lambda body, _: written(body)) as server:
        assert ask(server, "--key-env", "MY_KEY", "--price-in", 2, "--price-out", 10) == 0
        prompts = read_prompt_file("p.jsonl")
        assert ask(server) == 0 and len(server.bodies) == 3, "nothing is asked for twice"
    plan = make_plan(TAXONOMY, 12, 0, Counter(), ["en"], 0.2)
    assert {(p.id, p.category) for p in prompts} == {(b.id, b.category.en) for b in plan}
    assert {p.source for p in prompts} == {"tester"} and set(server.keys[:3]) == {"Bearer secret-key"}
    assert server.bodies[0]["response_format"]["json_schema"]["strict"] and server.most_at_once <= 3
    said = capsys.readouterr().out
    assert "3 requests, 0 of them without a usable answer; 300 tokens in, 150 out; cost 0.0021" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "fault", [TOO_MANY, NO_ANSWER, LOST, PLAIN, Fault(503), "{ broken", "", '{"prompts": [{"number"', '{"prompts": 3}']
)
def test_what_fails_now_and_then_costs_no_prompt(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with Server(lambda body, number: fault if number % 3 == 2 else written(body)) as server:
        assert ask(server) == 0
    assert sorted(p.id for p in read_prompt_file("p.jsonl")) == sorted(f"0-{n}" for n in range(12))


def test_half_answers_are_kept_and_the_rest_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def answer(body, number):
        asked.extend(subjects(body))
        return written(body, left_out=1 if len(asked) <= 12 else 0)

    with Server(answer) as server:
        assert ask(server) == 0
    assert len(asked) == 12 + 3 and len(read_prompt_file("p.jsonl")) == 12


def test_what_stays_missing_is_said_and_asked_for_by_the_next_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Server(lambda body, _: "no" if "fox" in str(subjects(body)) else written(body)) as server:
        (tmp_path / "t.txt").write_text("= a\n== b\na fox | 狐\na cat | 猫\na dog | 狗\n")
        assert ask(server, "--taxonomy", "t.txt", "--batch", 1, count=3) == 1
    said = capsys.readouterr().out
    assert "2 of 3 prompts" in said and "1 by an answer without JSON" in said
    with Server(lambda body, _: "Sure! ```json\n" + written(body) + "\n```") as server:
        assert ask(server, "--taxonomy", "t.txt", "--batch", 1, count=3) == 0 and len(server.bodies) == 1


def test_servers_that_know_no_schema(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Server(lambda body, _: NO_FORM if "response_format" in body else written(body)) as server:
        assert ask(server, "--concurrency", 1) == 0
    forms = [body.get("response_format", {}).get("type") for body in server.bodies]
    assert forms == ["json_schema", "json_object", None, None, None]


@pytest.mark.parametrize(
    ("fault", "says"),
    [(NO_KEY, "refused the key in OPENAI_API_KEY"), (NO_MODEL, "knows no model 'tester'"),
     (Fault(400), "refused the request"), ("never", "got no usable answer"),
     (Fault(429, b'{"error": {"message": "insufficient_quota", "code": "insufficient_quota"}}'), "quota")],
)  # fmt: skip
def test_what_will_never_answer_ends_in_one_line(fault, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with Server(lambda *_: fault) as server, pytest.raises(UserError, match=says) as error:
        ask(server, count=200)
    assert "\n" not in str(error.value) and len(server.bodies) < 60


def test_requests_are_paced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with Server(lambda body, _: written(body)) as server:
        ask(server, "--per-minute", 600, "--batch", 2)
    assert time.monotonic() - start > 0.5 and len(server.bodies) == 6


def test_answers_are_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def answer(body, _):
        names = ["../../x{0}%s\n<script>alert(1)</script>", "\ud800", "", "{{ 7 * 7 }} $HOME `id`"]
        some = [{"number": n, "prompt": name, "quoted": []} for n, name in enumerate(names, 1)]
        return json.dumps({"prompts": some + [{"number": 99, "prompt": "x", "quoted": []}] + some})

    with Server(answer) as server:
        assert ask(server, count=4) == 0
    found = {p.prompt for p in read_prompt_file("p.jsonl")}
    assert found == {"../../x{0}%s <script>alert(1)</script>", "{{ 7 * 7 }} $HOME `id`"}
    assert data.main(["stats", "p.jsonl"]) == 0
    page = Path("stats.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page
    assert sorted(p.name for p in Path().iterdir()) == ["p.jsonl", "stats.html"]


def test_a_local_model_is_asked_the_same_way(tmp_path, monkeypatch):
    from tiny_pipeline import tiny_text_encoder, tiny_tokenizer
    from transformers import Qwen3ForCausalLM

    from l2p_fast.datamaking.llm import Local, Question, ask_all

    Qwen3ForCausalLM(tiny_text_encoder().config).save_pretrained(tmp_path / "llm")
    tiny_tokenizer().save_pretrained(tmp_path / "llm")
    model = Local(str(tmp_path / "llm"), longest=8)
    [answer] = ask_all(model, [Question("key", "Rules.", "Task.", {"type": "object"})])
    assert answer.key == "key" and answer.problem and model.usage.tokens_out == 8
    with pytest.raises(UserError, match="not a folder"):
        Local(str(tmp_path / "nothing"))


# --- the filter ---
@pytest.mark.parametrize(
    ("item", "rule"),
    [
        ("{", "schema"), ("[]", "schema"), ('{"prompt": 3}', "schema"), ('{"text": "a"}', "schema"),
        (line(text("a fox"), category="a car"), "schema"), (line("\\ud800" + text("x"))[:-1] + "}", "format"),
        ('{"prompt": "\\ud800"}', "schema"),
        (line(text("a fox") + "\n"), "format"), (line("Sure, here is " + text("a fox")), "format"),
        (line(text("a fox at http://a.b")), "format"), (line(text("a **fox**")), "format"),
        (line(text("a\u202efox")), "format"), (line(text("a fox, masterpiece")), "format"),
        (line("A photograph of the fox."), "length"), (line(text("a fox", 351)), "length"),
        (line("Ein Foto " + "von einem Fuchs im Wald am Morgen, ganz still und klar " * 4), "language"),
        (line(text("a fox"), language="zh"), "language"),
        (line(text('a fox with a "sign')), "quoted text"), (line(text('a fox "" here')), "quoted text"),
        (line(text("a fox ”")), "quoted text"), (line(text('a sign "Stop"'), quoted=["Go"]), "quoted text"),
        (line(text("a nude figure")), "safety"), (line(text("a scene of Torture")), "safety"),
        (line("一张照片，画面里是一具尸体，" + "清晨的光线柔和地照在草地上，远处有三棵树。" * 10), "safety"),
        (line(text("a Coca-Cola can")), "copyright"), (line(text("a hill in the style of Banksy")), "copyright"),
        (line(text("two Pikachus")), "copyright"), (line(text("a tree painted by John Smith")), "copyright"),
        (line("一张照片，画面里是皮卡丘，" + "清晨的光线柔和地照在草地上，远处有三棵树。" * 10), "copyright"),
    ],
)  # fmt: skip
def test_what_is_refused(item, rule):
    kept, [refused], _ = filter_lines([(7, item)], Bounds(taxonomy=TAXONOMY))
    assert not kept and refused.rule == rule and refused.number == 7 and refused.reason
    assert json.loads(refused.line())["text"] == item


@pytest.mark.parametrize(
    "words",
    ["naked branches", "an analog clock", "a field of rapeseed", "a therapist", "a grape", "shell", "Michelangelo's",
     "a cocktail dress", "a Mexican hat", "a corporal", "a suit", "a scunthorpe sign", "dice", "a stabilizer"],
)  # fmt: skip
def test_words_are_whole(words):
    assert WordList().find(f"A photograph of {words} in the light.") is None


def test_chinese_words_that_hold_others():
    for words in ("超人气的面馆", "鸡尾酒", "裸麦面包", "血橙", "枪尖草", "龙的传人"):
        assert WordList().find(f"一张照片，画面里是{words}。") is None


def test_near_duplicates():
    base = text("a red fox on a rock")
    lines = [base, base.replace("red", "gray"), text("two boats in a harbor at noon", 280)[::1], base]
    kept, refused, _ = filter_lines([(n, line(p)) for n, p in enumerate(lines)], Bounds(share=0.8))
    assert [item.rule for item in refused] == ["duplicate"] * len(refused) and {1, 3} <= {r.number for r in refused}


def test_near_duplicates_by_embeddings(tmp_path):
    from tiny_pipeline import tiny_text_encoder, tiny_tokenizer

    from l2p_fast.datamaking.duplicates import Embeddings

    tiny_text_encoder().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    embeddings = Embeddings(str(tmp_path / "m"), 0.9999)
    assert embeddings.doubles(["a fox", "一二三四五六七八", "a fox"]).keys() == {2}
    assert embeddings.doubles([]) == {}


def test_a_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts = [line(text(f"{n} foxes and {chr(97 + n) * 9} {n * 7919}")) for n in range(13)]
    Path("p.jsonl").write_text("\n".join(prompts))

    def answer(body, number):
        asked = re.findall(r"^(\d+)\. ", body["messages"][1]["content"], re.M)
        verdicts = [{"number": int(n), "keep": n != "2", "reason": "it is garbled\n\x1b[31m"} for n in asked]
        return "half {" if len(asked) < 10 else json.dumps({"verdicts": verdicts + [{**verdicts[0], "number": 77}]})

    with Server(answer) as server:
        words = ["--judge", "--endpoint", server.url, "--llm", "m", "--near", "0.95"]
        assert data.main(["filter", "p.jsonl", "--out", "kept.jsonl", *words]) == 0
    assert len(read_prompt_file("kept.jsonl")) == 12 and "3 prompts are kept unjudged" in capsys.readouterr().out
    [refused] = map(json.loads, Path("kept.rejected.jsonl").read_text().splitlines())
    assert refused["rule"] == "judge" and refused["number"] == 2 and "\x1b" not in refused["reason"]


def test_the_filter_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text(text("a fox") + "\nshort\n")
    assert data.main(["filter", "p.txt", "--out", "kept.jsonl"]) == 0
    assert "kept 1 of 2" in capsys.readouterr().out and len(read_prompt_file("kept.jsonl")) == 1
    with pytest.raises(UserError, match="the file that is read"):
        data.main(["filter", "kept.jsonl", "--out", "kept.jsonl"])
    with pytest.raises(UserError, match="--most must be from 200"):
        data.main(["filter", "kept.jsonl", "--out", "k.jsonl", "--most", "3"])


# --- images ---
def prompt_file(path: Path, count: int = 3) -> Path:
    path.write_text("".join(Prompt(f"a red star, number {n}", str(n), "odd", "a star").line() for n in range(count)))
    return path


@pytest.fixture
def painted(monkeypatch):
    """Images are plain colors; what was asked for is listed."""
    asked = []

    def load(setup, longest):
        def draw(request):
            asked.append((request.prompt, request.seed))
            if request.prompt.endswith("unlucky"):
                raise UserError("the image is not finite")
            image = Image.fromarray(np.full((request.height, request.width, 3), request.seed % 256, dtype=np.uint8))
            return Drawing(image, {**request.as_dict(), "model": "none", "steps": 1}, {})

        return draw, ["model      a stand-in"]

    monkeypatch.setattr(painters, "session_painter", load)
    return asked


def images(*argv):
    return data.main([*map(str, ["images", *argv, "--res", 64])])


def test_images_in_the_published_layout(tmp_path, monkeypatch, painted):
    from l2p_fast.training.config import DataConfig
    from l2p_fast.training.data import list_images

    monkeypatch.chdir(tmp_path)
    prompt_file(Path("p.jsonl"))
    assert images("p.jsonl", "--out", "set", "--seed", 5, "--shards", 4) == 0
    rows = list(csv.DictReader(open("set/metadata.csv")))
    assert rows[3] == {"image": "images/000001_1.png", "prompt": "a red star, number 1", "seed": "8"}
    assert [int(row["seed"]) for row in rows] == list(range(5, 11)) and len(set(painted)) == len(painted) == 6
    assert np.array(Image.open(Path("set") / rows[3]["image"])).max() == 8
    assert read_prompt_file("set/prompts.jsonl") == read_prompt_file("p.jsonl")
    found = list_images(DataConfig(path="set"))
    assert [(image.prompt, image.seed) for image in found] == [(row["prompt"], int(row["seed"])) for row in rows]
    shards = list_images(DataConfig(path="set/shards"))
    assert [(i.prompt, i.seed) for i in shards] == [(i.prompt, i.seed) for i in found]
    assert bool((shards[3].load(64, 64) == found[3].load(64, 64)).all())
    assert sorted(path.name for path in Path("set/shards").iterdir()) == ["00000.tar", "00001.tar"]
    with tarfile.open("set/shards/00001.tar") as tar:
        assert tar.getnames() == ["000002_0.json", "000002_0.png", "000002_1.json", "000002_1.png"]


def test_images_go_on_after_a_kill(tmp_path, monkeypatch, painted, capsys):
    monkeypatch.chdir(tmp_path)
    prompt_file(Path("p.jsonl"))
    images("p.jsonl", "--out", "set")
    first = list(painted)
    Path("set/images/000001_0.png").write_bytes(b"")  # what a kill or a full disk may leave
    Path("set/images/000002_1.png").unlink()
    Path("set/metadata.csv").unlink()
    painted.clear()
    images("p.jsonl", "--out", "set")
    assert painted == [first[2], first[5]] and "4 images are finished" in capsys.readouterr().out
    assert len(image_sets.read_table(Path("set"))) == 6
    prompt_file(Path("p.jsonl"), 4)
    images("p.jsonl", "--out", "set")
    assert len(painted) == 4 and len(image_sets.read_table(Path("set"))) == 8
    with pytest.raises(UserError, match="holds images with seed 0, not 9"):
        images("p.jsonl", "--out", "set", "--seed", 9)


def test_processes_share_the_images(tmp_path, monkeypatch, painted):
    monkeypatch.chdir(tmp_path)
    prompt_file(Path("p.jsonl"), 5)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        images("p.jsonl", "--out", "set", "--each", 1, "--shards", 2)
    assert len(painted) == len(set(painted)) == 5 and len(image_sets.read_table(Path("set"))) == 5
    start = threading.Barrier(2)  # of two at once, one waits for the other

    def look(_):
        start.wait()
        with alone(Path("set")):
            inside.append(1)
            time.sleep(0.05)
            inside.append(-1)

    inside: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(look, range(2)))
    assert inside == [1, -1, 1, -1]
    assert len(list(Path("set/shards").iterdir())) == 3
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK"):
        images("p.jsonl", "--out", "set", "--each", 1)


def test_an_image_that_fails_stops_no_run(tmp_path, monkeypatch, painted, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a star\na star, unlucky\nanother star\n")
    assert images("p.txt", "--out", "set", "--each", 1) == 1
    assert len(image_sets.read_table(Path("set"))) == 2 and "000001_0.png is not drawn" in capsys.readouterr().err
    Path("p.txt").write_text("a star, unlucky\n" * 30)
    with pytest.raises(UserError, match="not finite"):
        images("p.txt", "--out", "set2", "--each", 1)
    assert len(painted) == 3 + 10


def test_a_gate(tmp_path, monkeypatch, painted):
    class Gate:
        def __init__(self, *_):
            pass

        def score(self, image, prompt):
            return float(np.array(image).max()) / 10

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "ClipGate", Gate)
    prompt_file(Path("p.jsonl"))
    images("p.jsonl", "--out", "set", "--gate", "clip", "--gate-least", 0.25)
    assert len(image_sets.read_table(Path("set"))) == 3
    assert len(list(csv.DictReader(open("set/rejected.csv")))) == 3
    assert read_settings("", "set/images/000000_1.png")["score"] == 0.1
    images("p.jsonl", "--out", "set", "--gate", "clip", "--gate-least", 0.05)  # another gate draws nothing anew
    assert len(image_sets.read_table(Path("set"))) == 5 and len(painted) == 6


def test_clip_scores(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    from l2p_fast.datamaking.gate import ClipGate

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 600, "eos_token_id": 2},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )  # fmt: skip
    folder = tmp_path / "clip"
    CLIPModel(config).save_pretrained(folder)
    vocab = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in map(chr, range(33, 127)) for end in ("", "</w>"))]
    CLIPTokenizer(vocab={word: n for n, word in enumerate(vocab)}, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    gate, image = ClipGate(str(folder)), Image.new("RGB", (64, 48), (200, 10, 10))
    assert -1 <= gate.score(image, "a red star") <= 1
    assert gate.score(image, "a red star") == gate.score(image, "a red star") != gate.score(image, "blue")
    with pytest.raises(UserError, match="no folder of a CLIP model"):
        ClipGate(str(tmp_path))


@pytest.mark.slow
def test_ray_draws_what_a_killed_worker_had(tmp_path, monkeypatch, capsys):
    """A worker dies with a piece in its hands: what it had drawn stays as it is, and another draws the rest."""
    ray = pytest.importorskip("ray", reason="pip install l2p_fast[ray]")
    from plain_source import PlainSource

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{Path(data.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}")
    monkeypatch.setattr(painters, "Source", PlainSource)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    prompts = [f"a star, number {n}" for n in range(40)]
    prompts[5], prompts[7] = "a star, deadly", "a star, unlucky"
    Path("p.txt").write_text("\n".join(prompts))
    argv = ["p.txt", "--out", "set", "--each", 1, "--engine", "ray"]
    with pytest.raises(UserError, match="--workers is 2, and Ray has 1 CPUs"):
        images(*argv, "--workers", 2)
    try:
        assert images(*argv) == 1  # one can't be drawn
    finally:
        ray.shutdown()
    drawn = Path("drawn.txt").read_text().split()
    assert sorted(map(int, drawn)) == sorted([*range(40), 5]) and Path("died").exists()
    assert len(image_sets.read_table(Path("set"))) == 39 and "000007_0.png is not drawn" in capsys.readouterr().err
    assert images(*argv[:-2]) == 1 and len(Path("drawn.txt").read_text().split()) == 42  # the other engine goes on


def test_workers_are_those_of_ray(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workers goes with --engine ray"):
        images("starter", "--out", "set", "--workers", 2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine ray needs the package ray: pip install l2p_fast\[ray\]"):
        images("starter", "--out", "set", "--limit", 1, "--engine", "ray")


def test_images_with_a_lora(tmp_path, monkeypatch):
    """Of a model of ours and of a pipeline; another LoRA is another set."""
    import torch
    from safetensors.torch import load_file, save_file
    from tiny_pipeline import save_tiny

    monkeypatch.chdir(tmp_path)
    save_tiny(Path("pipe"))
    name, rng = "layers.0.attention.to_q", torch.Generator().manual_seed(0)
    width = load_file("pipe/transformer/diffusion_pytorch_model.safetensors")[f"{name}.weight"].shape[0]
    sides = {"A": (4, width), "B": (width, 4)}
    pair = {f"transformer.{name}.lora_{k}.weight": torch.randn(v, generator=rng) for k, v in sides.items()}
    save_file(pair, "style.safetensors")
    prompt_file(Path("p.jsonl"), 1)
    pixels = {}
    for kind in ("model", "pipeline"):
        argv = ["p.jsonl", f"--{kind}", "pipe", "--steps", 1, "--each", 1]
        for what, more in (("plain", []), ("lora", ["--lora", "style.safetensors:2"])):
            assert images(*argv, "--out", f"{kind}-{what}", *more) == 0
            pixels[kind, what] = np.array(Image.open(f"{kind}-{what}/images/000000_0.png"))
        assert not np.array_equal(pixels[kind, "plain"], pixels[kind, "lora"])
        assert json.loads(Path(f"{kind}-lora/set.json").read_text())["lora"] == ["style.safetensors:2.0"]
        before = Path(f"{kind}-lora/images/000000_0.png").stat().st_mtime_ns
        assert images(*argv, "--out", f"{kind}-lora", "--lora", "style.safetensors:2") == 0
        assert Path(f"{kind}-lora/images/000000_0.png").stat().st_mtime_ns == before
        with pytest.raises(UserError, match="holds images with lora .*style.*, not None"):
            images(*argv, "--out", f"{kind}-lora")
    assert np.array_equal(pixels["model", "lora"], pixels["pipeline", "lora"])
    with pytest.raises(UserError, match="--lora nowhere does not exist"):
        images("p.jsonl", "--out", "x", "--lora", "nowhere")


def test_any_diffusers_pipeline_draws(tmp_path, monkeypatch):
    from tiny_pipeline import save_tiny

    monkeypatch.chdir(tmp_path)
    save_tiny(Path("pipe"))
    prompt_file(Path("p.jsonl"), 1)
    argv = ["p.jsonl", "--pipeline", "pipe", "--steps", 1, "--out", "set"]
    assert images(*argv) == 0 and images(*argv) == 0
    settings = read_settings("", "set/images/000000_1.png")
    assert settings["pipeline"] == "L2PPipeline" and settings["seed"] == 1
    assert Image.open("set/images/000000_1.png").size == (64, 64)
    for wrong in ("nothing", "p.jsonl", "."):
        with pytest.raises(UserError, match="--pipeline"):
            images("p.jsonl", "--pipeline", wrong, "--out", "other")


# --- the whole road ---
def test_from_templates_to_training(tmp_path, monkeypatch, capsys):
    """Prompts, filter, images of the bundled model, a page, and a training that takes them."""
    from l2p_fast import train

    monkeypatch.chdir(tmp_path)
    steps = [
        ["prompts", "--out", "p.jsonl", "--count", "6"],
        ["filter", "p.jsonl", "--out", "kept.jsonl", "--limit", "2"],
        ["images", "kept.jsonl", "--out", "set", "--each", "1", "--res", "64", "--steps", "1", "--shards", "2"],
        ["stats", "set", "--out", "set.html"],
    ]
    for step in steps:
        assert data.main(step) == 0
    said = capsys.readouterr().out
    assert "kept 2 of 6" in said and "2 of 2 images" in said and "images      2" in said
    page = Path("set.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 and page.count("<svg") >= 3
    assert not re.search(r"(src|href)=.(?!data:|#)|url\((?!#)", page)  # nothing comes from elsewhere
    tiny = Path(data.__file__).parent / "weights" / "tiny-1k"
    settings = [f"model.base={tiny}", f"data.text_encoder={tiny}", "data.path=set", "run=run", "model.weights=float32"]
    settings += ["data.grids=[{tokens: 16, batch: 2}]", "optim.kind=adamw", "freeze.n=2", "steps=1", "device=cpu"]
    assert train.main([*settings, "log.board=none"]) == 0
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1


def test_a_page_about_strange_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["$\\frac{", "<i>&", "\x1b[31m\n", "雾" * 99, "", "\0", "{{ 1 }}", "%s {0}"]
    Path("p.jsonl").write_text("".join(Prompt(f"{o} and {n}", o, o, o, o, o, o).line() for n, o in enumerate(odd)))
    assert data.main(["stats", "p.jsonl"]) == 0
    assert "<i>" not in Path("stats.html").read_text()


KILLED = """
import os, sys
from l2p_fast import data
from l2p_fast.datamaking import image_sets
drawn, save = [], image_sets.save_image
def save_and_die(*arguments):
    save(*arguments)
    drawn.append(arguments[1])
    if len(drawn) == 2:
        os.kill(os.getpid(), 9)
image_sets.save_image = save_and_die
data.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_torchrun_and_a_kill(tmp_path, monkeypatch):
    """Two processes, both killed after two images each; then three of them go on, and draw nothing twice."""
    monkeypatch.chdir(tmp_path)
    prompt_file(Path("p.jsonl"), 4)
    Path("killed.py").write_text(KILLED)
    argv = ["images", "p.jsonl", "--out", "set", "--res", "64", "--steps", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    for rank in range(2):
        ranks = environment | {"RANK": str(rank), "WORLD_SIZE": "2"}
        assert subprocess.run([sys.executable, "killed.py", *argv], env=ranks, capture_output=True).returncode == -9
    before = {path.name: path.stat().st_mtime_ns for path in Path("set/images").iterdir()}
    assert len(before) == 4 and not Path("set/metadata.csv").exists()
    ended = subprocess.run([*torchrun, "3", "-m", "l2p_fast.data", *argv], env=environment, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
    after = {path.name: path.stat().st_mtime_ns for path in Path("set/images").iterdir()}
    assert len(after) == 8 and after.items() >= before.items() and len(image_sets.read_table(Path("set"))) == 8


def test_a_page_names_no_place_outside(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "metadata.csv").write_text("image,prompt,seed\n../secret.png,a star,1\n")
    with pytest.raises(UserError, match="not in the folder"):
        data.main(["stats", str(tmp_path / "set"), "--out", str(tmp_path / "s.html")])


MISTAKES = (
    (["images", "starter", "--out", "x", "--res", "63"], "--res must be a multiple of 16"),
    (["images", "starter", "--out", "x", "--model", "nowhere"], "--model nowhere does not exist"),
    (["prompts", "--out", "x", "--count", "0"], "--count must be from 1"),
    (["prompts", "--out", "x", "--languages", "de"], "--languages has the unknown value"),
    (["filter", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
    (["taxonomy", "--grow", "3"], "needs a language model"),
    (["prompts", "--out", "x", "--endpoint", "there", "--llm", "m"], "must be a URL"),
)


def test_a_mistake_is_answered_before_torch_is_loaded(tmp_path):
    code = (
        "import sys; from l2p_fast import data; from l2p_fast.errors import run_cli\n"
        f"for argv in {[argv for argv, _ in MISTAKES]!r}:\n"
        "    sys.argv[1:] = argv\n"
        "    try: run_cli(data.main)\n"
        "    except SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(data.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    for said, (_, says) in zip(ended.stderr.splitlines(), MISTAKES, strict=True):
        assert said.startswith("error: ") and says in said
