"""patchify and unpatchify at 4096 px against PyTorch's permute + copy + cast: `pytest benchmarks/test_patchify.py`.

``extra_info``: bytes moved (each value read once and written once), their rate as a share of the measured copy
bandwidth, and the time as a ratio to the eager version's. Every call allocates its result, on both sides.
"""

from __future__ import annotations

import pytest
import torch

from l2p_fast import ops

from .conftest import seconds

SIDE = 4096


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("patch", (64, 16))
@pytest.mark.parametrize("direction", ("patchify", "unpatchify"))
def test_patchify(direction, patch, dtype, device, timed, copy_bandwidth, benchmark):
    cells = SIDE // patch
    pixels = torch.randn(1, 3, SIDE, SIDE, device=device)
    tokens = ops.patchify_reference(pixels, patch, dtype)

    def patchify_eager():
        grid = pixels.reshape(1, 3, cells, patch, cells, patch).permute(0, 2, 4, 3, 5, 1).contiguous()
        return grid.reshape(1, cells * cells, -1).to(dtype)

    def unpatchify_eager():
        grid = tokens.reshape(1, cells, cells, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).contiguous()
        return grid.reshape(1, 3, SIDE, SIDE).to(torch.float32)

    if direction == "patchify":
        eager, ours = patchify_eager, lambda: ops.patchify(pixels, patch, dtype)
    else:
        eager, ours = unpatchify_eager, lambda: ops.unpatchify(tokens, patch, SIDE, SIDE, torch.float32)
    assert torch.equal(ours(), eager())

    moved = pixels.nbytes + tokens.nbytes
    eager_time = seconds(eager, device)
    median = timed(ours, bytes=moved, eager_ms=eager_time * 1e3)
    benchmark.extra_info["ratio_to_eager"] = median / eager_time
    benchmark.extra_info["share_of_copy_bandwidth"] = moved / median / copy_bandwidth(device)
