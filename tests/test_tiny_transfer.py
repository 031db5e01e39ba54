"""Transfer and ablations of the small world, from a source that has learned nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("scipy", reason="the small world needs scipy: pip install l2p_fast[tiny]")
pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install l2p_fast[train]")

from tiny_pipeline import FEATURES, tiny_text_encoder, tiny_tokenizer, tiny_transformer

from examples.tiny import __main__ as command
from examples.tiny import ablate, transfer
from examples.tiny.corpus import draw_corpus, write_table
from examples.tiny.world import Prompt
from l2p_fast.errors import UserError
from l2p_fast.sampling.pipeline import load_pipeline


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as `ldm` and `corpus` leave it, with few and small pictures; narrow heads."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=5, n_refiner_layers=1, n_heads=1,
        n_kv_heads=1, cap_feat_dim=FEATURES, axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
    )  # fmt: skip
    encoder, tokenizer = tiny_text_encoder(), tiny_tokenizer()
    encoder.save_pretrained(tmp_path / "source" / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "source" / "tokenizer")
    source = SimpleNamespace(transformer=transformer, text_encoder=encoder, tokenizer=tokenizer)
    monkeypatch.setattr(transfer, "load_source", lambda *_: source)
    monkeypatch.setattr(transfer, "HEAD_WIDTHS", {16: 0.05, 64: 0.05})
    monkeypatch.setattr(transfer, "GRIDS", {16: ((8, 2, 4, 0.5), (16, 1, 8, 0.5)), 64: ((8, 1, 2, 1.0),)})
    monkeypatch.setattr(transfer, "FINE_PICTURES", {16: 2})
    monkeypatch.setattr(transfer, "FOLLOW_STEPS", 2)
    (tmp_path / "corpus").mkdir()
    rows = [(f"{i}.png", f"a {color} star", i) for i, color in enumerate(("red", "blue", "green", "black"))]
    for i, (name, _, _) in enumerate(rows):
        Image.new("RGB", (256, 256), (60 * i, 0, 0)).save(tmp_path / "corpus" / name)
    write_table(tmp_path / "corpus" / "metadata.csv", rows)
    return tmp_path


def test_transfer_makes_both_models(folder):
    for patch in ("16", "64"):
        command.main(["transfer", "--folder", str(folder), "--patch-size", patch, "--minutes", "0.01"])
    assert (folder / "renderer" / "256" / "00001.png").exists()
    line = json.loads((folder / "transfer-16" / "log.jsonl").read_text().splitlines()[0])
    assert line["step"] == 1 and line["skipped_steps"] == 0
    pipeline = load_pipeline(folder / "l2p-64")
    frozen = transfer.L2PTransformer2DModel.from_pretrained(folder / "init-64")
    assert pipeline.transformer.config.rope_grid == 8 and pipeline.default_guidance_scale == 2.0
    expected = frozen.layers[2].attention.to_q.weight.to(torch.bfloat16)
    assert torch.equal(pipeline.transformer.layers[2].attention.to_q.weight.to(torch.bfloat16), expected)


def test_larger_patch_follows_the_smaller_one():
    """Features of 4 x 4 means under 4 times less noise come close to those of the picture that they are."""
    small = tiny_transformer(rope_grid=8)
    pictures = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(0)).repeat(1, 1, 16, 16)
    shift, scale, level = 16.0, 4, 0.95
    k = 1 - level + level / scale
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    texts = [torch.zeros(1, FEATURES)] * 2
    follower = transfer.follow(small, scale, pictures.to(torch.uint8), shift, 120)
    with torch.no_grad():
        wanted = small.features(x, torch.full((2,), 1 - level / scale / k), texts)
        errors = [
            (model.features(k * x, torch.full((2,), 1 - level), texts) - wanted).square().mean().item()
            for model in (small, follower)
        ]
    assert errors[1] < 0.5 * errors[0]


def test_ablations(folder, monkeypatch, capsys):
    """Three of the runs; done ones are not run again."""
    plan, first = ablate.plan, ablate._first
    monkeypatch.setattr(ablate, "UNSEEN", 2)
    monkeypatch.setattr(ablate, "UNSEEN_BATCH", 2)
    chosen = ("shallow", "8-bit", "3", "the renderer")
    monkeypatch.setattr(ablate, "FEW", 3)
    monkeypatch.setattr(ablate, "plan", lambda *args: [run for run in plan(*args) if run.choice in chosen])
    monkeypatch.setattr(ablate, "_first", lambda data, count, table, **_: first(data, min(count, 3), table))
    argv = ["ablate", "--folder", str(folder), "--steps", "1", "--per-task", "1"]
    command.main(argv)
    rows = json.loads((folder / "ablations.json").read_text())
    assert [row["choice"] for row in rows] == list(chosen) and rows[0]["prompts"] == 6
    assert "give --other" in capsys.readouterr().out and (folder / "ablations.png").exists()
    before = (folder / "ablations.json").stat().st_mtime_ns
    command.main(argv)
    assert (folder / "ablations.json").stat().st_mtime_ns == before


def test_pictures_by_another_model_are_compared_on_equal_prompts(folder, monkeypatch):
    for name in ("FEW", "VERY_FEW"):
        monkeypatch.setattr(ablate, name, 2)
    prompts = [Prompt.parse(text) for text in ("a blue star", "two red rings", "a green star")]
    draw_corpus(folder / "other", 256, prompts)
    tables = {}
    for run in ablate.plan(folder, folder / "other", 5):
        if run.question == "equal prompts by":
            config = ablate.configure(folder, run, 1, torch.device("cpu"))
            tables[run.choice] = [row[1] for row in ablate._rows(Path(config.data.path))]
    right = ["a blue star", "two red rings"]
    assert tables == {"another model": right, "the renderer": right, "the source": ["a blue star"]}
    write_table(folder / "other" / "metadata.csv", [("00000.png", "a poem about the sea", 0)])
    (folder / "ablations" / "other.csv").unlink()
    with pytest.raises(UserError, match="has 0 pictures that can be used"):
        ablate.plan(folder, folder / "other", 5)
