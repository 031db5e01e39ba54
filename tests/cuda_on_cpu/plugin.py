"""A pytest plugin: the run has the library named by L2P_CUDA_ON_CPU in place of the extension.

Memory that a kernel leaves unwritten is not a number.
"""

from __future__ import annotations

import os

import torch

os.environ["L2P_EXTENSION"] = "0"
from l2p_fast import ops  # noqa: E402

del os.environ["L2P_EXTENSION"]
torch.ops.load_library(os.environ["L2P_CUDA_ON_CPU"])
ops._load_extension = lambda: None
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
