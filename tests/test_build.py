"""setup.py: a failed build is heard of, with ninja and without; a build needs no package beside PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Project:
    """A copy of what setup.py reads, with ``sources`` for C++; ``tools`` are the only programs it finds."""

    def __init__(self, folder: Path, sources: dict[str, str], pybind11: str, without: tuple[str, ...]):
        pytest.importorskip("setuptools")
        self.folder, self.tools = folder, folder / "tools"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        for name in ("l2p_fast", "csrc", "tools"):
            (folder / name).mkdir()
        shutil.copy(ROOT / "l2p_fast/__init__.py", folder / "l2p_fast")
        for name, text in sources.items():
            (folder / "csrc" / name).write_text(text)
        (folder / "pybind11.py").write_text(pybind11)
        for place in map(Path, ("/usr/bin", "/bin", Path(shutil.which("ninja") or sys.executable).parent)):
            for tool in place.iterdir():
                if not (self.tools / tool.name).is_symlink() and tool.name not in ("nvcc", *without):
                    (self.tools / tool.name).symlink_to(tool)

    def build(self, mode: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = os.environ | {
            "PATH": str(self.tools),
            "L2P_BUILD": mode,
            "PYTHONPATH": "",
            "CUDA_HOME": str(self.folder),
        }
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("ninja", (True, False))
def test_a_failed_build(tmp_path, ninja):
    if ninja and shutil.which("ninja") is None:
        pytest.skip("no ninja")
    sources = dict.fromkeys(("patchify.cpp", "build_info.cpp"), "no C++\n")
    project = Project(tmp_path, sources, "def get_include(): return '.'\n", () if ninja else ("ninja",))
    assert project.build("require").returncode != 0
    if ninja:
        return
    done = project.build("auto")
    assert done.returncode == 0, done.stderr
    assert "the build failed" in (tmp_path / "l2p_fast/_not_built.txt").read_text()


def test_pytorch_brings_pybind11(tmp_path):
    """Without the package, as where gpu.sh builds outside pip."""
    sources = {"patchify.cpp": "\n", "build_info.cpp": (ROOT / "csrc/build_info.cpp").read_text()}
    done = Project(tmp_path, sources, "raise ImportError('blocked')\n", ()).build("require")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "l2p_fast").glob("_build.*"))
