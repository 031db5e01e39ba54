"""The comparison of fewer evaluations with the full run."""

import json

import pytest
import torch

pytest.importorskip("scipy", reason="the small world needs scipy: pip install l2p_fast[tiny]")

from diffusers import FirstBlockCacheConfig

from examples.tiny import fewer


def test_rows_are_measured_once(tmp_path, monkeypatch):
    """Of one small image a way; a second call goes on with the rows that are missing."""
    ways = {
        fewer.FULL: {"num_inference_steps": 3, "guidance_scale": 2.0},
        "the same": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "interval": {"num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.99, 1)},
        "cache": {"num_inference_steps": 3, "guidance_scale": 2.0, "cache": FirstBlockCacheConfig(threshold=1e3)},
    }
    prompts = fewer.evaluation_prompts(1)[:1]
    monkeypatch.setattr(fewer, "evaluation_prompts", lambda per_task: prompts)
    for stop in (2, 4):
        monkeypatch.setattr(fewer, "WAYS", dict(list(ways.items())[:stop]))
        table = fewer.run(tmp_path, torch.device("cpu"), 1, {"tiny-1k": [64]})
    rows = {name.split(": ")[1]: row for name, row in table.items()}
    assert list(rows) == list(ways)
    assert [row["evaluations"] for row in rows.values()] == [6, 6, 4, 6]
    assert rows["the same"]["difference"] == 0 < min(rows[way]["difference"] for way in ("interval", "cache"))
    assert all(row["speed-up"] > 0 for way, row in rows.items() if way != fewer.FULL)
    monkeypatch.setattr(fewer, "drawn", None)  # nothing is drawn again
    assert fewer.run(tmp_path, torch.device("cpu"), 1, {"tiny-1k": [64]}) == table
    assert json.loads((tmp_path / "fewer.json").read_text()) == table
    assert len((tmp_path / "fewer.md").read_text().splitlines()) == 2 + len(ways)
