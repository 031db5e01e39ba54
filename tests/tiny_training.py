"""A tiny model, images, cached text features and a configuration, for the tests of training."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from tiny_pipeline import FEATURES

from l2p_fast import train
from l2p_fast.errors import run_cli
from l2p_fast.formats.write import save_single_file
from l2p_fast.models.zimage import L2PTransformer2DModel
from l2p_fast.training import loop  # noqa: F401  for the children
from l2p_fast.training.data import Features
from l2p_fast.training.monitor import read_log

IMAGES = 10
# Children start from a process that has imported everything and run nothing. Before Python 3.14 it knows no sys.path
# but the environment's, and would import nothing without a word.
_PATHS = [str(Path(__file__).parent), str(Path(train.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tiny_training"])


def tiny_model(patch: int = 16, layers: int = 3) -> L2PTransformer2DModel:
    """About 60,000 parameters."""
    torch.manual_seed(3)
    return L2PTransformer2DModel(
        all_patch_size=(patch,), dim=32, n_layers=layers, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=FEATURES, axes_dims=(4, 6, 6), head_width=0.05,
    )  # fmt: skip


def make_world(folder: Path, patch: int = 16, side: int = 32, layers: int = 3) -> Path:
    """``folder`` with base.safetensors, data/, features/ and config.yaml; returns the configuration's path."""
    save_single_file(tiny_model(patch, layers), folder / "base.safetensors")
    rng = np.random.default_rng(0)
    (folder / "data").mkdir()
    rows = [(f"{i}.png", f"picture {i}", i) for i in range(IMAGES)]
    for name, _, _ in rows:
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "data" / name)
    with open(folder / "data" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "prompt", "seed"), *rows])
    prompts = ["", *(prompt for _, prompt, _ in rows)]
    (folder / "features").mkdir()
    Features(folder / "features").add(prompts, [torch.randn(3 + i % 3, FEATURES) for i in range(len(prompts))])
    config = {
        "run": str(folder / "run"), "steps": 6, "save_every": 2, "device": "cpu",
        "model": {"base": str(folder / "base.safetensors"), "weights": "float32", "compute": "float32"},
        "freeze": {"policy": "paper", "n": 1},
        "data": {"path": str(folder / "data"), "features": str(folder / "features"), "workers": 1,
                 "grids": [{"tokens": (side // patch) ** 2, "batch": 2}]},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "log": {"board": "none"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step of a run."""
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(run)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def child(argv: list[str], log: str, environment: dict[str, str]) -> None:
    """What a child process does: the command line ``argv``, with what it says in the file ``log``."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    try:
        run_cli(lambda: train.main(argv))
    except Exception:  # into the log, not the terminal
        traceback.print_exc()
        os._exit(1)


def start(argv: list[str], log: Path, **environment: str) -> multiprocessing.Process:
    process = CONTEXT.Process(target=child, args=([str(a) for a in argv], str(log), environment))
    process.start()
    return process


def run_ranks(world: int, argv: list[str], log: Path, code: int = 0, node: int | None = None) -> None:
    """``argv`` on ``world`` processes, ``node`` a node, as torchrun would start them; all must end with ``code``."""
    port = str(free_port())
    ranks = [
        start([*argv, "--fsdp"], log.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank % (node or world)),
              WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(node or world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world)
    ]  # fmt: skip
    for rank, process in enumerate(ranks):
        process.join(600)
        said = log.with_suffix(f".{rank}").read_text()
        assert process.exitcode == code, said


def world_in(folder: Path):
    """(run the command line with overrides, ``folder``)."""
    path = make_world(folder)
    return lambda *overrides: train.main([str(path), *map(str, overrides)]), folder
