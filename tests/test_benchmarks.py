"""The benchmarks' own arithmetic: counts, rows that fail, ratios, the report. What they measure is not timed here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import baselines, counts, measure, report
from benchmarks import test_attention as attention_rows
from benchmarks import test_block as block_rows
from benchmarks import test_step as step_rows
from benchmarks.conftest import add_ratios
from benchmarks.counts import Work
from benchmarks.measure import SCALES, Case, Limits, NotHere, error, finite
from l2p_fast.errors import UserError
from l2p_fast.models.detailer import DetailerHead
from l2p_fast.sampling import graphs

QUICK = SCALES["quick"]


def flops(run) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# --- Counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("patch,side,tera", [(16, 1024, 0.83), (64, 4096, 1.23), (128, 8192, 1.93)])
def test_counted_head_is_what_runs(patch, side, tera):
    with torch.device("meta"):
        head = DetailerHead(patch, 3840)
        given = torch.empty(1, 3, side, side), torch.empty(1, 3840, 64, 64)
    work = counts.head(head.levels, 512, 3840, side, side, patch, state_size=4)
    assert work.flops / 1e12 == pytest.approx(tera, rel=0.005)
    assert work.flops == flops(lambda: head.forward_reference(*given))
    parameters = sum(p.numel() for p in head.parameters() if p.ndim == 4)
    assert work.bytes == 2 * (parameters + 3840 * 64 * 64 + 3 * side * side) + 4 * 3 * side * side


def test_counted_transformer_is_what_runs():
    model = baselines.pixel_model(QUICK, 16, "cpu").to("meta")
    head = model.local_decoder
    plain = baselines.PlainL2P(model)
    rope = plain.body.rope_embedder
    plain.body.rope_embedder = lambda ids: rope(torch.zeros(ids.shape, dtype=torch.int64)).to("meta")
    pixels, cap = torch.empty(1, 3, 80, 80, device="meta"), torch.empty(7, 64, device="meta", dtype=torch.bfloat16)
    work = counts.body(25, 7, 64, 3, 1, 768, 64)
    work += counts.head(head.levels, head.bottleneck[0].out_channels, 64, 80, 80, 16)
    assert work.flops == flops(lambda: plain(pixels, torch.ones(1, device="meta"), cap))
    assert work.flops == baselines.body_work(measure.Scale(**{**vars(QUICK), "text_tokens": 7}), 16, 80).flops


def test_counted_published_model():
    full = SCALES["full"]
    work = counts.body(4096, 128, full.dim, full.layers, full.refiners, 3 * 64 * 64, full.cap_dim)
    assert 54e12 < work.flops < 58e12
    parameters = 6.201e9  # of the published 4K model, without its head
    assert work.bytes / 2 == pytest.approx(parameters + 4096 * (3 * 64 * 64 + 3840) + 128 * 2560, rel=1e-3)


def test_counted_decoder_is_what_runs():
    vae = baselines.autoencoder(measure.Scale(**{**vars(QUICK), "vae_channels": (32, 64, 64, 96)}), "meta", tiled=False)
    latents = torch.empty(1, 16, 6, 10, device="meta", dtype=torch.bfloat16)
    work = counts.vae_decode((32, 64, 64, 96), 16, 6, 10)
    assert work.flops == flops(lambda: vae.decode(latents))
    weights = sum(p.numel() for p in vae.parameters() if p.ndim > 1)
    assert work.bytes == 2 * (weights + 16 * 60 + 3 * 60 * 64)


def test_counted_training():
    assert counts.training(Work(100, 10), 40, 5, 14) == Work(260, 100)
    assert counts.moved((2, 3), (4,), size=4) == Work(0, 40)


# --- The baseline ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_plain_model_is_ours():
    scale = measure.Scale(**{**vars(QUICK), "dtype": "float32"})
    for patch, height, width, text in ((16, 80, 48, 7), (64, 128, 64, 33)):
        model = baselines.pixel_model(scale, patch, "cpu")
        pixels, t, cap = torch.randn(1, 3, height, width), torch.tensor([0.3]), torch.randn(text, 64)
        assert error(model(pixels, t, [cap]), baselines.PlainL2P(model)(pixels, t, cap)) < 1e-5


# --- Rows ------------------------------------------------------------------------------------------------------------
def build(kind: str, device: str) -> Case:
    """What rows can come to, for `measure.apart`; at module level, as another process looks it up."""
    runs = {
        "good": lambda: torch.ones(2**20).add(1),
        "wrong": lambda: torch.ones(1),
        "large": lambda: torch.ones(2**31),
        "slow": lambda: time.sleep(60),
        "dead": lambda: os._exit(3),
        "broken": lambda: torch.ones(2) @ torch.ones(3),
    }
    if kind == "absent":
        raise NotHere("needs another card")
    check = (lambda: 0.5) if kind == "wrong" else None
    return Case(runs[kind], Work(1000, 2**23), check, tolerance=0.1, against="nothing", facts={"width": 7})


def test_row_with_times():
    peaks = {"matmul_flops": 1e6, "copy_bytes": 1e9}
    # Apart, as in this process memory that other tests gave back would be used again, unseen.
    with measure.Apart(measure.measure, build, {"kind": "good"}, "cpu", Limits(60, 0.01, 3), peaks) as process:
        row, *seconds = (process.ask(60) for _ in range(4))
    assert row["status"] == "ok" and row["width"] == 7 and 1 <= row["rounds"] <= 3 and min(seconds) > 0
    measure.add_times(row, seconds, peaks)
    assert row["share_of_copy"] == pytest.approx(2**23 / row["median_s"] / 1e9)
    assert row.get("extra_mb", 8) > 3  # two tensors of 4 MB
    slow = {"matmul_flops": 1.0, "copy_bytes": 1e9}
    (row,) = measure.measure(build, {"kind": "good"}, "cpu", Limits(60), slow)
    assert row["status"] == "not run" and "at least 1000 s" in row["reason"]
    (row,) = measure.measure(build, {"kind": "wrong"}, "cpu", Limits(60), None)
    assert row["status"] == "wrong" and "0.5 against nothing" in row["reason"] and "median_s" not in row


def test_rows_apart():
    """A row that breaks or dies or hangs is a row; those after it run."""

    def apart(kind: str, seconds: float, limits: Limits) -> dict:
        arguments = build, {"kind": kind}, "cpu", limits, None
        return measure.apart(measure.measure, *arguments, seconds=seconds, memory=limits.memory)

    free = Limits(60, rounds_seconds=0, rounds=1)
    assert apart("dead", 60, free) == {"status": "failed", "reason": "the process ended with code 3"}
    assert apart("slow", 1, free) == {"status": "over budget", "reason": "not done within 1 s"}
    assert apart("absent", 60, free) == {"status": "not run", "reason": "needs another card"}
    row = apart("broken", 60, free)
    assert row["status"] == "failed" and "size" in row["reason"]
    if sys.platform == "linux":
        row = apart("large", 60, Limits(60, memory=2**28))
        assert row == {"status": "out of memory", "reason": "needs more than 0.25 GB of working memory"}
    assert apart("good", 60, free)["status"] == "ok"
    with measure.Apart(measure.measure, build, {"kind": "good"}, "cpu", free, None) as process:
        assert process.ask(60)["rounds"] == 1
        assert all(process.ask(60) > 0 for _ in range(3))


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux' means")
def test_memory_limit():
    with pytest.raises(RuntimeError) as problem, measure.limited_memory(2**28):
        torch.ones(2**31)
    assert measure._is_out_of_memory(problem.value)
    torch.ones(2**27)  # the limit is gone


@pytest.mark.parametrize(
    "builder,arguments",
    [
        (attention_rows.build, {"variant": "ours"}),
        (attention_rows.build, {"variant": "_native_math", "ragged": True}),
        (block_rows.build, {"variant": "ours"}),
        (block_rows.build, {"variant": "ours int8"}),
        (step_rows.build, {"variant": "ours", "patch": 64}),
        (step_rows.build_lowbit, {"variant": "ours fp8", "patch": 64}),
    ],
    ids=str,
)
def test_rows_hold_what_they_say(builder, arguments):
    torch.manual_seed(0)
    case = builder(scale=QUICK, device="cpu", **arguments)
    with torch.no_grad():
        case.run()
        assert case.check() <= case.tolerance
    assert case.work.flops and case.against


@torch.no_grad()
def test_a_row_by_a_graph_is_none_where_there_is_no_graph(monkeypatch):
    arguments = {"variant": "ours by a graph", "patch": 64, "scale": QUICK, "device": "cpu"}
    with pytest.raises(NotHere, match="no CUDA graph: there are none on cpu"):
        step_rows.build(**arguments)
    monkeypatch.setattr(graphs, "obstacle", lambda model, device: None)
    monkeypatch.setattr(graphs, "capture", Mock(side_effect=RuntimeError("not permitted")))
    case = step_rows.build(**arguments)
    case.run()
    with pytest.raises(NotHere, match="no CUDA graph: not permitted"):
        case.run()


def test_ratios():
    def row(variant, status="ok", **more):
        return {"level": "head", "name": "4K", "variant": variant, "status": status, **more}

    ours, plain = row("ours", median_s=2.0, extra_mb=10.0), row("plain", median_s=8.0, extra_mb=100.0)
    other = row("ours", median_s=1.0) | {"name": "1K"}
    add_ratios([ours, plain, row("latent", "out of memory"), other])
    assert ours["ratio_to"] == {"plain": 0.25} and ours["memory_ratio_to"] == {"plain": 0.1}
    assert other["ratio_to"] == {} and "ratio_to" not in plain


def test_errors():
    assert error(torch.ones(2), torch.ones(3)) == float("inf") and error(torch.tensor([torch.nan]), torch.ones(1)) > 1
    assert finite(torch.ones(2, 3), (2, 3)) == 0 and finite(torch.ones(2), (3,)) == float("inf")


# --- The report ------------------------------------------------------------------------------------------------------
def result(path, rows=None):
    def row(variant, side, **more):
        return dict(level="head", name=f"{side}", resolution=side, variant=variant, status="ok", reason="", **more)

    done = dict(extra_mb=2000.0, total_mb=2100.0, flops=1e12, bytes=2e9, share_of_matmul=0.5, share_of_copy=0.1)
    if rows is None:
        rows = [
            row("ours", 1024, median_s=0.5, **done, error=1.0, tolerance=2.0) | {"ratio_to": {"plain": 0.25}},
            row("plain", 1024, median_s=2.0, **done),
            row("ours", 4096, median_s=0.002, **done),
            row("plain", 4096) | {"status": "out of memory", "reason": "needs more than 12 GB | really"},
            row("compiled", 4096) | {"status": "not run", "reason": "torch.compile is off here; --compile on"},
        ]
    machine = dict(
        gpu=None, threads=2, torch="2.13", diffusers="0.42", l2p_fast="0.1", extension="loaded", device="cpu",
        matmul_flops=4e11, copy_bytes=3e10, scale=vars(SCALES["cpu"]),
    )  # fmt: skip
    data = {"machine_info": {"l2p": machine, "cpu": {"brand_raw": "A CPU"}}}
    path.write_text(json.dumps(data | {"benchmarks": [{"extra_info": r} for r in rows]}))
    return path


def test_report(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    given = [str(result(tmp_path / "machine.json")), "--page", str(page)]
    assert report.main(given) == 0
    table = page.read_text()
    assert table.startswith("before\n") and table.endswith("after\n") and "old" not in table
    assert "A CPU, 2 threads" in table and "width 128, 3 layers" in table and "bfloat16" in table
    assert "| head: 1024 | 1024 | plain | 2 s | 0.25 | 1.95 GB | 2.05 GB | 1 | 2 | 50% | 10% |  |" in table
    assert "| 2 ms |" in table and "out of memory: needs more than 12 GB \\| really" in table
    lines = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "Not run: torch.compile is off here; --compile on (1)." in table and "compiled |" not in table
    assert "(page/machine.png)" in table and (tmp_path / "page" / "machine.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main(given) == 0 and page.read_text() == table
    new = tmp_path / "new.md"
    assert report.main([*given[:2], str(new)]) == 0 and "(new/machine.png)" in new.read_text()


def test_report_refuses(tmp_path):
    for name, content in {"text": "no JSON", "other": '{"benchmarks": [{}]}', "list": "[]"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="--benchmark-json"):
            report.main([str(tmp_path / name), "--page", str(tmp_path / "page.md")])
    with pytest.raises(UserError, match="can't read"):
        report.main([str(tmp_path / "nothing.json")])
    with pytest.raises(UserError, match="holds no row"):
        report.main([str(result(tmp_path / "empty.json", []))])
    page = tmp_path / "page.md"
    page.write_text(report.END + report.BEGIN)
    with pytest.raises(UserError, match="once each"):
        report.main([str(result(tmp_path / "m.json")), "--page", str(page)])
    assert not (tmp_path / "page").exists()


@pytest.mark.slow
def test_gpu_script_on_a_bare_machine(tmp_path):
    """The script for GPUs, without one and without diffusers: what is missing is a row that says so."""
    blocked, out = tmp_path / "blocked" / "diffusers", tmp_path / "out"
    blocked.mkdir(parents=True)
    out.mkdir()
    (blocked / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'diffusers'\", name='diffusers')")
    root = Path(measure.__file__).parents[1]
    settings = {"PYTHONPATH": str(blocked.parent), "L2P_BENCH_DEVICE": "cpu", "L2P_BENCH_SECONDS": "240"}
    settings |= {"OUT": str(out), "L2P_BENCH_RESULTS": str(out / "results"), "PYTHON": sys.executable}
    settings |= {"L2P_BUILD": "skip"}  # takes minutes; test_build.py has that
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), "-k", "head and 1K or lowbit and step"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=400)
    found = json.loads((out / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout[-3000:]
    assert [step["step"] for step in found["steps"]][:4] == ["build", "status", "kernels", "goldens"]
    status = {(row["level"], row["variant"]): (row["status"], row["reason"]) for row in found["rows"]}
    assert status["head", "ours"] == ("ok", "") and status["step", "ours fp8"] == (
        "not run", "No module named 'diffusers'",
    )  # fmt: skip
