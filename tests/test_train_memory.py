"""The dry run's arithmetic against the measured peak of a model of reduced width, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("yaml", reason="training needs PyYAML: pip install l2p_fast[train]")

from l2p_fast.loading import build_empty
from l2p_fast.models.blocks import TransformerBlock, rope_tables
from l2p_fast.training.memory import block_bytes

# Peak memory of a training beyond what the process held before it had a model. A thread measures what is resident.
MEASURE = """
import json, sys, threading, time
import bitsandbytes, torch
from l2p_fast.loading import build_empty
from l2p_fast.training import memory
from l2p_fast.training.config import load_config
from l2p_fast.training.freeze import freeze
from l2p_fast.training.objective import losses
from l2p_fast.training.optim import AdamW
from l2p_fast.training.pairs import add_pairs, targets
from l2p_fast.quantize.frozen import quantize_frozen

torch.set_num_threads(1)
config = load_config(None, json.loads(sys.argv[1]))
sizes = {"all_patch_size": (16,), "dim": 512, "n_layers": 12, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4,
         "cap_feat_dim": 64, "axes_dims": (32, 48, 48), "head_width": 0.25}
side = 16 * int(config.data.grids[0].tokens ** 0.5)
batch = config.data.grids[0].batch
memory.TEXT_TOKENS = 32

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def measure(steps=2):
    model = build_empty(sizes)
    freeze(model, config.freeze, bool(config.lora.rank))
    add_pairs(model, targets(model, config.lora), config, torch.float32)
    told = memory.expected(config, model)
    warm = torch.nn.Conv2d(4, 4, 3)(torch.randn(1, 4, 32, 32)).sum()  # the libraries' own buffers
    warm.backward()
    before = resident()
    peak, ended = [before], []
    def watch():
        while not ended:
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = model.to_empty(device="cpu").to(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    if config.memory.checkpointing:
        from l2p_fast.training.build import _checkpointing
        model.enable_gradient_checkpointing(_checkpointing(False, torch.device("cpu")))
    model.local_decoder.memory_mb = config.memory.head_mb
    if config.model.frozen_bits < 16:
        quantize_frozen(model.layers, config.model.frozen_bits, lambda name, p: p.detach(), "layers.")
    optimizer = AdamW({n: p for n, p in model.named_parameters() if p.requires_grad}, config.optim)
    if config.optim.fused:
        optimizer.fuse()
    for _ in range(steps):
        x0, noise = torch.randn(2, batch, 3, side, side)
        losses(model, x0, noise, torch.rand(batch), [torch.randn(20, 64)] * batch).mean().backward()
        optimizer.finish() if config.optim.fused else optimizer.step()
    ended.append(1)
    watcher.join()
    print(json.dumps([told.total, peak[0] - before, vars(told)]))

measure()
"""
SETTINGS = {
    "plain": ["optim.kind=adamw", "memory.checkpointing=false"],
    "checkpointed": ["optim.kind=adamw", "freeze.policy=full"],
    "pairs": ["optim.kind=adamw", "lora.rank=32", "model.frozen_bits=8"],
    "pairs, kept": ["optim.kind=adamw", "lora.rank=128", "memory.checkpointing=false"],
    "saving": ["optim.kind=adamw8bit", "optim.fused=true", "model.frozen_bits=8", "freeze.n=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_predicted_peak_is_the_measured_one(name):
    """Within 10 %."""
    pytest.importorskip("bitsandbytes", reason="pip install l2p_fast[train]")
    settings = ["model.weights=float32", "model.compute=float32", "data.grids=[{tokens: 256, batch: 1}]",
                *SETTINGS[name]]  # fmt: skip
    said = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(settings)], capture_output=True, text=True,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})  # fmt: skip
    assert said.returncode == 0, said.stderr
    told, measured, parts = json.loads(said.stdout.splitlines()[-1])
    assert told == pytest.approx(measured, rel=0.1), f"told {told / 1e6:.0f} MB, took {measured / 1e6:.0f} MB: {parts}"


def test_what_a_block_keeps_scales_with_tokens_and_width():
    """The count on a small block holds for one of another size."""
    model = build_empty({"dim": 128, "n_heads": 2, "n_kv_heads": 2, "axes_dims": (16, 24, 24)})
    kept, _ = block_bytes(model, torch.float32)["layers"]
    tokens, dim, seen = 96, 256, {}
    block = TransformerBlock(dim, 4, 1e-5, qk_norm=True)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    x = torch.randn(1, tokens, dim, requires_grad=True)
    rope = rope_tables(torch.zeros(1, tokens, 3), (16, 24, 24), 256.0)
    own |= {r.untyped_storage().data_ptr() for r in rope}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = block(x, rope, temb=torch.zeros(1, 256))
    assert sum(seen.values()) == pytest.approx(kept * tokens * dim, rel=0.1)
    assert out.shape == x.shape
