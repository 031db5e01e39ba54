"""What is installed, how the extension was built and what could be added: ``python -m l2p_fast.info``.

For a person with a question and for a bug report. Looks only: it loads no model and starts nothing on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

from . import __version__
from .errors import Parser, run_cli
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
    "openai": "l2p data: pip install l2p_fast[data]",
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


def main() -> None:
    Parser(prog="python -m l2p_fast.info", description=__doc__.split("\n")[0]).parse_args()
    for line in report():
        print(line)


if __name__ == "__main__":
    run_cli(main)
