"""A checkpoint written in fewer bits, and how far it is off what it was made of: one prediction, and images."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..formats.checkpoint import Checkpoint
from ..formats.gguf_writer import write_gguf
from ..formats.header import Stored
from ..formats.values import fill, read_tensor
from ..formats.write import Piece, kept_in_metadata, write_named
from ..loading import build_empty
from ..ops import Linear, linear
from ..quantize.export import PACKINGS, rounded_keys, rounded_pieces
from ..quantize.products import probe
from .drawing import save_image
from .request import Request, Setup
from .session import Session


class _FileLinear(nn.Module):
    """A bias-free linear layer whose weight is read from its file for each product, so that it is nowhere kept."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, read_tensor(self.stored, x.dtype, x.device))


def prediction(checkpoint: Checkpoint) -> Tensor:
    """The prediction of `quantize.products.probe`, in fp32 on the CPU; one weight of a block is in memory at a time."""
    model, tensors = build_empty(checkpoint.l2p_config(), checkpoint.layout.source.name), dict(checkpoint.tensors)
    for name, block in model.blocks():
        for path, layer in list(block.named_modules()):
            if type(layer) in (nn.Linear, Linear) and layer.bias is None:
                block.set_submodule(path, _FileLinear(tensors.pop(f"{name}.{path}.weight")))
    fill(model, tensors, torch.float32, "cpu")
    return probe(model.eval())


def prediction_error(rounded: str | Path, source: Checkpoint) -> float:
    """How far the prediction of the file ``rounded`` is off that of ``source``, relative to its norm."""
    wanted = prediction(source)
    return float((prediction(Checkpoint(rounded)) - wanted).norm() / wanted.norm())


def write_rounded(source: Checkpoint, pieces: Mapping[str, Piece], path: Path, form: str, prefix: str = "") -> str:
    """Write ``pieces``, all of ``source`` by our keys, in ``form``, one of `formats.quantized.EXPORTS`. Returns a line.

    Raises:
        UserError: no weight whose sizes fit; see `formats.write.write_pieces`.
    """
    model = build_empty(source.l2p_config(), source.layout.source.name)
    named = rounded_pieces(pieces, rounded_keys(model), form, prefix)
    metadata = kept_in_metadata(source.config)
    if form in PACKINGS:
        size = write_gguf(named, path, metadata, source.layout.source.name)
    else:
        size = write_named(named, path, metadata)
    return f"wrote {path} ({size / 1e9:.2f} GB, blocks in {form}, comfyui layout)"


def compare(
    source: Checkpoint, path: Path, sheet: str | None, prompts: Sequence[str], encoder: str | None, side: int | None
) -> Iterator[str]:
    """Lines on what ``path`` changes against ``source``: one prediction and, with ``sheet`` (a file to write), images.

    Args:
        prompts: of the images, which both files draw from the same noise in the same steps, without a coarse start: a
            row a prompt, ``source`` on the left.
        encoder: text encoder of the images; None: that of the pipeline folder that ``source`` is.
        side: height and width of the images; None: the model's own.

    Raises:
        UserError: as `Session`.
    """
    yield f"one prediction is {100 * prediction_error(path, source):.3g}% off"
    if sheet is None:
        return
    requests = [Request(prompt, seed=0, height=side, width=side, coarse_size=0) for prompt in prompts]
    columns = []
    folder = str(source.path) if encoder is None else encoder
    for model, text_encoder in ((source.path, encoder), (path, folder)):
        session = Session.load(Setup(str(model), text_encoder), side)
        session.pipeline.set_progress_bar_config(disable=True)
        requests = [session.fill(request) for request in requests]  # the first model's steps and guidance, for both
        columns.append([session.draw(request).image for request in requests])
        del session
        gc.collect()
    width, height = columns[0][0].size
    both = Image.new("RGB", (2 * width, len(prompts) * height))
    for row, (prompt, *images) in enumerate(zip(prompts, *columns, strict=True)):
        for column, image in enumerate(images):
            both.paste(image, (column * width, row * height))
        before, after = (np.asarray(image, dtype=np.float32) for image in images)
        yield f"{np.abs(after - before).mean():.2f} of 255 off: {prompt}"
    save_image(both, Path(sheet), "png", {})
    yield f"wrote {sheet}"
