"""`python -m l2p_fast.info` tells the truth on this machine, with the extension and without."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from l2p_fast import __version__, info, ops
from l2p_fast.models.attention import BACKENDS


def said(**environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "l2p_fast.info"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    ).stdout


def test_names_versions_extension_and_backends():
    text = said()
    assert f"l2p_fast {__version__}" in text and f"torch {torch.__version__.split('+')[0]}" in text
    assert ops.extension_status() in text
    for architecture in ops.build_info().get("cuda_architectures", []):
        assert architecture in text
    for name in BACKENDS:
        assert f"  {name}: " in text
    assert "_native_flash: available; packs ragged batches on a GPU" in text


def test_without_the_extension():
    assert "switched off by L2P_EXTENSION=0; plain PyTorch paths are used" in said(L2P_EXTENSION="0")


def test_missing_packages_come_with_their_remedy(monkeypatch):
    monkeypatch.setattr(info, "version_of", lambda package: None)
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    text = "\n".join(info.report())
    assert "torch MISSING: pip install torch" in text
    assert "xformers: not installed; --attention xformers: pip install xformers" in text
    assert "flash: missing; pip install flash-attn" in text
    assert "native: available" in text


def test_no_build_report(monkeypatch):
    monkeypatch.setattr(ops, "build_info", dict)
    assert any("to build the kernels" in line for line in info.extension_lines())
