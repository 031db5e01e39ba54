"""The evaluate command: layouts as the benchmarks' scorers want them, their files read back, resuming, mistakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip
from tiny_pipeline import save_tiny

from l2p_fast import evaluate
from l2p_fast.errors import UserError
from l2p_fast.evaluation import scoring, suites
from l2p_fast.evaluation.scorefiles import grouped_row, read_scores
from l2p_fast.evaluation.suites import plan, read_tasks
from l2p_fast.evaluation.table import Row, markdown, pivot
from l2p_fast.sampling import session
from l2p_fast.sampling.request import Request, Setup

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", default_steps=1, default_guidance_scale=1.0)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(command, *argv):
        drawn = (
            []
            if command in ("folder", "compare")
            else ["--model", str(model), "--res", "32", "--steps", "3" if command == "grid" else "1"]
        )
        return evaluate.main([command, *map(str, argv), *drawn])

    return run


def lines(path: str, *values: dict) -> str:
    Path(path).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
    {"tag": "counting", "include": [{"class": "cat", "count": 3}], "prompt": "a photo of three cats"},
]


def files(folder: str = "out") -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


# --- Layouts ---------------------------------------------------------------------------------------------------------
def test_geneval(run, capsys, monkeypatch):
    lines("metadata.jsonl", *GENEVAL)
    assert run("geneval", "metadata.jsonl", "--num-images", 2, "--out", "out") == 0
    wanted = [
        f"{i:05d}/{name}" for i in range(3) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert files() == [*wanted, "scores.json", "scores.md"]
    assert [json.loads(Path(f"out/{i:05d}/metadata.jsonl").read_text()) for i in range(3)] == GENEVAL
    settings = [json.loads(Image.open(f"out/00001/samples/000{k}.png").info["l2p_fast"]) for k in range(2)]
    assert [s["prompt"] for s in settings] == ["a photo of two dogs"] * 2 and [s["seed"] for s in settings] == [2, 3]
    assert "| grid, smooth areas (16 px) |" in capsys.readouterr().out

    Path("out/00001/samples/0001.png").write_bytes(b"")  # the disk was full
    drawn, draw = [], session.Session.draw
    monkeypatch.setattr(session.Session, "draw", lambda self, request: drawn.append(request) or draw(self, request))
    results = lines("results.jsonl", *results_of([[1, 1], [1, 0], [0, 0]]))
    assert run("geneval", "metadata.jsonl", "--num-images", 2, "--out", "out", "--scores", results) == 0
    assert [request.seed for request in drawn] == [3]
    said = capsys.readouterr().out
    assert "5 of 6 files are finished and skipped" in said and "| GenEval | 0.6250 |" in said
    facts = json.loads(Path("out/scores.json").read_text())
    assert facts["suite"] == "geneval" and facts["rows"][0]["value"] == 0.625 and facts["request"]["steps"] == 1


def results_of(right) -> list[dict]:
    return [
        {"filename": f"out/{i:05d}/samples/{k:04d}.png", "tag": line["tag"], "prompt": line["prompt"],
         "correct": bool(value), "reason": "", "metadata": json.dumps(line), "details": "{}"}
        for i, (line, row) in enumerate(zip(GENEVAL, right, strict=True)) for k, value in enumerate(row)
    ]  # fmt: skip


def test_geneval_2(run):
    lines("data.jsonl", {"prompt": "two red stars", "atom_count": 2}, {"prompt": "a ring", "atom_count": 1})
    assert run("geneval2", "data.jsonl", "--out", "out") == 0
    assert files() == ["images.json", "images/0000.png", "images/0001.png", "scores.json", "scores.md"]
    named = json.loads(Path("out/images.json").read_text())
    assert list(named) == ["two red stars", "a ring"]
    assert all(Path(path).is_absolute() and Image.open(path).size == (32, 32) for path in named.values())


@pytest.mark.parametrize("as_csv", [False, True])
def test_dpg(run, model, as_csv):
    """One file a prompt; the four images are those of single drawings."""
    if as_csv:
        source = "dpg.csv"
        rows = [f'item,"a, {w} star",k,{n},0,c,d,t,q\n' for w, n in (("red", 1), ("red", 2))] + [
            "b_1,a ring,k,1,,,,,\n"
        ]
        head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question\n"
        Path(source).write_text(head + "".join(rows))
    else:
        source = "prompts"
        Path(source).mkdir()
        Path("prompts/item.txt").write_text("a, red star\n")
        Path("prompts/b_1.txt").write_text("a ring")
    assert run("dpg", source, "--out", "out") == 0
    assert files() == ["b_1.png", "item.png", "scores.json", "scores.md"]
    first = 0 if as_csv else 4  # a folder is read in alphabetical order
    Path("p.txt").write_text("a, red star\n")
    run("prompts", "p.txt", "--num-images", 4, "--seed", first, "--out", "single")
    tiles = [np.array(Image.open("out/item.png").crop((x, y, x + 32, y + 32))) for y in (0, 32) for x in (0, 32)]
    singles = [np.array(Image.open(f"single/0000-a-red-star-{k}.png")) for k in range(4)]
    assert Image.open("out/item.png").size == (64, 64) and all(map(np.array_equal, tiles, singles))
    Image.open("single/0000-a-red-star-0.png").save("out/item.png")  # a single image of the same request
    works = plan("dpg", read_tasks("dpg", source), Request("", 0, height=32, width=32), 4, Path("out"))
    assert [work.path.stem for work in works if not work.is_finished(Setup(model=str(model)))] == ["item"]
    assert not any(work.is_finished(Setup(model="another")) for work in works)


def test_pixverve_prompts_and_clip(run, tmp_path, monkeypatch):
    bench = [
        {"file_name": f"images/x_{i}.png", "short_caption": f"star {i}", "long_caption": f"a star, {i}"} for i in (3, 1)
    ]
    lines("bench.jsonl", *bench)
    Path("real").mkdir()
    for i in (1, 2, 3):
        Image.effect_noise((40, 48), 60).convert("RGB").save(f"real/x_{i}.png")
    score = save_clip(tmp_path / "clip")
    seen = {}
    monkeypatch.setattr(
        scoring, "_inception", lambda items, keys, judges: seen.update(items=items, judges=judges) or []
    )
    monkeypatch.setitem(scoring.LOADERS, "inception", lambda path, device: torch.nn.Identity())
    Path("weights.pth").write_bytes(b"")
    argv = ["--reference", "real", "--inception", "weights.pth", "--clip", "clip", "--long-clip", "clip"]
    assert run("pixverve", "bench.jsonl", "--out", "out", *argv) == 0
    assert [name for name in files() if not name.startswith("features")] == [
        "scores.json",
        "scores.md",
        "x_1.jpg",
        "x_3.jpg",
    ]
    assert [item.path.name for item in seen["items"]] == ["x_3.jpg", "x_1.jpg"] and seen["judges"].resize == 32
    assert [item.path.name for item in seen["judges"].reference] == ["x_3.png", "x_1.png"]
    rows = {row["name"]: row["value"] for row in json.loads(Path("out/scores.json").read_text())["rows"]}
    for name, field in (("CLIP score", "short_caption"), ("CLIP score, long", "long_caption")):
        each = [
            score(Image.open(f"out/x_{i}.jpg").convert("RGB"), line[field])
            for i, line in zip((3, 1), bench, strict=True)
        ]
        assert rows[name] == pytest.approx(sum(each) / 2, abs=1e-3)


def test_shards_and_folders(run, capsys):
    Path("p.txt").write_text("a red star\na ring\n")
    run("prompts", "p.txt", "--out", "out", "--shard", "2/2")
    assert files() == ["0001-a-ring.png"] and "other parts are missing" in capsys.readouterr().out
    run("prompts", "p.txt", "--out", "out", "--shard", "1/2")
    assert "scores.md" in files()
    run("prompts", "p.txt", "--out", "other", "--seed", 5)
    capsys.readouterr()
    assert run("folder", "out", "--period", 8) == 0
    said = capsys.readouterr().out
    run("compare", "out", "other", "--period", 8, "--out", "table")
    compared = capsys.readouterr().out
    assert "grid (8 px), difference (paired)" in compared and Path("table/scores.md").read_text() in compared
    assert said.splitlines()[2].split("|")[2] == compared.splitlines()[2].split("|")[2]  # the first folder's own value
    assert run("folder", "out", "--period", 16) == 0 and "| - |" in capsys.readouterr().out  # too small for that
    with pytest.raises(UserError, match="nothing to score with; give --period"):
        run("folder", "out")


def test_the_grid_by_sampler_guidance_and_way(run, capsys):
    argv = ["--samplers", "euler,heun,unipc,stochastic", "--guidances", "2", "--period", "8", "--out", "out"]
    Path("p.txt").write_text("a ring\n")
    assert run("grid", "--prompts-file", "p.txt", *argv) == 0
    table = Path("out/scores.md").read_text()
    assert len(table.splitlines()) == 2 + 4 * 3 and "| heun, guidance 2, pad |" in table
    images = {path: path.read_bytes() for path in Path("out").rglob("*.png")}
    pixels = {np.array(Image.open(path)).tobytes() for path in images}
    assert len(images) == len(pixels) == 12
    assert run("grid", "--prompts-file", "p.txt", *argv) == 0 and "1 of 1 files are finished" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in images.items())


# --- Score files -----------------------------------------------------------------------------------------------------
def test_geneval_results(tmp_path):
    path = lines(str(tmp_path / "r.jsonl"), *results_of([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 1]]))
    total, single, counting = read_scores("geneval", path, [])
    assert (single.value, single.error, single.count) == (0.75, None, 1)
    assert (counting.value, counting.count) == (0.5, 2) and counting.error == pytest.approx(0.25)
    assert (total.value, total.error, total.count) == (0.625, None, 3)
    path = lines(path, *results_of([[1, 1], [1, 0], [0, 0]]), {"tag": "single_object", "prompt": "x", "correct": False})
    total = read_scores("geneval", path, [])[0]
    assert total.value == pytest.approx((2 / 3 + 0.25) / 2) and total.error > 0


def test_geneval_2_scores(tmp_path):
    data = [{"prompt": "a", "skills": ["count", "object"], "atom_count": 2}, {"prompt": "b", "skills": ["object"],
            "atom_count": 1}, {"prompt": "c", "skills": ["object", "object"], "atom_count": 2}]  # fmt: skip
    tasks = read_tasks("geneval2", lines(str(tmp_path / "data.jsonl"), *data))
    (tmp_path / "scores.json").write_text("[[0.25, 1.0], [0.5], [0.0, 1.0]]")
    rows = {row.name: row for row in read_scores("geneval2", str(tmp_path / "scores.json"), tasks)}
    assert rows["GenEval 2 Soft-TIFA, arithmetic"].value == pytest.approx(100 * (0.625 + 0.5 + 0.5) / 3)
    assert rows["GenEval 2 Soft-TIFA, geometric"].value == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert rows["GenEval 2 object"].value == pytest.approx(100 * (1 + 0.5 + 0 + 1) / 4)
    assert rows["GenEval 2 object"].count == 3 and rows["GenEval 2 count"].value == 25
    assert rows["GenEval 2 2 atoms, geometric"].value == pytest.approx(25)
    for text, says in (
        ("[[0.1]]", "scores 1 prompts, and there are 3"),
        ("[[2]]", "no list of lists"),
        ("{", "not JSON"),
    ):
        (tmp_path / "scores.json").write_text(text)
        with pytest.raises(UserError, match=says):
            read_scores("geneval2", str(tmp_path / "scores.json"), tasks)


def test_dpg_results(tmp_path):
    text = "out/a, b.png, 1.0, 0.5, 1.0, 0.5, 0.75\nout/c.png, 0.25, 0.25, 0.25, 0.25, 0.25\nModel: out\n"
    text += "L1 category scores:\n\tentity: 90.5\nL2 category scores:\n\tentity - whole: 91.0\nImage path: out\n"
    (tmp_path / "r.txt").write_text(text + "Save results to: r.txt\nDPG-Bench score: 50.0\n")
    total, first, second = read_scores("dpg", str(tmp_path / "r.txt"), [])
    assert (total.value, total.count) == (50, 2) and total.error == pytest.approx(25)
    assert (first.name, first.value, first.error) == ("DPG-Bench L1 entity", 90.5, None)
    assert second.name == "DPG-Bench L2 entity - whole"


def test_pixverve_results(tmp_path):
    log = "Computing FID...\nFID: 33.46\n" + "=" * 50 + "\nFID:                           33.4600\n"
    log += "FID-Patch:                     21.7700\nCLIP Score (Short Caption):    31.8800\n"
    log += "FG-CLIP2 Score (Long Caption): 28.2200\nGLCM Score:                    nothing\n"
    (tmp_path / "log.txt").write_text(log)
    rows = read_scores("pixverve", str(tmp_path / "log.txt"), [])
    assert {row.name: row.value for row in rows} == {
        "PixVerve FID": 33.46, "PixVerve FID-Patch": 21.77, "PixVerve CLIP Score (Short Caption)": 31.88,
        "PixVerve FG-CLIP2 Score (Long Caption)": 28.22,
    }  # fmt: skip
    for suite in ("geneval", "dpg", "pixverve"):
        (tmp_path / "log.txt").write_text("")
        with pytest.raises(UserError, match="log.txt"):
            read_scores(suite, str(tmp_path / "log.txt"), [])
    with pytest.raises(UserError, match="prompts has no scorer of its own"):
        read_scores("prompts", str(tmp_path / "log.txt"), [])


def test_standard_errors_count_groups():
    values = np.random.default_rng(0).normal(size=50)
    plain = grouped_row("x", [[v] for v in values])
    assert plain.error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert grouped_row("x", [[v, v, v] for v in values]).error == pytest.approx(plain.error)


def test_tables():
    rows = [Row("a|b", 12.3456, 0.01, 4), Row("c", math.nan, None, 0)]
    assert markdown(rows) == "|  | value | standard error | of |\n| --- | --- | --- | --- |\n" + (
        "| a/b | 12.35 | 0.0100 | 4 |\n| c | - |  | 0 |\n"
    )
    assert pivot({"one": rows, "two": rows}).splitlines()[2] == "| one | 12.35 ± 0.0100 | - |"


# --- Mistakes --------------------------------------------------------------------------------------------------------
WRONG = [
    ([], "COMMAND"),
    (["genevals"], "invalid choice"),
    (["geneval", "none.jsonl", "--out", "o"], "none.jsonl can't be read: No such file"),
    (["geneval", "broken.jsonl", "--out", "o"], "broken.jsonl, line 1: not JSON"),
    (["geneval", "list.jsonl", "--out", "o"], "line 1: not a JSON object"),
    (["geneval", "notag.jsonl", "--out", "o"], "line 1: no text 'tag'"),
    (["geneval", "blank.jsonl", "--out", "o"], "the prompt of 00000 is empty"),
    (["geneval", "empty.jsonl", "--out", "o"], "holds no prompts"),
    (["geneval", "good.jsonl"], "--out"),
    (["geneval", "good.jsonl", "--out", "o", "--res", "33"], "--res must be a multiple of 16"),
    (["geneval", "good.jsonl", "--out", "o", "--num-images", "0"], "--num-images must be at least 1"),
    (["geneval", "good.jsonl", "--out", "o", "--num-images", "100001"], "--num-images must be at most"),
    (["geneval", "good.jsonl", "--out", "good.jsonl"], "good.jsonl is not a folder"),
    (["geneval", "good.jsonl", "--out", "o", "--shard", "3/2"], "--shard must read N/M"),
    (["geneval", "good.jsonl", "--out", "o", "--scores", "none"], "none can't be read"),
    (["geneval", "good.jsonl", "--out", "o", "--scores", "good.jsonl"], "no tag, prompt and correct"),
    (["geneval2", "good.jsonl", "--out", "o", "--num-images", "2"], "must be 1 for geneval2"),
    (["dpg", "good.jsonl", "--out", "o"], "no columns item_id and text"),
    (["dpg", "texts", "--out", "o", "--height", "32", "--width", "64"], "1 or 4 square images"),
    (["dpg", "texts", "--out", "o", "--num-images", "2"], "1 or 4 square images"),
    (["pixverve", "up.jsonl", "--out", "o"], "can't be the name of an image"),
    (["pixverve", "twice.jsonl", "--out", "o"], "names one image twice"),
    (["pixverve", "up.jsonl", "--out", "o", "--caption", "middle"], "--caption has the unknown value 'middle'"),
    (["prompts", "good.jsonl", "--out", "o", "--reference", "texts"], "needs --inception"),
    (["prompts", "good.jsonl", "--out", "o", "--clip", "nowhere"], "--clip nowhere is not a folder"),
    (["prompts", "good.jsonl", "--out", "o", "--lpips", "texts"], "--lpips texts is not a file"),
    (["prompts", "good.jsonl", "--out", "o", "--resamples", "1"], "--resamples must be from 2"),
    (["grid", "--out", "o", "--samplers", "eular"], "--samplers has the unknown value 'eular'; try euler"),
    (["grid", "--out", "o", "--ways", "rol"], "try roll"),
    (["grid", "--out", "o", "--guidances", "1;2"], "--guidances must be numbers with commas"),
    (["folder", "nowhere", "--period", "16"], "nowhere is not a folder"),
    (["folder", "texts", "--period", "16"], "holds no images"),
    (["compare", "texts"], "second"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG)
def test_wrong_arguments_are_answered_before_anything_is_loaded(model, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session.Session, "load", lambda *a: pytest.fail("loaded"))
    lines("good.jsonl", {"tag": "x", "prompt": "a star"})
    lines("notag.jsonl", {"prompt": "a star"})
    lines("blank.jsonl", {"tag": "x", "prompt": " "})
    lines("up.jsonl", {"file_name": "a/..", "short_caption": "a", "long_caption": "a"})
    lines("twice.jsonl", *[{"file_name": "a/x.png", "short_caption": "a", "long_caption": "a"}] * 2)
    Path("broken.jsonl").write_text("{")
    Path("list.jsonl").write_text("[]")
    Path("empty.jsonl").write_text("\n")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a star")
    before = sorted(tmp_path.rglob("*"))
    drawing = argv[:1] and argv[0] in (*suites.EACH, "grid")
    with pytest.raises(UserError, match=words) as caught:
        evaluate.main([*argv, *(["--model", str(model)] if drawing else [])])
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before


def test_a_mistake_costs_no_import_of_torch():
    code = (
        "import sys\nfrom l2p_fast.errors import run_cli\nfrom l2p_fast.evaluate import main\n"
        "try:\n    run_cli(lambda: main(['geneval', 'nowhere', '--out', 'o', '--model', 'tiny-1k']))\n"
        "finally:\n    assert not {'torch', 'diffusers', 'transformers', 'torchmetrics'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (
        done.returncode == 2 and done.stderr.startswith("error: nowhere can't be read") and done.stderr.count("\n") == 1
    )
