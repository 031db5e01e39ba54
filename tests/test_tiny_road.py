"""The whole road of another source in the small world, shortened: it ends with three scores and a sheet."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("scipy", reason="pip install l2p_fast[tiny]")
pytest.importorskip("yaml", reason="pip install l2p_fast[tiny]")

from examples.tiny import road
from l2p_fast import convert, train
from l2p_fast.errors import UserError


def begin_here(command, *words):
    """In this process, which has imported everything: it ends before it returns."""
    code = {"convert": convert, "train": train}[command].main(list(map(str, words)))
    return SimpleNamespace(wait=lambda: code, poll=lambda: code)


@pytest.mark.parametrize("source", ["flux2", pytest.param("qwen_image", marks=pytest.mark.slow)])
def test_road(source, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "PROMPTS", road.PROMPTS[:3])
    monkeypatch.setattr(road, "STEPS", 2)
    monkeypatch.setattr(road, "BATCH", 3)
    if source == "flux2":
        monkeypatch.setattr(road, "begin", begin_here)
    shortened = {"minutes": 0.02, "pictures": 9, "count": 3, "seeds": 1}
    with pytest.raises(UserError, match="none of 3 images"):
        road.run(tmp_path, source, **shortened)
    monkeypatch.setattr(road, "matches", lambda *_: True)
    told = road.run(tmp_path, source, **shortened)
    assert told == json.loads((tmp_path / "road.json").read_text())
    assert told["images kept"] == told["prompts"] == 3 and told["source"] == told["transfer"] == told["scratch"] == 1
    assert 0 < told["transfer trained"] < told["scratch trained"] <= told["scratch parameters"]
    assert told["transfer steps"] > 0 and told["scratch steps"] > 0 and (tmp_path / "sheet.png").exists()
    lines = (tmp_path / "road.md").read_text().splitlines()
    assert len(lines) == 5 and lines[3].endswith("| 100.0% ± 0.0% |")
    monkeypatch.setattr(road, "begin", None)
    assert road.run(tmp_path, source, **shortened) == told  # nothing is made anew
