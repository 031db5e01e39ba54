"""Steps as CUDA graphs, without a GPU: a stand-in repeats what ops were launched, on the same tensors; a step on the
meta device, as the GPU, waits for nothing and copies nothing from the host."""

from __future__ import annotations

import contextlib
import inspect
import logging

import pytest
import torch
from tiny_pipeline import tiny_pipeline, tiny_transformer, wide_transformer
from tiny_sources import LATENT, SIZES, SOURCES
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from l2p_fast.evaluation.gridshift import ShiftedGrid
from l2p_fast.loading import model_class
from l2p_fast.models.adapters import add_adapter
from l2p_fast.models.detailer import unet
from l2p_fast.ops import euler_step_, fused_levels
from l2p_fast.quantize.products import quantize_blocks
from l2p_fast.sampling import graphs
from l2p_fast.sampling.denoise import Predictor
from l2p_fast.sampling.graphs import Graphed

# Ops that hand values to the host: each waits for the GPU, which can't be captured.
WAITING = (
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "is_nonzero",
    "item",
    "masked_select",
    "_pin_memory",
    "pin_memory",
)


class Tape(TorchDispatchMode):
    """What a CUDA graph holds: launches, with the addresses and numbers of the time of their capture."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.launches.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.launches:
            if func.is_view:
                continue  # the same memory still
            for held, now in zip(*map(pytree.tree_leaves, (out, func(*args, **kwargs))), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != now.data_ptr():
                    held.copy_(now)


@pytest.fixture
def captures(monkeypatch):
    """Graphs on the CPU, by tapes, which are listed."""
    made = []

    def capture(function, device):
        with Tape() as tape:
            out = function()
        made.append(tape)
        return tape.replay, out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "obstacle", lambda model, device: None)
    return made


# --- The graphs ------------------------------------------------------------------------------------------------------
class Counted:
    """A function of nested arguments, and how often it was called."""

    calls = 0

    def __call__(self, x, more, by):
        self.calls += 1
        return (x + more["a"][0]).mul(by).cumsum(0)


@torch.no_grad()
def test_the_second_call_of_a_shape_is_captured_and_later_ones_replayed(captures):
    function, plain = Counted(), Counted()
    graphed = Graphed(function)
    for i, size in enumerate((3, 3, 3, 3, 5, 5, 3, 5)):
        given = torch.full((size,), float(i)), {"a": [torch.arange(float(size)) * i]}, 2.0
        assert torch.equal(graphed(*given), plain(*given)), i
    assert function.calls == 4 and len(captures) == 2  # of each shape one plainly and one captured
    seen = {graphed(torch.zeros(3), {"a": [torch.zeros(3)]}, 2.0).data_ptr() for _ in range(3)}
    assert len(seen) == 1  # written over


@torch.no_grad()
def test_what_is_no_tensor_has_a_graph_of_its_own(captures):
    graphed, plain = Graphed(Counted()), Counted()
    for by in (2.0, 2.0, 3.0, 3.0, 2.0, 3.0):
        given = torch.ones(4), {"a": [torch.ones(4)]}, by
        assert torch.equal(graphed(*given), plain(*given))
    assert len(captures) == 2
    for dtype in (torch.float64, torch.float64):
        assert graphed(torch.ones(4, dtype=dtype), {"a": [torch.ones(4)]}, 2.0).dtype == dtype
    assert len(captures) == 3


@torch.no_grad()
def test_what_cant_be_captured_goes_on_plainly_and_says_why(captures, caplog):
    graphed = Graphed(lambda x: x * x.max().item())
    for i in range(4):
        assert graphed(torch.arange(3.0) + i).tolist() == [x * (2 + i) for x in range(i, i + 3)]
    assert "not permitted" in graphed.obstacle and not captures
    assert [record.message for record in caplog.records] == [f"no CUDA graph is used: {graphed.obstacle}"]


def test_capture_is_pytorchs(monkeypatch):
    """The one function that has CUDA in it, on stand-ins for PyTorch's."""
    done = []

    class CUDAGraph:
        def replay(self):
            done.append("replay")

    @contextlib.contextmanager
    def noted(*args, **kwargs):
        done.append((args, kwargs))
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", noted)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    replay, out = graphs.capture(lambda: torch.ones(2), torch.device("cuda:1"))
    replay()
    ((graph,), options), *rest = done
    assert type(graph) is CUDAGraph and out.tolist() == [1, 1] and rest == ["end", "replay"]
    assert options == {"stream": "a stream of cuda:1", "capture_error_mode": "thread_local"}


