"""Where the reference tensors of the authors' code lie. Tests that use them skip where there are none."""

import os
from pathlib import Path

GOLDENS = Path(os.environ.get("L2P_GOLDENS") or Path(__file__).resolve().parents[2] / "shared" / "goldens")
