"""Pictures from prompts on the command line: ``python -m l2p_fast.sample "a red star" --res 1024 --out star.png``.

Everything that can be wrong with the arguments is checked before torch or diffusers is imported, so a mistake is
answered at once. Pictures are made one at a time, each with its own seed, so a picture is the same alone or among many,
and its file holds what repeats it (``--from-image``). Left out: serving, and batches over several devices.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import random
import re
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import UserError, run_cli
from .files import atomic_path
from .models import attention
from .variants import NATIVE_TOKENS, OF_PATCH, nearest_sizes

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from .sampling.pipeline import L2PPipeline

WEIGHTS = Path(__file__).parent / "weights"  # the bundled pipeline folders
BUNDLED = {"tiny-1k": 16, "tiny-4k": 64}  # name -> patch size
LARGE = 2048  # from this side on the bundled 4k model is the default
SETTINGS_KEY = "l2p_fast"  # of the picture's text that holds all settings
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp"}
SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
LARGEST_SIDE = {"webp": 16383, "jpg": 65535}
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"} | {
    name: name for name in ("auto", "bfloat16", "float32", "float16")
}
# What a picture remembers and --from-image gives back, with the type it must have.
REMEMBERED: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative": str,
    "seed": int,
    "height": int,
    "width": int,
    "steps": int,
    "guidance": (int, float),
    "shift": (int, float),
    "model": str,
    "text_encoder": str,
    "dtype": str,
    "device": str,
    "attention": str,
    "quantize": str,
    "compile": bool,
    "offload": str,
    "head_memory_mb": (int, float),
    "cfg_batch": str,
    "coarse_size": int,
    "coarse_strength": (int, float),
    "image": str,
    "strength": (int, float),
}


@dataclass(frozen=True)
class ModelFacts:
    """What can be told of a model without loading it."""

    name: str  # as the user would name it again
    path: Path
    is_pipeline: bool
    patch_size: int | None  # None: not told by the file's header; loading will complain if it must

    @property
    def size_multiple(self) -> int | None:
        """What sides must be multiples of, in pixels: the patch, but 320 for patch 160, whose head halves six times."""
        return OF_PATCH[self.patch_size].size_multiple if self.patch_size in OF_PATCH else self.patch_size


@dataclass(frozen=True)
class Job:
    """One picture to make."""

    prompt: str
    seed: int
    path: Path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The options. All default to None, so that what was given can be told from what was not."""
    parser = _Parser(
        prog="python -m l2p_fast.sample", description="Draw pictures of prompts.", allow_abbrev=False, add_help=True
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add(
        "--model",
        help="file, folder or pipeline folder; tiny-1k or tiny-4k: bundled (default: by the size)",
    )
    add("--text-encoder", help="folder or hub id with text_encoder/ and tokenizer/, such as Tongyi-MAI/Z-Image-Turbo")
    add("--res", type=int, help="height and width in pixels (default: the model's own)")
    add("--height", type=int, help="in pixels")
    add("--width", type=int, help="in pixels")
    add("--steps", type=int, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale; 1 switches it off (default: the model's)")
    add("--shift", type=float, help="shift of the noise schedule (default: the model's, 3)")
    add("--negative", help='prompt to steer away from (default: "")')
    add("--num-images", type=int, help="pictures of each prompt, with seeds counting up (default: 1)")
    add("--seed", type=int, help="of the first picture (default: a random one, printed and kept in the picture)")
    add("--prompts-file", help="one prompt a line; finished pictures are skipped, so an interrupted run goes on")
    add("--image", help="start from this picture")
    add("--strength", type=float, help="how much of --image to replace, above 0 and at most 1 (default: 0.6)")
    add("--coarse-size", type=int, help="tokens a side of the coarse start; 0: none (default: the model's)")
    add("--coarse-strength", type=float, help="noise level at which full size takes over (default: the model's)")
    add("--dtype", help="bf16, fp32, fp16 or auto: the checkpoint's own (default)")
    add("--device", help="cpu, cuda, cuda:1, mps, xpu or auto: a GPU if there is one (default)")
    add("--attention", help="a diffusers attention backend such as native, flash, sage or xformers (default: auto)")
    add("--quantize", help="none, fp8 or int8: the blocks' weights and products in 8 bits (default: none)")
    add("--compile", action="store_true", default=None, help="torch.compile the transformer's blocks")
    add("--offload", help="none, model or sequential: keep what is not at work in host memory (default: none)")
    add("--head-memory-mb", type=float, help="working memory of the Detailer Head (default: 256)")
    add("--cfg-batch", help="on, off or auto: both halves of guidance as one batch (default: auto)")
    add("--format", help="png, jpg or webp (default: by --out, else png)")
    add("--out", help="file, or folder when there are several pictures")
    add("--from-image", help="repeat this picture, pixel for pixel; options given beside it override")
    add("--no-progress", action="store_true", help="no progress bar")
    return parser


def choose(option: str, value: str, valid: Any) -> str:
    """``value`` if it is among ``valid``; else a UserError that names the nearest."""
    if value in valid:
        return value
    near = difflib.get_close_matches(value, list(valid), 1, 0.4)
    hint = f"try {near[0]}" if near else f"choose from {', '.join(valid)}"
    raise UserError(f"{option}: unknown value {value!r}; {hint}")


def check_numbers(args: argparse.Namespace) -> None:
    """Ranges of all plain numbers."""
    whole = {"res": 1, "height": 1, "width": 1, "steps": 1, "num_images": 1, "seed": 0, "coarse_size": 0}
    for name, least in whole.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}; try {least}")
    if args.seed is not None and args.seed >= 2**63:
        raise UserError(f"--seed must be below 2^63, got {args.seed}; try {args.seed % 2**63}")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        raise UserError(f"--guidance must be at least 0 (1: none), got {args.guidance}; try 1")
    for name, usual in (("shift", 3), ("head_memory_mb", 256)):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}; try {usual}")
    for name in ("strength", "coarse_strength"):
        value = getattr(args, name)
        if value is not None and not 0 < value <= 1:
            near = 1 if value > 1 else 0.1
            raise UserError(f"--{name.replace('_', '-')} must be above 0 and at most 1, got {value}; try {near}")


def check_words(args: argparse.Namespace) -> None:
    """Names: dtype, device, attention backend with its package, offload, format; sets the defaults of these."""
    args.dtype = DTYPES[choose("--dtype", args.dtype or "auto", DTYPES)]
    args.device = args.device or "auto"
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", args.device):
        raise UserError(f"--device must be auto, cpu, cuda, cuda:N, mps or xpu, got {args.device!r}; try auto")
    args.quantize = choose("--quantize", args.quantize or "none", ("none", "fp8", "int8"))
    args.attention = choose("--attention", args.attention or "auto", attention.BACKENDS)
    attention.check(args.attention, biased=False)
    args.offload = choose("--offload", args.offload or "none", ("none", "model", "sequential"))
    if args.offload != "none" and args.device == "cpu":
        raise UserError(f"--offload {args.offload} needs a GPU; leave it out with --device cpu")
    args.cfg_batch = choose("--cfg-batch", args.cfg_batch or "auto", ("auto", "on", "off"))
    if args.format is not None:
        args.format = {"jpeg": "jpg"}.get(args.format.lower(), args.format.lower())
        choose("--format", args.format, FORMATS)


def read_settings(path: str) -> dict[str, Any]:
    """The settings that `save_picture` left in a picture.

    Raises:
        UserError: no such file, no picture, or none of ours.
    """
    image = open_picture("--from-image", path)
    text = image.info.get(SETTINGS_KEY) or image.getexif().get(0x010E)
    try:
        settings = json.loads(text)
        wrong = [k for k, v in settings.items() if k in REMEMBERED and not isinstance(v, (REMEMBERED[k], type(None)))]
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"--from-image: {path} holds no settings of l2p_fast; give a picture that it wrote") from None
    if wrong:
        raise UserError(f"--from-image: the settings in {path} are damaged ({wrong[0]} = {settings[wrong[0]]!r})")
    return settings