def test_obstacles():
    cuda, model = torch.device("cuda:0"), tiny_transformer()
    assert graphs.obstacle(model, cuda) is None
    assert "on cpu" in graphs.obstacle(model, torch.device("cpu"))
    assert "ShiftedGrid" in graphs.obstacle(ShiftedGrid(model, "roll"), cuda)
    model.layers[0]._hf_hook = object()
    assert "offloading" in graphs.obstacle(model, cuda)
    model = tiny_transformer()
    add_adapter(model, {}, "style")
    assert "adapters" in graphs.obstacle(model, cuda)


# --- Steps by graphs -------------------------------------------------------------------------------------------------
def small(source: str, seed: int = 0):
    """A tiny pixel model of a source, every parameter drawn."""
    torch.manual_seed(seed)
    if source == "zimage":
        return tiny_transformer()
    kind = model_class(source)
    known = inspect.signature(kind.__init__).parameters
    config = {name: value for name, value in (SIZES | LATENT[source][1]).items() if name in known}
    model = kind(**config, head_width=0.05).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def texts(model, *lengths: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(length, model.text_width, generator=random) for length in lengths]


@pytest.mark.parametrize("cfg_batch", (True, False))
@pytest.mark.parametrize("source", ("zimage", *SOURCES))
@torch.no_grad()
def test_steps_by_graphs_are_the_plain_steps(source, cfg_batch, captures, caplog):
    """Every step, of several prompts of different lengths, with guidance and without, both ways of running it."""
    model = small(source)
    caps, negative = texts(model, 20, 50), texts(model, 7, 40)
    times = torch.linspace(0, 0.9, 5)
    plain, graphed = (Predictor(model, caps, negative, (64, 32), times, cfg_batch, by) for by in (False, True))
    pixels = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(2))
    for step, guided in ((0, True), (1, True), (2, True), (3, False), (4, False), (3, True)):
        wanted, found = plain(pixels, step, guided), graphed(pixels, step, guided)
        for a, b in zip(wanted, found, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), step
        pixels = pixels * 0.9 + 0.1 * wanted[0]
    assert not caplog.records and captures
    assert not torch.equal(*plain(pixels, 1)) and not torch.equal(plain(pixels, 1)[0], plain(pixels, 2)[0])


@pytest.mark.parametrize("name", ("int8", "fp8", "nf4"))
@torch.no_grad()
def test_rounded_weights_by_graphs(name, captures, caplog):
    model = wide_transformer().bfloat16()
    quantize_blocks(model, name)
    caps = [cap.bfloat16() for cap in texts(model, 20)]
    plain, graphed = (Predictor(model, caps, [], (32, 32), torch.linspace(0, 0.9, 4), True, by) for by in (False, True))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    for step in range(4):
        assert torch.equal(plain(pixels, step)[0], graphed(pixels, step)[0])
    assert len(captures) == 1 and not caplog.records


@torch.no_grad()
def test_out_of_memory_gives_the_graphs_back(captures, monkeypatch):
    model = small("zimage")
    given = model, texts(model, 20), texts(model, 7), (64, 32), torch.linspace(0, 0.9, 6)
    plain, graphed = (Predictor(*given, cuda_graph=by) for by in (False, True))
    pixels = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(2))
    for step in range(3):
        graphed(pixels, step)
    forward, left = model.forward, [torch.OutOfMemoryError("CUDA out of memory")]
    monkeypatch.setattr(model, "forward", lambda *args, **more: forward(*args, **more) if not left else fail(left))
    for step, guided in ((3, False), (4, True), (5, True), (5, True)):
        found, wanted = graphed(pixels, step, guided), plain(pixels, step, guided)
        assert torch.equal(found[0], wanted[0]) and not left and model.head.memory_mb == 64
    assert len(captures) == 2


