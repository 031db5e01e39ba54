"""``python -m l2p_fast.convert init | merge | export | export-lora``: make checkpoints out of checkpoints.

Everything is checked by names and shapes before the first byte is written, then streamed tensor by tensor: memory stays
small whatever the model's size. Torch is loaded only for the writing.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Parser, UserError, few, option_names, run_cli
from .formats.checkpoint import Checkpoint
from .formats.initial import initial
from .formats.names import LAYOUTS
from .formats.quantized import EXPORTS
from .sampling.facts import check_text_encoder, find_model
from .training.merging import LORA_LAYOUTS, lora_pieces, merged_pieces, open_trained
from .variants import OF_PATCH, VARIANTS

if TYPE_CHECKING:
    import torch

    from .formats.write import Piece

DTYPES = ("keep", "bfloat16", "float16", "float32")

_EPILOG = """examples:
  python -m l2p_fast.convert init Z-Image-Turbo/ --res 1k --out init-1k.safetensors
  python -m l2p_fast.convert init l2p-4k.safetensors --res 8k --out init-8k.safetensors
  python -m l2p_fast.convert merge trained.safetensors --base init-1k.safetensors --out model.safetensors
  python -m l2p_fast.convert export model.safetensors --layout comfyui --out model-comfy.safetensors
  python -m l2p_fast.convert export-lora lora.safetensors --base model.safetensors --out lora-comfy.safetensors
"""


def _line(word: str, keys: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    parameters = sum(math.prod(shapes[key]) for key in keys)
    return f"  {word:<9}{len(keys):>5} tensors {parameters:>15,} parameters" + (f"  {few(keys)}" if keys else "")


def _parameters(shapes: Mapping[str, tuple[int, ...]], keys: Iterable[str]) -> int:
    return sum(math.prod(shapes[key]) for key in keys)


def _prepare_out(
    out: str, overwrite: bool, *sources: Checkpoint, suffix: str = ".safetensors", option: str = "--out"
) -> Path:
    path = Path(out)
    if path.suffix != suffix:
        raise UserError(f"{option} must end in {suffix}, got {out}; try {path.with_suffix(suffix)}")
    if path.is_dir():
        raise UserError(f"{option} {out} is a folder; give a file name in it")
    read = {where.file.resolve() for source in sources for where in source.tensors.values()}
    if path.resolve() in read:
        raise UserError(f"{option} {out} is one of the files read; give another name")
    if path.exists() and not overwrite:
        raise UserError(f"{option} {out} exists; give another name, or --overwrite")
    return path


def _dtype(name: str) -> torch.dtype | None:
    import torch

    return None if name == "keep" else getattr(torch, name)


def _write(args: argparse.Namespace, path: Path, pieces: Mapping[str, Piece], config: Mapping) -> None:
    from .formats.write import write_pieces

    layout, prefix = getattr(args, "layout", "published"), getattr(args, "prefix", "")
    size = write_pieces(pieces, path, layout, prefix, config)
    dtypes = sorted({str(piece.dtype).removeprefix("torch.") for piece in pieces.values()})
    print(f"wrote {path} ({size / 1e9:.2f} GB, {' and '.join(dtypes)}, {layout} layout)")


def init(args: argparse.Namespace) -> None:
    """Pixel initialization: copy what matches by name and shape, draw the patch embedding and the head."""
    patch = args.patch_size or VARIANTS[args.res].patch_size
    made = initial(Checkpoint(args.source), patch, args.head_width)
    source, wanted = made.source, made.wanted
    path = _prepare_out(args.out, args.overwrite, source)
    _write(args, path, made.pieces(args.seed, _dtype(args.dtype)), source.config)
    print(f"init: patch {patch} pixel model from {source.path}, seed {args.seed}")
    for word, sizes in (("copied", wanted), ("new", wanted), ("skipped", source.shapes)):
        print(_line(word, getattr(made, word), sizes))
    print(f"  total {_parameters(wanted, wanted):,} parameters")


def merge(args: argparse.Namespace) -> None:
    """A trained delta or a LoRA over its base."""
    base = Checkpoint(args.base)
    wanted = base.layout.shapes(base.l2p_config())
    trained = open_trained(args.delta, args.ema, wanted)
    path = _prepare_out(args.out, args.overwrite, trained.source, base)
    pieces = merged_pieces(base, trained, wanted, args.scale, _dtype(args.dtype))
    _write(args, path, pieces, base.config | trained.source.config)
    changed = trained.changed(wanted)
    print(f"merge: {trained.source.path} over {base.path}")
    print(_line("new", trained.whole, wanted))
    if changed:
        print(_line("changed", changed, wanted))
    print(_line("copied", [key for key in wanted if key not in {*trained.whole, *changed}], wanted))
    print(f"  skipped  {len(trained.whole):>5} tensors of the base, overwritten")
    print(f"  total {_parameters(wanted, wanted):,} parameters")


def export_lora(args: argparse.Namespace) -> None:
    """A LoRA in another program's names."""
    base = Checkpoint(args.base)
    trained = open_trained(args.source, args.ema, base.layout.shapes(base.l2p_config()))
    path = _prepare_out(args.out, args.overwrite, trained.source)
    pieces = lora_pieces(base, trained, args.layout, _dtype(args.dtype))
    _write(argparse.Namespace(), path, pieces, {})
    print(f"export-lora: {trained.source.path}, {len(trained.changes)} layers, in {args.layout}'s names")


