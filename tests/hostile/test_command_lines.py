"""Whatever a shell can pass, and whatever lies on the disk: one line and exit code 2, or a command that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .command_lines import cases, lay_out

ROOT = Path(__file__).parents[2]
CASES = cases()


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("hostile")
    lay_out(folder)
    said = subprocess.run(
        [sys.executable, Path(__file__).with_name("command_lines.py"), ROOT], cwd=folder, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    return [json.loads(line) for line in said.stdout.splitlines()]


def test_the_table_is_wide(ended):
    assert len(ended) == len(CASES) >= 180


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_ends_in_one_line(index, ended):
    case, end = CASES[index], ended[index]
    assert end["code"] in (0, 2), f"{end['code']}\n{end['err']}"
    if end["code"] == 2:
        notes = [line for line in end["err"].splitlines() if not line.startswith("note: ")]
        assert len(notes) == 1 and notes[0].startswith("error: "), end["err"]
        assert case.says in end["err"]
        assert all(character.isprintable() for character in notes[0])
    else:
        assert not case.says
    if case.command == "l2p_fast.sample":
        assert not end["torch"], "torch was imported to say this"
    assert "Traceback" not in end["err"] + end["out"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        ((b"caf\xe9-\xff",), 2, "--prompt is not valid text at character 4"),
        (("a", "--model", "雾"), 2, "does not exist"),
        (("a", "--model", b"\xff"), 2, "does not exist"),
        (("a", "--steps", "٣٠٠٠٠"), 2, "--steps must be at most 10000"),
        (("a", "--out", "no/" + "雾" * 86 + ".png"), 2, "File name too long"),
        (("🟥 雾", "--res", "16", "--steps", "1", "--seed", "1", "--out", "雾" * 83 + "ab.png"), 0, ""),  # 255 bytes
    ],
)
def test_in_a_shell_that_knows_ascii_alone(tmp_path, argv, code, says):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-m", "l2p_fast.sample", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr and "Traceback" not in ended.stderr + ended.stdout
    assert code == 0 or ended.stderr.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == (code == 0)
