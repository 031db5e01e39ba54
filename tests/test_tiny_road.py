"""The whole road of another source in the small world, shortened: it ends with three scores and a sheet."""

import json

import pytest

pytest.importorskip("scipy", reason="pip install l2p_fast[tiny]")
pytest.importorskip("yaml", reason="pip install l2p_fast[tiny]")

from examples.tiny import road
from l2p_fast.errors import UserError


@pytest.mark.slow
def test_road(tmp_path, monkeypatch):
    monkeypatch.setattr(road, "PROMPTS", road.PROMPTS[:3])
    monkeypatch.setattr(road, "STEPS", 2)
    monkeypatch.setattr(road, "BATCH", 3)
    with pytest.raises(UserError, match="none of 3 images"):
        road.run(tmp_path, "qwen_image", minutes=0.02, pictures=9, count=3, seeds=1)
    monkeypatch.setattr(road, "matches", lambda *_: True)
    told = road.run(tmp_path, "qwen_image", minutes=0.02, pictures=9, count=3, seeds=1)
    assert told == json.loads((tmp_path / "road.json").read_text())
    assert told["images kept"] == told["prompts"] == 3 and told["source"] == told["transfer"] == told["scratch"] == 1
    assert 0 < told["transfer trained"] < told["scratch trained"] == told["scratch parameters"]
    assert told["transfer steps"] > 0 and told["scratch steps"] > 0 and (tmp_path / "sheet.png").exists()
    lines = (tmp_path / "road.md").read_text().splitlines()
    assert len(lines) == 5 and lines[3].endswith("| 100.0% ± 0.0% |")
    again = road.run(tmp_path, "qwen_image", minutes=0.02, pictures=9, count=3, seeds=1)  # nothing is made anew
    assert again == told