def fail(errors: list[Exception]) -> None:
    raise errors.pop()


def test_a_pipeline_by_graphs_draws_the_same(captures):
    """Over two stages of different sizes, with prompts that a callback changes."""
    pipe = tiny_pipeline(coarse_size=2, coarse_strength=0.95)

    def draw(interval=None, **how):
        def changed(pipe, step, t, tensors):
            return {"prompt_embeds": [1.5 * embeds for embeds in tensors["prompt_embeds"]]} if step == 5 else {}

        return pipe(
            "a red star", height=64, width=64, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
            guidance_interval=interval,
            generator=torch.Generator().manual_seed(0), callback_on_step_end=changed,
            callback_on_step_end_tensor_inputs=["prompt_embeds"], **how,
        ).images  # fmt: skip

    assert torch.equal(draw(cuda_graph=True), draw())
    assert len(captures) == 2
    assert torch.equal(draw((0.8, 1), cuda_graph=True), draw((0.8, 1)))
    assert len(captures) == 5  # small with guidance and without, and large, of which one step has none


def test_without_a_gpu_the_steps_run_as_ever_and_that_is_said(caplog):
    pipe = tiny_pipeline()
    how = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    with caplog.at_level(logging.WARNING):
        images = [pipe("a red star", generator=torch.Generator().manual_seed(0), cuda_graph=graph, **how).images
                  for graph in (True, False)]  # fmt: skip
    assert torch.equal(*images)
    said = [record.message for record in caplog.records if record.name.startswith("l2p_fast")]
    assert said == ["no CUDA graph is used: there are none on cpu"]


# --- What a step must not do -----------------------------------------------------------------------------------------
class Strict(TorchDispatchMode):
    """Meta is the GPU: nothing waits for it, nothing comes from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITING, func
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), func
        return out


@pytest.mark.parametrize("source", ("zimage", *SOURCES))
@torch.no_grad()
def test_a_prepared_step_neither_waits_nor_copies_from_the_host(source, monkeypatch):
    monkeypatch.setattr(unet, "fused_levels", lambda device, dtype: True)  # the head's kernels, as on CUDA
    model = small(source).to("meta")
    pixels, times = torch.empty(2, 3, 64, 32, device="meta"), torch.empty(4, device="meta")
    cond = model.prepare([x.to("meta") for x in texts(model, 20, 50)], 64, 32, timesteps=times)
    assert cond.head.kernels is not None
    model(pixels, times[0].expand(2), cond=cond, step=0)
    with Strict():
        out = model(pixels, times[1].expand(2), cond=cond, step=1)
        assert euler_step_(pixels, out, -0.1).shape == pixels.shape


@torch.no_grad()
def test_a_settled_head_is_settled_anew_when_it_no_longer_holds(monkeypatch):
    model = small("zimage")
    cond = model.prepare(texts(model, 20), 32, 32, timesteps=torch.linspace(0, 0.9, 4))
    pixels, again = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)), []
    settle = model.head.settle
    monkeypatch.setattr(model.head, "settle", lambda *args: (again.append(args), settle(*args))[1])

    def run():
        again.clear()
        out = model(pixels, None, cond=cond, step=1)
        return out, len(again)

    before, count = run()
    assert count == 0
    model.head.memory_mb = 1.0
    assert run()[1] == 1
    model.head.memory_mb = None
    model.head.out_conv.weight.mul_(2)
    after, count = run()
    assert count == (1 if fused_levels(pixels.device, pixels.dtype) else 0) and not torch.equal(after, before)
    with torch.enable_grad():
        assert run()[1] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("source", ("zimage", *SOURCES))
@torch.no_grad()
def test_on_a_gpu(source, caplog):
    model = small(source).to("cuda", torch.bfloat16)
    caps = [cap.to("cuda", torch.bfloat16) for cap in texts(model, 20, 50)]
    plain, graphed = (Predictor(model, caps, [], (64, 32), torch.linspace(0, 0.9, 5), True, by) for by in (False, True))
    pixels = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(2)).cuda()
    for step in range(5):
        torch.testing.assert_close(graphed(pixels, step)[0], plain(pixels, step)[0])
    assert not caplog.records
