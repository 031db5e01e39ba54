"""Weights of fewer bits: for sampling, multiplied in 8 bits (products.py); for training, frozen, in 8 or 4 (frozen.py).

Both go by a model's ``blocks()`` and replace linear layers by modules that keep their weight in a form of their own:
``weight_in(dtype)`` gives its values.
"""

from .frozen import FrozenLinear, linear_bytes, quantize_frozen
from .products import LowBitLinear, quantize, weight_error

__all__ = ["FrozenLinear", "LowBitLinear", "linear_bytes", "quantize", "quantize_frozen", "weight_error"]
