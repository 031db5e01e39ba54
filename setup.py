"""Builds the compiled kernels; all else is in pyproject.toml.

Two modules: ``l2p_fast._C``, the kernels, against PyTorch's stable ABI (one build loads in every torch >= 2.10 and
every Python), and ``l2p_fast._build``, which tells how that was done. CUDA kernels are built wherever nvcc is found,
GPU or not. Where something is missing the package installs without kernels and says so (`python -m l2p_fast.info`).

``L2P_BUILD``: ``auto`` (default); ``require``: a failed build fails the installation; ``cpu``: no CUDA; ``skip``: no
kernels. ``TORCH_CUDA_ARCH_LIST`` ("8.0;9.0a") and ``MAX_JOBS`` as in PyTorch.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# pip builds in isolation from the environment it installs into, yet with that environment's interpreter.
sys.path += [path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} if path not in sys.path]
try:
    import pybind11
except ImportError:
    pybind11 = None
try:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as build_ext
except ImportError:
    cpp_extension = None
    from setuptools.command.build_ext import build_ext

MODE = os.environ.get("L2P_BUILD", "auto")
if MODE not in ("auto", "require", "cpu", "skip"):
    sys.exit(f"L2P_BUILD must be auto, require, cpu or skip, got {MODE}")

# Fetched to build with only where the target has no PyTorch yet. Any version >= 2.10 makes the same kernels.
TORCH_TO_BUILD_WITH = "torch==2.13.0"
TORCH_ABI = "0x020a000000000000"  # 2.10
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_ABI}"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--threads=2"]


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder, by CUDA_HOME, or by what nvcc (often a wrapper) says of itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = f"{home}/bin" if home else f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=folders)
    if nvcc is None or MODE in ("cpu", "skip"):
        return None
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", said)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def nvcc_says(home: Path, *arguments: str) -> str:
    return subprocess.run([home / "bin/nvcc", *arguments], capture_output=True, text=True, check=True).stdout


def architectures(home: Path) -> tuple[list[str], list[str]]:
    """Names (sm_90a) and nvcc's flags. Of the default list, those that this nvcc knows; of a given one, all."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = nvcc_says(home, "--list-gpu-arch").split()
    names, flags = [], []
    for entry in re.split(r"[;\s]+", given.strip() or ARCHITECTURES):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not given and f"compute_{number.rstrip('af')}" not in known:
            continue
        names.append(f"sm_{number}")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return names, flags


class Build(build_ext):
    """Builds what can be built: with CUDA, else without, else nothing; and leaves a note saying why."""

    def run(self) -> None:
        note = Path(self.get_ext_fullpath("l2p_fast._C")).parent / "_not_built.txt"
        note.unlink(missing_ok=True)
        problem = self.obstacle()
        if problem is None:
            home, fresh = cuda_home(), (self.compiler, self.inplace)  # a failed run leaves both changed
            try:
                self.build(home)
                return
            except (Exception, SystemExit) as error:  # compilers, linkers and setuptools each raise their own
                if MODE == "require":
                    raise
                problem = f"the build failed ({' '.join(str(error).split())[:300]}); for its output: pip install -v"
                if home is not None:
                    print(f"l2p_fast: building with CUDA failed, now without: {error}", file=sys.stderr)
                    self.compiler, self.inplace = fresh
                    try:
                        self.build(None)
                        return
                    except (Exception, SystemExit) as second:
                        problem = f"{problem}; without CUDA: {' '.join(str(second).split())[:300]}"
        if MODE == "require":
            sys.exit(f"l2p_fast: L2P_BUILD=require, but {problem}")
        print(f"l2p_fast: installing without compiled kernels: {problem}", file=sys.stderr)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(problem + "\n")

    def obstacle(self) -> str | None:
        if MODE == "skip":
            return "L2P_BUILD=skip was set"
        if cpp_extension is None:
            return "no PyTorch was there to build with; install torch, then l2p_fast again"
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None and shutil.which("g++") is None:
            return f"no C++ compiler ({compiler}) was found; install g++, then l2p_fast again"
        return None

    def build(self, home: Path | None) -> None:
        import torch

        names, gencode = architectures(home) if home else ([], [])
        cuda_version = re.search(r"release ([\d.]+)", nvcc_says(home, "--version"))[1] if home else ""
        generated = Path(self.build_temp).resolve() / "generated"
        generated.mkdir(parents=True, exist_ok=True)
        facts = {
            "L2P_BUILT_TORCH": torch.__version__,
            "L2P_TORCH_ABI": "2.10",
            "L2P_CXX_FLAGS": " ".join(CXX_FLAGS),
            "L2P_NVCC_FLAGS": " ".join(NVCC_FLAGS + gencode) if home else "",
            "L2P_CUDA_VERSION": cuda_version,
        }
        lines = ["#pragma once"] + [f"#define {name} {json.dumps(value)}" for name, value in facts.items()]
        lines.append("#define L2P_CUDA_ARCHITECTURES {" + ", ".join(map(json.dumps, names)) + "}")
        (generated / "l2p_build_info.h").write_text("\n".join(lines) + "\n")

        kernels, report = self.extensions
        torch_side = cpp_extension.CppExtension("l2p_fast._C", [], py_limited_api=True)
        kernels.sources = sorted(map(str, Path("csrc").glob("*.cpp")))
        kernels.sources.remove("csrc/build_info.cpp")
        kernels.include_dirs = torch_side.include_dirs
        kernels.library_dirs = torch_side.library_dirs
        kernels.libraries = torch_side.libraries
        # libtorch must be among the needed libraries, though only weak symbols come from it: checks.h.
        kernels.extra_link_args = ["-Wl,--no-as-needed", "-ltorch"]
        kernels.define_macros = []
        kernels.extra_compile_args = {"cxx": list(CXX_FLAGS), "nvcc": NVCC_FLAGS + gencode}
        if home:
            # A CPU build of PyTorch sets this to None, although nvcc needs no GPU.
            cpp_extension.CUDA_HOME = str(home)
            kernels.sources += sorted(map(str, Path("csrc").glob("*.cu")))
            kernels.define_macros = [("L2P_WITH_CUDA", None)]
            # Static, so that the same file loads where there is no CUDA runtime.
            libraries = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            kernels.extra_link_args += [f"-L{home}/lib64", f"-L{home}/lib", *libraries]
        report.sources = ["csrc/build_info.cpp"]
        # PyTorch brings pybind11's headers along, for builds without isolation where the package is missing.
        report.include_dirs = [str(generated), *([pybind11.get_include()] if pybind11 else torch_side.include_dirs)]
        report.extra_compile_args = {"cxx": ["-O1", "-g0", "-std=c++17", "-fvisibility=hidden"]}
        # Without ninja, setuptools itself would go on after what failed to compile, were it optional here.
        kernels.optional = report.optional = False
        try:
            super().run()
        finally:
            kernels.optional = report.optional = True


wants_torch = cpp_extension is None and MODE != "skip" and shutil.which("c++") is not None
setup(
    # Optional: setuptools then does not miss the files where nothing was built. Build.build fills in the rest.
    ext_modules=[
        Extension("l2p_fast._C", ["csrc/patchify.cpp"], py_limited_api=True, optional=True, language="c++"),
        Extension("l2p_fast._build", ["csrc/build_info.cpp"], optional=True, language="c++"),
    ],
    cmdclass={"build_ext": Build},
    setup_requires=[TORCH_TO_BUILD_WITH] if wants_torch else [],
)
