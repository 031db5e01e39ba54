"""setup.py: a failed build is heard of, with ninja and without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("ninja", (True, False))
def test_a_failed_build(tmp_path, ninja):
    pytest.importorskip("setuptools")
    if ninja and shutil.which("ninja") is None:
        pytest.skip("no ninja")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "l2p_fast").mkdir()
    shutil.copy(ROOT / "l2p_fast/__init__.py", tmp_path / "l2p_fast")
    (tmp_path / "csrc").mkdir()
    for name in ("patchify.cpp", "build_info.cpp"):
        (tmp_path / "csrc" / name).write_text("no C++\n")
    (tmp_path / "pybind11.py").write_text("def get_include(): return '.'\n")  # it may be where pip builds alone
    tools = tmp_path / "tools"
    tools.mkdir()
    for folder in map(Path, ("/usr/bin", "/bin", Path(shutil.which("ninja") or sys.executable).parent)):
        for tool in folder.iterdir():
            if not (tools / tool.name).is_symlink() and tool.name not in ("nvcc", *([] if ninja else ["ninja"])):
                (tools / tool.name).symlink_to(tool)

    def build(mode: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = {
            **os.environ,
            "PATH": str(tools),
            "L2P_BUILD": mode,
            "PYTHONPATH": "",
            "CUDA_HOME": str(tmp_path),
        }
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert build("require").returncode != 0
    if ninja:
        return
    done = build("auto")
    assert done.returncode == 0, done.stderr
    assert "the build failed" in (tmp_path / "l2p_fast/_not_built.txt").read_text()
