"""``L2P_CPU=avx2 python -m pytest`` runs the tests as a CPU without AVX-512 would, in PyTorch's libraries too."""

import os
import sys

import pytest

if os.environ.get("L2P_CPU") == "avx2":
    assert "torch" not in sys.modules, "PyTorch reads these once, as it starts"
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """The sample command in an empty folder, with the test module's own ``model``."""
    from l2p_fast import sample

    monkeypatch.chdir(tmp_path)

    def run(*argv, model=model):
        return sample.main([*map(str, argv), *(["--model", str(model)] if model else [])])

    return run