def export(args: argparse.Namespace) -> None:
    """The same weights in another layout, or in fewer bits; quantized ones are dequantized."""
    layout = args.layout or ("comfyui" if args.quantize else "published")
    if args.prefix and layout != "comfyui":
        raise UserError("--prefix goes with --layout comfyui; the published layout has none")
    if args.quantize and layout != "comfyui":
        raise UserError(f"--quantize {args.quantize} is written in --layout comfyui; leave --layout out")
    if args.sheet is None and (args.prompt or args.text_encoder or args.res):
        raise UserError("--prompt, --text-encoder and --res go with --sheet FILE")
    if args.sheet and not (args.quantize and args.prompt):
        raise UserError("--sheet compares what --quantize changes, for each --prompt; give both")
    if not re.fullmatch(r"([A-Za-z0-9_]+\.)*", args.prefix):
        raise UserError(f"--prefix must be names that each end in a dot (model.diffusion_model.), got {args.prefix}")
    source = Checkpoint(args.source)
    wanted = source.layout.shapes(source.l2p_config())
    if layout != "published" and not source.layout.other_names:
        what = f"--quantize {args.quantize}" if args.quantize else "--layout"
        raise UserError(f"{source.path}: {source.layout.source.title} has no {layout} layout; leave {what} out")
    path = _prepare_out(args.out, args.overwrite, source, suffix=EXPORTS.get(args.quantize, ".safetensors"))
    if args.sheet:
        _prepare_out(args.sheet, args.overwrite, source, suffix=".png", option="--sheet")
        check_text_encoder(args.text_encoder, find_model(args.source))
    from .formats.write import Piece

    dtype = _dtype("bfloat16" if args.quantize and args.dtype == "keep" else args.dtype)
    pieces = {key: Piece.of_checkpoint(source, key, dtype) for key in wanted}
    if args.quantize:
        from .sampling.rounding import compare, write_rounded

        print(write_rounded(source, pieces, path, args.quantize, args.prefix))
        for line in compare(source, path, args.sheet, args.prompt, args.text_encoder, args.res):
            print(line)
        return
    args.layout = layout
    _write(args, path, pieces, source.config)
    quantized = sum(where.quantized for where in source.tensors.values())
    print(f"export: {source.path}")
    print(_line("copied", list(wanted), wanted))
    print(f"  new          0 tensors\n  skipped      0 tensors\n  dequantized {quantized} of them")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m l2p_fast.convert",
        description="Make checkpoints out of checkpoints: .safetensors files, folders of shards, diffusers folders.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = Parser(add_help=False)
    common.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write, atomically")
    words = "cast every tensor to this; keep: each tensor's own, bfloat16 for quantized ones (default)"
    common.add_argument("--dtype", choices=DTYPES, default="keep", help=words)
    common.add_argument("--overwrite", action="store_true", help="replace --out if it exists")

    sub = commands.add_parser(
        "init",
        parents=[common],
        help="a latent model (or an L2P of another size) -> the start of a pixel model",
        description="Copy every tensor whose name and shape match, and draw the patch embedding and the head anew: "
        "uniform in +-1/sqrt(fan_in), PyTorch's default, each tensor from a generator seeded by its name and --seed. "
        "From an L2P checkpoint the parts of its head that fit are kept too. The result is meant to be trained.",
    )
    sub.add_argument("source", help="the folder or file of a source model (Z-Image, FLUX, ...), or an L2P checkpoint")
    size = sub.add_mutually_exclusive_group(required=True)
    size.add_argument("--res", choices=VARIANTS, help="what the model is for; patch 16, 64, 128 or 160")
    size.add_argument("--patch-size", type=int, choices=sorted(OF_PATCH), help="the same, named by the patch")
    sub.add_argument("--seed", type=int, default=0, help="of the new tensors (default: 0)")
    words = "multiplier of the head's channels (default: the source's, else 1)"
    sub.add_argument("--head-width", type=float, metavar="X", help=words)
    sub.set_defaults(run=init)

    sub = commands.add_parser(
        "merge",
        parents=[common],
        help="a training output (only the trained tensors) or a LoRA + its base -> a whole checkpoint",
        description="Overwrite the base's tensors with the trained ones of the same name, and add what a LoRA changes. "
        "A trained tensor that the base doesn't have, or has in another shape, is an error.",
    )
    sub.add_argument("delta", help="trained tensors or a LoRA: a .safetensors file or folder; a training's checkpoint")
    sub.add_argument("--scale", type=float, default=1.0, help="strength of a LoRA (default: 1)")
    sub.add_argument("--ema", action="store_true", help="take the averaged weights of the training's checkpoint")
    sub.add_argument("--base", required=True, help="the checkpoint that training started from")
    sub.set_defaults(run=merge)

    sub = commands.add_parser(
        "export",
        parents=[common],
        help="any L2P checkpoint -> the published layout or ComfyUI's, or fewer bits",
        description="Write the same weights in another layout, bit for bit (quantized ones dequantized), or with "
        "--quantize the blocks' weights in fewer bits under ComfyUI's names, the rest in bfloat16; that says how far "
        "one prediction is off then.",
    )
    sub.add_argument("source", help="an L2P checkpoint: file or folder, any layout")
    sub.add_argument("--layout", choices=LAYOUTS, help="comfyui: fused qkv, short names (default: published)")
    words = "before every name of the comfyui layout, such as model.diffusion_model. (default: none)"
    sub.add_argument("--prefix", default="", help=words)
    sub.add_argument("--quantize", choices=EXPORTS, help="q8_0, q4_k: a .gguf file; the others: .safetensors")
    sub.add_argument("--sheet", metavar="PNG", help="draw each --prompt before and after, side by side")
    sub.add_argument("--prompt", action="append", help="of the sheet; may be given several times")
    sub.add_argument("--text-encoder", help="of the sheet, where SOURCE is no pipeline folder; see sample")
    sub.add_argument("--res", type=int, help="height and width of the sheet's images (default: the model's own)")
    sub.set_defaults(run=export)

    words = "a LoRA -> ComfyUI's names, ai-toolkit's or diffusers'"
    sub = commands.add_parser("export-lora", parents=[common], help=words)
    sub.add_argument("source", help="a LoRA of any layout, or a checkpoint of a training")
    sub.add_argument("--ema", action="store_true", help="take the averaged weights of the training's checkpoint")
    sub.add_argument("--base", required=True, help="the model it is for; only its header is read")
    sub.add_argument("--layout", choices=LORA_LAYOUTS, default="comfyui", help="comfyui: fused qkv, short names")
    sub.set_defaults(run=export_lora)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0; `UserError` for the user's mistakes."""
    args = build_parser().parse_args(argv)
    if getattr(args, "head_width", None) is not None and not 0 < args.head_width < 16:
        raise UserError(f"--head-width must lie between 0 and 16, got {args.head_width}; the published head is 1.0")
    with option_names():
        args.run(args)
    return 0


if __name__ == "__main__":
    run_cli(main)
