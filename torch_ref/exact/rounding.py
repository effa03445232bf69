"""The rounding of exact training, and the operations of float32 that are made of it.

Between operations everything is float32, without subnormals and without -0. An operation computes
in float64 and rounds once, so that `a + b`, `a - b`, `a b`, `a / b` and the square root are the
correctly rounded float32: 53 bits are at least 2 * 24 + 2, and rounding twice does no harm.
"""

import torch
from torch import Tensor

from .arithmetic import flush, nearest32

Number = Tensor | float


def R(x: Tensor) -> Tensor:  # noqa: N802
    """The float32 nearest to a float64, half to even; +0 where it is below 2^-126.

    By integer operations on the bits. PyTorch's own conversion would give the same numbers; a
    compiler may remove a conversion to float32 and back, but not these.
    """
    bits = x.view(torch.int64)
    rounded = bits + 0x0FFFFFFF + (bits >> 29 & 1) & ~0x1FFFFFFF
    is_number = bits >> 52 & 0x7FF != 0x7FF
    nearest = torch.where(is_number, rounded, bits).view(torch.float64).float()
    return torch.where(x.abs() < 2.0**-126, 0.0, nearest)


def add(a: Number, b: Number) -> Tensor:
    """`R(a + b)` of float32 tensors; a Python float stands for the nearest float32."""
    return R(_wide(a) + _wide(b))


def subtract(a: Number, b: Number) -> Tensor:
    """`R(a - b)`, with the arguments of `add`."""
    return R(_wide(a) - _wide(b))


def multiply(a: Number, b: Number) -> Tensor:
    """`R(a b)`, with the arguments of `add`."""
    return R(_wide(a) * _wide(b))


def divide(a: Number, b: Number) -> Tensor:
    """`R(a / b)`, with the arguments of `add`."""
    return R(_wide(a) / _wide(b))


def square_root(x: Tensor) -> Tensor:
    """`R(sqrt(x))` of a float32 tensor, at least 0."""
    return R(torch.sqrt(flush(x)))


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Output of a layer: a float32 tensor as it is, or its nearest bfloat16, half to even.

    Raises:
      ValueError: another dtype.
    """
    if dtype == torch.float32:
        return x
    if dtype != torch.bfloat16:
        raise ValueError(
            f"activations must be float32 or bfloat16, got {dtype}. Write torch.bfloat16."
        )
    bits = x.view(torch.int32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).to(torch.int16).view(torch.bfloat16)


def _wide(x: Number) -> Tensor:
    """x in float64, with subnormals and -0 as +0; a Python number is rounded to float32 first."""
    return flush(x) if isinstance(x, Tensor) else torch.tensor(nearest32(x), dtype=torch.float64)
