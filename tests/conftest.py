"""``L2P_CPU=avx2 python -m pytest`` runs the tests as a CPU without AVX-512 would, in PyTorch's libraries too."""

import os
import sys

if os.environ.get("L2P_CPU") == "avx2":
    assert "torch" not in sys.modules, "PyTorch reads these once, as it starts"
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
