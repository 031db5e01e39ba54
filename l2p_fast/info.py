"""What is installed, how the extension was built and what could be added: ``python -m l2p_fast.info``.

For a person with a question and for a bug report. With a checkpoint: what it is, by its header. Looks only: it loads no
model and starts nothing on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

from . import __version__
from .errors import Parser, UserError, run_cli
from .formats.checkpoint import Checkpoint
from .models import attention
from .sampling.facts import BUNDLED, WEIGHTS

REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow")
# Package -> what it adds and how to get it.
OPTIONAL = {
    "bitsandbytes": "8-bit optimizers and weights: pip install bitsandbytes",
    "torchao": "fp8 and int8 weights: pip install torchao",
    "flash-attn": "--attention flash: pip install flash-attn --no-build-isolation (compiles for hours)",
    "xformers": "--attention xformers: pip install xformers",
    "kernels": "--attention flash_hub and the like: pip install kernels",
    "gguf": "GGUF files: pip install l2p_fast[gguf]",
    "openai": "l2p data: pip install l2p_fast[data]",
    "ray": "l2p data images --engine ray: pip install l2p_fast[ray]",
    "tensorboard": "training curves: pip install tensorboard",
}


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_lines() -> Iterator[str]:
    import torch

    yield f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        yield "CUDA: this PyTorch was built without it"
    elif not torch.cuda.is_available():
        yield f"CUDA: PyTorch has {torch.version.cuda}, but no usable GPU was found"
    else:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            yield f"CUDA {torch.version.cuda}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"


def extension_lines() -> Iterator[str]:
    from .ops import build_info, extension_status

    yield extension_status()
    built = build_info()
    if not built:
        yield "no build report; to build the kernels: pip install -v . (needs g++; for CUDA kernels nvcc, no GPU)"
        return
    yield f"built with {built['compiler']}, PyTorch {built['torch']} (stable ABI {built['torch_abi']})"
    yield f"flags: {built['flags']}"
    if built["cuda"] is None:
        yield "CUDA: none (nvcc was not found or not wanted when it was built)"
    else:
        yield f"CUDA: {built['cuda']} for {' '.join(built['cuda_architectures'])}"
    yield f"this processor: {' '.join(built['cpu_capabilities']) or 'no known extensions'}"


def weight_lines() -> Iterator[str]:
    for name in BUNDLED:
        yield f"{name}: {'bundled' if (WEIGHTS / name / 'model_index.json').exists() else 'not in this installation'}"


def report() -> Iterator[str]:
    yield f"l2p_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    sections = {
        "packages": (f"{name} {version_of(name) or 'MISSING: pip install ' + name}" for name in REQUIRED),
        "optional": (
            f"{name} {version_of(name)}" if version_of(name) else f"{name}: not installed; {adds}"
            for name, adds in OPTIONAL.items()
        ),
        "devices": device_lines(),
        "extension": extension_lines(),
        "attention backends (--attention NAME; _native_cudnn and other packages need a GPU)": attention.lines(),
        "models": weight_lines(),
    }
    for title, lines in sections.items():
        yield f"\n{title}"
        yield from (f"  {line}" for line in lines)


SHOWN = 200  # characters of a text that a file holds


def describe(path: str) -> Iterator[str]:
    """What a checkpoint is, from names, shapes and metadata alone.

    Raises:
        UserError: it is none, or damaged.
    """
    found = Checkpoint(path)
    kind, tensors = found.kind(), found.tensors.values()
    files = {where.file for where in tensors}
    size = sum(file.stat().st_size for file in files)
    words = {
        "l2p": "L2P model",
        "latent": "latent model",
        "delta": "training output",
        "lora": "LoRA",
        "other": "unknown",
    }
    title = "" if kind in ("lora", "other") else f" of {found.layout.source.title}"
    yield f"{path}: {words[kind]}{title}, {size / 1e9:.2f} GB in {len(files)} file{'s' * (len(files) > 1)}"
    counts: dict[str, list[int]] = {}
    for where in tensors:
        count = counts.setdefault(where.dtype + (", rotated" if where.rotation else ""), [0, 0, 0])
        for i, more in enumerate((1, where.numel, where.nbytes)):
            count[i] += more
    for dtype, (number, values, held) in sorted(counts.items(), key=lambda item: -item[1][2]):
        yield f"  {dtype:<16}{number:>6} tensors {values:>15,} values {held / 1e9:>8.2f} GB"
    if kind in ("l2p", "latent"):
        try:
            config = found.model_config()
            yield "  " + ", ".join(f"{name} {value}" for name, value in config.items())
        except UserError as error:
            yield f"  {error}"
    for name, text in found.metadata.items():
        yield f"  {name[:SHOWN]!r}: {text[:SHOWN]!r}{'...' * (len(text) > SHOWN)}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m l2p_fast.info", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="tell of this file or folder instead")
    path = parser.parse_args(argv).checkpoint
    for line in report() if path is None else describe(path):
        print(line)


if __name__ == "__main__":
    run_cli(main)
