"""Weights of fewer bits: for sampling, rounded (products.py) or as a file has them (stored.py); for training, frozen.

All go by a model's ``blocks()`` and replace linear layers by modules that keep their weight in a form of their own:
``weight_in(dtype)`` gives its values.
"""

from .coded import CodedLinear
from .frozen import FrozenLinear, linear_bytes, quantize_frozen
from .products import LowBitLinear, quantize, weight_error

__all__ = ["CodedLinear", "FrozenLinear", "LowBitLinear", "linear_bytes", "quantize", "quantize_frozen", "weight_error"]
