"""The commands of the documentation that start several processes run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from tiny_training import make_world
from torch.distributed.run import parse_args

from l2p_fast.train import parser
from l2p_fast.training.config import load_config
from l2p_fast.training.monitor import read_log

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def documented() -> list[str]:
    """Every command line with ``torchrun ... -m l2p_fast.train``, from ``torchrun`` on."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    lines = [line.partition(" #")[0] for block in re.findall(r"```.*?```", text, re.S) for line in block.splitlines()]
    return [line[line.index("torchrun ") :] for line in lines if re.search(r"torchrun .*-m l2p_fast\.train", line)]


def test_torchrun_passes_all_of_it_on():
    """Whatever Python's argparse makes of options: none of the training's is taken for one of torchrun's."""
    commands = documented()
    assert len(commands) >= 2
    for command in commands:
        words = shlex.split(re.sub(r"\$\([^)]*\)|\$\w+", "4", command))[1:]
        started = parse_args(words)
        assert started.training_script == "l2p_fast.train" and not started.run_path
        assert started.training_script_args == words[words.index("l2p_fast.train") + 1 :]
        ours = parser().parse_intermixed_args(started.training_script_args)
        assert ours.fsdp and load_config(ROOT / ours.config, ours.overrides).run


def test_a_documented_command_on_two_processes(tmp_path):
    config = make_world(tmp_path)
    command = next(c for c in documented() if "--nnodes" not in c)
    command = re.sub(r"configs/\S+", str(config), command.replace("--nproc-per-node 8", "--nproc-per-node 2"))
    command, count = re.subn(r"\brun=\S+", f"run={tmp_path / 'torchrun'} steps=2", command)
    assert count == 1
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    said = subprocess.run(
        shlex.split(command), capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PATH": places, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert [line["step"] for line in read_log(tmp_path / "torchrun")] == [1, 2]
    assert (tmp_path / "torchrun/trained.safetensors").exists()
