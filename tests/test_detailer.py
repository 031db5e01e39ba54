"""The Detailer Head: its tables, and that whole, banded and plain forward are one function."""

import pytest
import torch

from l2p_fast.errors import UserError
from l2p_fast.models.detailer import DetailerHead, bands, unet
from l2p_fast.models.detailer.bands import Rows
from l2p_fast.models.detailer.fused import Inner, Library
from l2p_fast.ops import fused_levels
from l2p_fast.variants import OF_PATCH

WHOLE = 10**6
SIZES = {
    16: (208, 80),
    64: (448, 320),
    128: (384, 512),
    160: (640, 320),
}  # each at least two bands, none a power of two


def head_and_inputs(patch, batch=1, dtype=torch.float32, width=0.25, seed=0):
    torch.manual_seed(seed)
    height, columns = SIZES[patch]
    head = DetailerHead(patch, 24, width).to(dtype)
    pixels = torch.randn(batch, 3, height, columns, dtype=dtype)
    features = torch.randn(batch, 24, height // patch, columns // patch, dtype=dtype)
    return head, pixels, features


def error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("patch,parameters", [(16, 10_085_123), (64, 10_095_299), (128, 10_100_455), (160, 4_659_687)])
def test_published_size(patch, parameters):
    with torch.device("meta"):
        head = DetailerHead(patch, 3840)
    assert sum(p.numel() for p in head.parameters()) == parameters
    assert head.out_conv.weight.shape == (3, 64 if patch == 16 else 16, 1, 1)


def test_size_multiples_and_bad_patch():
    assert [OF_PATCH[p].size_multiple for p in (16, 64, 128, 160)] == [16, 64, 128, 320]
    with pytest.raises(UserError, match="16, 64, 128, 160"):
        DetailerHead(32, 24)


def test_width_scales_all_but_the_ends():
    head = DetailerHead(128, 24, 0.1)
    assert head.enc_8k[0].out_channels == 3 and head.out_conv.out_channels == 3
    inner = [m.out_channels for m in head.modules() if isinstance(m, torch.nn.Conv2d) and m.out_channels != 3]
    assert min(inner) == 4 and all(c % 4 == 0 for c in inner) and max(inner) == 52


@pytest.mark.parametrize("patch", OF_PATCH)
@torch.no_grad()
def test_whole_equals_reference(patch):
    head, pixels, features = head_and_inputs(patch, batch=2)
    plain = head.forward_reference(pixels, features)
    whole = head(pixels, features, band_rows=WHOLE)
    assert whole.shape == pixels.shape and whole.is_contiguous()
    assert error(whole, plain) <= 1e-6


@pytest.mark.parametrize(
    "patch,rows", [(16, 1), (16, 24), (16, 40), (64, 8), (64, 56), (128, 16), (128, 200), (160, 80)]
)
@torch.no_grad()
def test_banded_equals_whole(patch, rows, monkeypatch):
    head, pixels, features = head_and_inputs(patch, batch=2)
    features = features.to(memory_format=torch.channels_last)
    whole = head(pixels, features, band_rows=WHOLE)
    seen = []
    sweep = bands.sweep
    monkeypatch.setattr(bands, "sweep", lambda *args: seen.append(args) or sweep(*args))
    banded = head(pixels, features, band_rows=rows)
    assert len(seen) == 2 and banded.is_contiguous()
    assert error(banded, whole) <= 1e-6
    assert (banded - whole).abs().max() <= 1e-6 * whole.abs().max()  # edges of bands too


@pytest.mark.parametrize("patch,banded,rows", [(16, 3, 24), (64, 1, 50), (64, 5, 96), (160, 5, 32)])
@torch.no_grad()
def test_any_number_of_levels_can_be_banded(patch, banded, rows):
    head, pixels, features = head_and_inputs(patch)
    whole = head(pixels, features, band_rows=WHOLE)
    head.plan = lambda *args: (banded, rows)
    assert error(head(pixels, features), whole) <= 1e-6


@torch.no_grad()
def test_smaller_budgets_take_less():
    head, pixels = DetailerHead(64, 24), torch.empty(1, 3, 4096, 4096, device="meta")
    assert head.plan(pixels, torch.bfloat16, memory_mb=4000) is None
    plans = [head.plan(pixels, torch.bfloat16, memory_mb=mb) for mb in (1000, 400, 256, 100, 1)]
    depths = [banded for banded, _ in plans]
    assert depths == sorted(depths) and depths[0] == 3 and depths[-1] == 5
    for (banded, rows), mb in zip(plans, (1000, 400, 256), strict=False):
        assert bands.band_bytes(head.levels[:banded], rows, 4096, torch.bfloat16) <= mb * 2**20
        assert head.peak_bytes(pixels, torch.bfloat16, memory_mb=mb) >= mb * 2**17
        assert rows % 2**banded == 0


def test_plan_at_published_sizes():
    for patch, size, banded in ((16, 1024, 1), (64, 4096, 3), (128, 8192, 4), (160, 10240, 4)):
        head = DetailerHead(patch, 24)
        pixels = torch.empty(1, 3, size, size, device="meta")
        assert head.plan(pixels, torch.bfloat16, band_rows=256) == (banded, 256)
        assert head.plan(pixels, torch.bfloat16, memory_mb=100_000) is None
        with torch.no_grad():
            depth, rows = head.plan(pixels, torch.bfloat16)
        assert depth >= banded and rows < size
    head.band_rows = 100
    assert head.plan(pixels, torch.bfloat16, head.band_rows) == (4, 112)  # a multiple of 2^4


class OnCuda:
    """What `DetailerHead.plan` asks of pixels."""

    device = torch.device("cuda:0")

    def __init__(self, *shape):
        self.shape = shape


@torch.no_grad()
def test_on_cuda_free_memory_decides(monkeypatch):
    free = {}
    monkeypatch.setattr(unet, "free_cuda_bytes", lambda device: free["bytes"])
    monkeypatch.setenv("L2P_CUDA_HEAD", "0")
    head = DetailerHead(64, 24)
    pixels = OnCuda(1, 3, 4096, 4096)
    needed = bands.whole_bytes(head.levels, (1, 4096, 4096), torch.bfloat16)
    for share, whole in ((1.01, True), (0.99, False)):
        free["bytes"] = share * needed / unet.CUDA_SHARE
        plan = head.plan(pixels, torch.bfloat16)
        assert (plan is None) == whole
    seen = []
    for gb in (4, 2, 1, 0.5):
        free["bytes"] = gb * 1e9
        plan = head.plan(pixels, torch.bfloat16)
        assert bands.band_bytes(head.levels[: plan.levels], plan.rows, 4096, torch.bfloat16) <= gb * 1e9 / 2
        seen.append(plan.rows)
    assert seen == sorted(seen, reverse=True)
    free["bytes"] = 1e12  # then a given budget counts
    assert head.plan(pixels, torch.bfloat16, memory_mb=256) == DetailerHead(64, 24).plan(
        torch.empty(1, 3, 4096, 4096, device="meta"), torch.bfloat16
    )


@pytest.mark.parametrize("batch,side,whole", [(1, 8192, True), (2, 8192, False), (1, 12288, False), (2, 4096, True)])
def test_on_cuda_no_map_has_2_to_the_31_elements(monkeypatch, batch, side, whole):
    monkeypatch.setattr(unet, "free_cuda_bytes", lambda device: 10**12)
    head = DetailerHead(64, 24)
    plan = head.plan(OnCuda(batch, 3, side, side), torch.bfloat16)
    assert (plan is None) == whole
    if plan is not None:
        assert plan.rows == min(plan.rows, side) and plan.rows * side * 16 < 2**31


@pytest.mark.parametrize("patch,rows", [(16, 24), (64, 64), (160, 160)])
def test_backward_through_bands(patch, rows):
    head, pixels, features = head_and_inputs(patch, batch=2, dtype=torch.float64)
    wanted = torch.randn_like(pixels)

    def gradients(**how):
        inputs = [pixels.clone().requires_grad_(), features.clone().requires_grad_()]
        out = head(*inputs, **how)
        return torch.autograd.grad((out * wanted).sum(), [*inputs, *head.parameters()])

    for got, want in zip(gradients(band_rows=rows), gradients(band_rows=WHOLE), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_bands_keep_less_for_backward():
    head, pixels, features = head_and_inputs(64)
    features.requires_grad_()

    def kept(**how):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x, lambda x: x
        ):
            head(pixels, features, **how)
        return sum(sizes.values())

    assert kept(band_rows=64) < 0.3 * kept(band_rows=WHOLE)


@pytest.mark.parametrize("patch", OF_PATCH)
@torch.no_grad()
def test_bf16_error(patch):
    head, pixels, features = head_and_inputs(patch, batch=2, width=0.5)
    exact = head.forward_reference(pixels, features)
    head.bfloat16()
    features = features.bfloat16()
    plain = error(head.forward_reference(pixels, features).float(), exact)
    for rows in (WHOLE, 64):
        out = head(pixels, features, band_rows=rows)  # fp32 pixels are cast band by band
        assert out.dtype == torch.bfloat16 and out.is_contiguous()
        assert error(out.float(), exact) <= 2 * plain


needs_kernels = pytest.mark.skipif(
    not fused_levels(torch.device("cpu"), torch.bfloat16), reason="no kernels for this processor"
)


@needs_kernels
@pytest.mark.parametrize("patch,rows", [(16, 24), (64, 8), (128, 200), (160, 80)])
@torch.no_grad()
def test_fused_bands_equal_whole_exactly(patch, rows):
    """A pixel is summed in the same order whatever the band."""
    head, pixels, features = head_and_inputs(patch, batch=2, dtype=torch.bfloat16)
    assert torch.equal(head(pixels, features, band_rows=rows), head(pixels, features, band_rows=WHOLE))


@pytest.mark.parametrize("patch,first", [(16, 0), (64, 3), (160, 5)])
@torch.no_grad()
def test_inner_levels_are_the_plain_ones(patch, first):
    """Transposed convolutions, sums for concats, biases by place: the same function."""
    head, pixels, features = head_and_inputs(patch, batch=2, dtype=torch.float64)
    plain, inner = Library(head, torch.float64), Inner(head, first, torch.float64)
    for got, wanted in zip(inner.joint[:2], head.bottleneck[0].weight.split([head.levels[-1].enc, 24], 1), strict=True):
        assert torch.equal(got, wanted.flatten(1))
    for k in range(first, len(head.levels)):
        x = torch.randn(2, head.convolutions(k)[0].in_channels, 12, 10, dtype=torch.float64)
        for got, wanted in zip(inner.encode(k, x), plain.encode(k, x, Rows.whole(x), Rows.whole(x)), strict=True):
            assert error(got, wanted) <= 1e-6  # biases are float32
        skip = torch.randn(2, head.levels[k].enc, 12, 10, dtype=torch.float64)
        x = torch.randn(2, head.convolutions(k)[1].in_channels, 6, 5, dtype=torch.float64)
        wanted = plain.decode(k, x, Rows.whole(x), skip, Rows.whole(skip), Rows.whole(skip))
        if k > 0:
            assert error(inner.decode(k, x, skip), wanted) <= 1e-6
    x = torch.randn(2, head.levels[-1].enc, 6, 4, dtype=torch.float64)
    assert error(inner.bottleneck(x, features), plain.bottleneck(x, features)) <= 1e-6


@needs_kernels
@pytest.mark.parametrize("patch", OF_PATCH)
@torch.no_grad()
def test_outer_levels_alone_can_be_fused(patch):
    head, pixels, features = head_and_inputs(patch, dtype=torch.bfloat16, width=0.5)
    fused, plain = head(pixels, features, band_rows=64), head.forward_reference(pixels, features)
    exact = head.float().forward_reference(pixels, features.float())
    head.bfloat16()
    head._fused_count = lambda device, dtype: head.table_banded
    head._kernels = None
    for rows in (64, WHOLE):
        out = head(pixels, features, band_rows=rows).float()
        assert error(out, fused.float()) <= 1e-2
        assert error(out, exact) <= 2 * error(plain.float(), exact)


@needs_kernels
@torch.no_grad()
def test_changed_weights_are_noticed():
    head, pixels, features = head_and_inputs(16, dtype=torch.bfloat16)
    before, kernels = head(pixels, features), head._kernels
    assert torch.equal(head(pixels, features), before) and head._kernels is kernels  # packed once
    changes = {
        "in place": lambda: head.up1[1].weight.mul_(2),
        "through .data": lambda: [p.data.mul_(2) for p in head.parameters()],
        "another tensor": lambda: setattr(head.dec1[0], "weight", torch.nn.Parameter(head.dec1[0].weight / 2)),
        "loaded": lambda: head.load_state_dict({k: v / 2 for k, v in head.state_dict().items()}),
    }
    for name, change in changes.items():
        change()
        after = head(pixels, features)
        assert not torch.equal(after, before), name
        assert error(after.float(), head.forward_reference(pixels, features).float()) <= 2e-2, name
        before = after


@needs_kernels
def test_what_is_no_plain_convolution_is_left_to_the_library():
    class Adapted(torch.nn.Conv2d):
        pass

    head, pixels, features = head_and_inputs(16, dtype=torch.bfloat16)
    with torch.no_grad():
        assert head.kernels(pixels.device, torch.bfloat16) is not None
        head.enc1[0] = Adapted(3, head.levels[0].enc, 3, padding=1).bfloat16()
        assert head.kernels(pixels.device, torch.bfloat16) is None
    assert head.kernels(pixels.device, torch.bfloat16) is None  # nor with gradients


def test_refuses_what_does_not_fit():
    head = DetailerHead(16, 24, 0.1)
    with pytest.raises(UserError, match="multiples of 16"):
        head(torch.zeros(1, 3, 24, 32), torch.zeros(1, 24, 1, 2))
    with pytest.raises(UserError, match=r"\(1, 24, h, w\)"):
        head(torch.zeros(1, 3, 32, 32), torch.zeros(1, 20, 2, 2))


def test_every_pixel_of_the_halo_counts():
    """A picture changed in one row changes the same rows of the result, banded or whole."""
    head, pixels, features = head_and_inputs(16, dtype=torch.float64)
    with torch.no_grad():
        for rows in (WHOLE, 16):
            base = head(pixels, features, band_rows=rows)
            bumped = pixels.clone()
            bumped[:, :, 100] += 1
            moved = (head(bumped, features, band_rows=rows) - base).abs().amax(dim=(0, 1, 3)) > 0
            if rows == WHOLE:
                reach = moved
            assert torch.equal(moved, reach)
    rows = reach.nonzero().flatten()
    assert rows.min() < 100 < rows.max() and (rows - 100).abs().max() <= 47 + 16  # 47 from a tile's edge, tiles of 16