def recall(args: argparse.Namespace) -> None:
    """Fill what was not given from the picture of ``--from-image``."""
    settings = read_settings(args.from_image)
    if args.res is not None or args.image is not None:
        settings = {k: v for k, v in settings.items() if k not in ("height", "width")}
    if args.image is not None:
        settings.pop("image_sha256", None)
    for name in REMEMBERED:
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name))
    args.recalled_device = settings.get("device")
    digest = settings.get("image_sha256")
    if digest and Path(args.image).is_file() and file_digest(args.image) != digest:
        raise UserError(f"--from-image: {args.image} has changed since; give the old one with --image")
    if settings.get("version") != __version__:
        made_by = settings.get("version")
        print(f"note: made by l2p_fast {made_by}, this is {__version__}; pixels may differ", file=sys.stderr)


def file_digest(path: str) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def open_picture(option: str, path: str) -> Image:
    """Open a picture's header; a UserError when it is missing or none."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # a 10K picture is ordinary here
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise UserError(f"{option}: {path} does not exist{near_path(path)}") from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise UserError(f"{option}: {path} is not a readable picture ({type(error).__name__})") from error


def near_path(path: str) -> str:
    """``; did you mean ...?`` for a path that does not exist, or nothing."""
    wanted = Path(path)
    try:
        near = difflib.get_close_matches(wanted.name, os.listdir(wanted.parent), 1)
    except OSError:
        near = []
    return f"; did you mean {wanted.parent / near[0]}?" if near else ""


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line, blank lines left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts-file: {path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--prompts-file: can't read {path}: {error.strerror}{near_path(path)}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file: {path} is empty; write one prompt a line")
    return prompts


def find_model(name: str | None, size: int | None = None) -> ModelFacts:
    """The model that ``--model`` names.

    Args:
        name: a path, "tiny-1k" or "tiny-4k" for a bundled model, or None: the bundled one for ``size``.
        size: the longer side in pixels.

    Raises:
        UserError: nothing there.
    """
    bundled = name if name in BUNDLED else ("tiny-4k" if (size or 0) >= LARGE else "tiny-1k") if name is None else None
    if bundled is not None and not (bundled == name and Path(bundled).exists()):
        path = WEIGHTS / bundled
        if not (path / "model_index.json").is_file():
            raise UserError(f"the bundled model {bundled} is not installed ({path}); name a checkpoint with --model")
        return ModelFacts(bundled, path, True, patch_size_of(path) or BUNDLED[bundled])
    path = Path(name)
    if not path.exists():
        hint = near_path(name) or "; give a checkpoint file or folder, or leave --model out for the bundled model"
        raise UserError(f"--model: {name} does not exist{hint}")
    is_pipeline = (path / "model_index.json").is_file()
    return ModelFacts(name, path, is_pipeline, patch_size_of(path))


def patch_size_of(path: Path) -> int | None:
    """Patch size of a checkpoint from its config.json or its safetensors headers; None when neither tells."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    try:
        if (folder / "config.json").is_file():
            return int(json.loads((folder / "config.json").read_text())["all_patch_size"][0])
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [path]
        for file in files:
            with open(file, "rb") as stream:
                length = struct.unpack("<Q", stream.read(8))[0]
                header = json.loads(stream.read(min(length, 100_000_000)))
            for key, entry in header.items():
                if "x_embedder" in key and key.endswith(".weight"):
                    patch = math.isqrt(entry["shape"][1] // 3)
                    return patch if 3 * patch * patch == entry["shape"][1] else None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        pass  # the loader looks again and says what is wrong with the file
    return None


def check_text_encoder(args: argparse.Namespace, model: ModelFacts) -> None:
    """The text encoder is in the pipeline folder, in a folder of its own, or has a hub id's form."""
    name = args.text_encoder
    if name is None:
        if not (model.is_pipeline and (model.path / "text_encoder").is_dir()):
            raise UserError(
                f"--model {model.name} holds no text encoder; add --text-encoder FOLDER (with text_encoder/ and "
                "tokenizer/ in it), or --text-encoder Tongyi-MAI/Z-Image-Turbo to download 8 GB from the hub"
            )
        return
    if os.path.isdir(name):
        for part in ("text_encoder", "tokenizer"):
            if not os.path.isdir(os.path.join(name, part)):
                raise UserError(f"--text-encoder: {name} has no folder {part}; give the folder that holds both")
    elif not re.fullmatch(r"[\w-]+/[\w.-]+", name):
        raise UserError(f"--text-encoder: {name} is neither a folder nor a hub id{near_path(name)}")


def choose_size(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """(height, width) asked for, from --res, --height/--width or --image; None where nothing asks."""
    if args.res is not None and (args.height or args.width):
        raise UserError("give --res or --height and --width, not both")
    if args.image is not None:
        from PIL import ImageOps

        image = open_picture("--image", args.image)
        try:
            args.picture = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"--image: {args.image} is not a readable picture ({error})") from error
    elif args.strength is not None:
        raise UserError("--strength has no effect without --image; add one, or leave it out")
    if args.res is not None:
        return args.res, args.res
    if args.height is None and args.width is None and args.image is not None:
        return None, None
    return args.height or args.width, args.width or args.height


def settle_size(args: argparse.Namespace, model: ModelFacts, height: int | None, width: int | None) -> None:
    """Set args.height and args.width, checked against the model's patch where it is known."""
    multiple = model.size_multiple
    if height is None:
        if args.image is not None:
            unit = multiple or 64
            width, height = (max(unit, round(side / unit) * unit) for side in args.picture.size)
        else:
            height = width = NATIVE_TOKENS * (model.patch_size or 16)
    for name, value in (("height", height), ("width", width)):
        if multiple and value % multiple:
            option = "--res" if args.res is not None else f"--{name}"
            raise UserError(
                f"{option} must be a multiple of {multiple} for this checkpoint, got {value}; "
                f"try {nearest_sizes(value, multiple)}"
            )
    args.height, args.width = height, width


def slug(prompt: str) -> str:
    """A file name's worth of a prompt."""
    return re.sub(r"\W+", "-", prompt.lower())[:40].strip("-_") or "picture"


def plan_jobs(args: argparse.Namespace, prompts: list[str]) -> list[Job]:
    """The pictures to make and where: names from index and prompt in a folder when there are several.

    Raises:
        UserError: a place that can't be written, a format that can't hold the picture.
    """
    several = args.prompts_file is not None or args.num_images > 1
    out = Path(args.out) if args.out is not None else None
    suffix = out.suffix.lower() if out is not None and not out.is_dir() else ""
    if several and suffix in SUFFIXES:
        raise UserError(f"--out must be a folder for several pictures, got {out}; try {out.with_suffix('')}")
    if several and out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out must be a folder for several pictures, and {out} is a file; name another")
    single = not several and out is not None and not out.is_dir()
    if single:
        if suffix not in SUFFIXES and (suffix or args.format is None):
            near = out.with_suffix(FORMATS[args.format or "png"])
            raise UserError(f"--out: can't tell a picture format from {out.name!r}; try {near}")
        if suffix and args.format is not None and SUFFIXES[suffix] != args.format:
            near = out.with_suffix(FORMATS[args.format])
            raise UserError(f"--out {out} does not fit --format {args.format}; try {near}")
    args.format = args.format or SUFFIXES.get(suffix, "png")
    limit = LARGEST_SIDE.get(args.format)
    if limit and max(args.height, args.width) > limit:
        raise UserError(f"--format {args.format} holds at most {limit} pixels a side; try --format png")

    extension = FORMATS[args.format]
    jobs = []
    if single:
        jobs.append(Job(prompts[0], args.seed, out if suffix else out.with_suffix(extension)))
    elif not several:
        jobs.append(Job(prompts[0], args.seed, (out or Path()) / f"{slug(prompts[0])}-{args.seed}{extension}"))
    else:
        folder = out or Path(slug(Path(args.prompts_file).stem if args.prompts_file else prompts[0]))
        for i, prompt in enumerate(prompts):
            for k in range(args.num_images):
                tail = f"-{k}" if args.num_images > 1 else ""
                name = f"{i:04d}-{slug(prompt)}{tail}{extension}"
                jobs.append(Job(prompt, args.seed + i * args.num_images + k, folder / name))
    check_writable(jobs[0].path)
    return jobs


def check_writable(path: Path) -> None:
    """The nearest folder above ``path`` that exists can be written, and ``path`` is no folder."""
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--out: can't write {path}, {folder} is not a folder; choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out: can't write {path}, no permission in {folder}; choose another folder")
    if path.is_dir():
        raise UserError(f"--out: {path} is a folder; choose another name")


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the first GPU, or the CPU.

    Raises:
        UserError: a device that is absent.
    """
    import torch

    def present(kind: str, index: int) -> bool:
        if kind == "mps":
            return torch.backends.mps.is_available()
        module = getattr(torch, kind, None)
        return kind == "cpu" or (module is not None and module.is_available() and index < module.device_count())

    recalled = getattr(args, "recalled_device", None) == args.device
    if args.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = torch.device(args.device)
        if not present(device.type, device.index or 0):
            if not recalled:
                raise UserError(f"--device {args.device}: torch {torch.__version__} sees none; try --device cpu")
            print(f"note: {args.device} is absent; pixels may differ on another device", file=sys.stderr)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {args.offload} needs a GPU, and torch sees none; leave it out")
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The dtype to load in (None: as the checkpoint is) and why, as words for the header."""
    import torch

    from .ops import cpu_has_fast_bf16

    if name != "auto":
        return getattr(torch, name), ""
    if device.type == "cpu" and not cpu_has_fast_bf16():
        return torch.float32, " (this CPU has no fast bfloat16)"
    return None, ""


def pick_attention(args: argparse.Namespace, pipe: L2PPipeline) -> str:
    """Settle ``args.attention`` for the model and the size of the pictures, and say why, as words for the header."""
    import torch

    config, patch = pipe.transformer.config, pipe.patch_size
    biased = config.rope_grid is not None
    tokens = (args.height // patch) * (args.width // patch) + attention.TEXT_TOKENS
    shape = 1, tokens, config.n_heads, config.dim // config.n_heads
    given = shape, pipe.transformer.dtype, torch.device(args.device), biased
    why = ""
    if args.attention == "auto":
        args.attention, words = attention.fastest(*given)
        why = f" ({words})"
    else:
        attention.check(args.attention, biased)
    return f"{args.attention}{why}; {attention.ragged(args.attention, *given)}"


def load(args: argparse.Namespace, model: ModelFacts) -> L2PPipeline:
    """Load the pipeline, place it, and print what runs."""
    device = pick_device(args)
    dtype, why = pick_dtype(args.dtype, device)

    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    from .ops import extension_status
    from .sampling.pipeline import load_pipeline

    pipe = load_pipeline(model.path, args.text_encoder, dtype)
    pipe.set_progress_bar_config(disable=args.no_progress or not sys.stderr.isatty())
    if args.head_memory_mb is not None:
        pipe.transformer.local_decoder.memory_mb = args.head_memory_mb
    args.device, args.dtype = str(device), str(pipe.transformer.dtype).removeprefix("torch.")
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    if args.quantize != "none":
        from .quantize.products import quantize

        if args.offload == "none":
            pipe.transformer.to(device)
        error = quantize(pipe.transformer, args.quantize)
        why += f", blocks in {args.quantize} ({error:.1%} off in one prediction)"
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    size = f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"model      {model.name} (patch {pipe.patch_size}, {size} parameters)")
    print(f"device     {device} ({where}), {args.dtype}{why}")
    print(f"extension  {extension_status()}")
    return pipe


def settings_of(args: argparse.Namespace, pipe: L2PPipeline, job: Job, model: ModelFacts) -> dict[str, Any]:
    """All that repeats a picture, by the names of `REMEMBERED`, and versions."""
    import torch

    batched = {True: "on", False: "off", None: args.cfg_batch}[pipe.cfg_batched]
    settings = {name: getattr(args, name) for name in REMEMBERED}
    settings |= {
        "prompt": job.prompt,
        "seed": job.seed,
        "model": model.name,
        "cfg_batch": batched,
        "head_memory_mb": pipe.transformer.local_decoder.memory_mb,
        "version": __version__,
        "torch": torch.__version__,
    }
    if args.image is not None:
        settings["image_sha256"] = file_digest(args.image)
    return settings


def save_picture(image: Image, path: Path, format: str, settings: dict[str, Any]) -> None:
    """Write a picture whole or not at all, with its settings in the PNG's text or in the EXIF description."""
    text = json.dumps(settings)
    if format == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key in ("prompt", "negative", "seed"):
            info.add_itxt(key, str(settings[key]))
        info.add_text("Software", f"l2p_fast {__version__}")
        info.add_text(SETTINGS_KEY, text)
        options = {"format": "PNG", "pnginfo": info, "compress_level": 3}  # 6, the default, takes twice as long
    else:
        exif = image.getexif()
        exif[0x010E], exif[0x0131] = text, f"l2p_fast {__version__}"  # ImageDescription, Software
        options = {"format": "JPEG" if format == "jpg" else "WEBP", "quality": 95, "exif": exif}
    with atomic_path(path) as temporary:
        image.save(temporary, **options)


def peak_memory(device: str) -> str:
    """Peak memory so far, as words: of the CUDA allocator, else of the process."""
    if device.startswith("cuda"):
        import torch

        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB (CUDA allocator)"
    try:
        import resource
    except ImportError:  # Windows
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB (process)"


class StepTimer:
    """A pipeline callback that notes when each step of each stage ended."""

    def __init__(self):
        self.start, self.ends = time.perf_counter(), {}

    def __call__(self, pipe: L2PPipeline, step: int, t: torch.Tensor, tensors: dict) -> dict:
        if tensors["latents"].is_cuda:
            import torch

            torch.cuda.synchronize(tensors["latents"].device)
        self.ends.setdefault(pipe.stage, []).append(time.perf_counter())
        return {}

    def __str__(self) -> str:
        """``0.41 s a step``, by stage when there are two. The first step of each, which prepares, counts only alone."""
        parts, before = [], self.start
        for stage, ends in self.ends.items():
            seconds = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else ends[0] - before
            parts.append((f"{stage} " if len(self.ends) > 1 else "") + f"{seconds:.3g} s a step x {len(ends)}")
            before = ends[-1]
        return ", ".join(parts)


def draw(pipe: L2PPipeline, args: argparse.Namespace, model: ModelFacts, job: Job) -> None:
    """Make one picture, write it and print a line about it."""
    import torch

    start, timer = time.perf_counter(), StepTimer()
    try:
        image = pipe(
            job.prompt,
            negative_prompt=args.negative,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            shift=args.shift,
            generator=torch.Generator().manual_seed(job.seed),
            cfg_batch={"on": True, "off": False}.get(args.cfg_batch, "auto"),
            coarse_size=args.coarse_size,
            coarse_strength=args.coarse_strength,
            callback_on_step_end=timer,
            **({} if args.image is None else {"image": args.picture, "strength": args.strength}),
        ).images[0]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{args.device} has too little memory for {args.width}x{args.height}; try --offload model or a smaller size"
        ) from error
    save_picture(image, job.path, args.format, settings_of(args, pipe, job, model))
    seconds = time.perf_counter() - start
    print(f"{job.path}  {args.width}x{args.height}  seed {job.seed}  {timer}  {seconds:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's).

    Returns:
        0.

    Raises:
        UserError: a wrong argument or file; `run_cli` turns it into one line and exit code 2.
    """
    args = build_parser().parse_args(argv)
    if args.prompt is not None and args.prompts_file is not None:
        raise UserError("give a prompt or --prompts-file, not both")
    if args.from_image is not None:
        recall(args)
    check_numbers(args)
    check_words(args)
    prompts = read_prompts(args.prompts_file) if args.prompts_file is not None else [args.prompt]
    if prompts == [None]:
        raise UserError('what to draw? give a prompt, as in "a red star above two blue circles", or --prompts-file')
    if not all(prompt.strip() for prompt in prompts):
        raise UserError('the prompt is empty; say what to draw, as in "a red star above two blue circles"')
    args.num_images = args.num_images or 1
    args.negative = args.negative or ""
    args.seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    height, width = choose_size(args)
    if args.image is not None and args.strength is None:
        args.strength = 0.6
    longest = max(height, width) if height else max(args.picture.size) if args.image is not None else None
    model = find_model(args.model, longest)
    check_text_encoder(args, model)
    settle_size(args, model, height, width)
    jobs = plan_jobs(args, prompts)
    if args.prompts_file is not None:
        waiting = [job for job in jobs if not job.path.exists()]
        if len(waiting) < len(jobs):
            print(f"{len(jobs) - len(waiting)} of {len(jobs)} pictures are finished and skipped")
        jobs = waiting
    if not jobs:
        return 0

    pipe = load(args, model)
    args.steps = pipe.default_steps if args.steps is None else args.steps
    args.guidance = pipe.default_guidance_scale if args.guidance is None else args.guidance
    args.shift = pipe.scheduler.config.shift if args.shift is None else args.shift
    print(f"attention  {pick_attention(args, pipe)}", flush=True)
    with attention.use(args.attention):
        for job in jobs:
            draw(pipe, args, model, job)
    print(f"peak memory {peak_memory(args.device)}")
    return 0


if __name__ == "__main__":
    sys.modules.setdefault("bitsandbytes", None)  # diffusers would import it, a second, for what nothing here uses
    run_cli(main)
