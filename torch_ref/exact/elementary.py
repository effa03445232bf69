"""Logarithm and reciprocal square root, each the nearest float32 of a float32.

`exp` is that of the attention, in `torch_ref/exact/arithmetic.py`.
"""

import torch
from torch import Tensor

from .arithmetic import flush
from .rounding import R

# The one float32 in (1, 2^21] whose logarithm is nearer to the middle of two float32 than half a
# unit of float64, 0.19 of one: rounded from the float64 of PyTorch, NumPy and libm it is too large.
HARD_ARGUMENT = float.fromhex("0x1.2f1fd6p+3")
ITS_LOGARITHM = float.fromhex("0x1.1fcbcep+1")


def log(x: Tensor) -> Tensor:
    """The float32 nearest to the natural logarithm, for `1 <= x <= 2^21`."""
    x = flush(x)
    return torch.where(x == HARD_ARGUMENT, ITS_LOGARITHM, R(torch.log(x)))


def rsqrt(x: Tensor) -> Tensor:
    """The float32 nearest to `x^(-1/2)`, for `x >= 2^-126`: two roundings of float64, then one.

    Over all mantissas the nearest approach to the middle of two float32 is 1.41 units of float64.
    """
    return R(1 / torch.sqrt(flush(x)))
