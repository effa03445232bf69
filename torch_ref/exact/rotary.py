"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) by angles that are integers.

A frequency is a whole number of 2^-64 turns a token, so that the angle of a position is a product
of integers modulo 2^64, and no position is less accurate than another.
"""

import decimal
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import check_finite, flush
from .rounding import R, narrow

# 100 digits, of which 80 are used.
PI = decimal.Decimal(
    "3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825342117068"
)
ANGLE_BITS = 24


def frequencies(channels: int, theta: int | float) -> list[int]:
    """`floor(theta^(-2i / R) / 2 pi * 2^64)` for i below R / 2, by decimals of 80 digits.

    Raises:
      ValueError: a theta below 1, or infinite in float32.
    """
    check_finite("theta", theta, 10_000, least=1)
    with decimal.localcontext(prec=80):
        powers = [
            decimal.Decimal(theta) ** (decimal.Decimal(-2 * i) / channels)
            for i in range(channels // 2)
        ]
        return [int(power / (2 * PI) * 2**64) for power in powers]


def rotary_tables(positions: Tensor, channels: int, theta: int | float) -> tuple[Tensor, Tensor]:
    """The cosines and sines of `position * theta^(-2i / R)`.

    Args:
      positions: integers, any shape.
      channels: R, even, how many channels are turned.
      theta: the base, 10000 in most models.

    Returns:
      float32 `[..., R / 2]` each: of the angle rounded to 24 bits of a turn, half up.
    """
    of_channel = torch.tensor(frequencies(channels, theta), device=positions.device)
    # int64 wraps, as 2^64 is a whole turn.
    turns = positions.long()[..., None] * of_channel
    shift = 64 - ANGLE_BITS
    return cos_and_sin(turns + (1 << shift - 1) >> shift & (1 << ANGLE_BITS) - 1)


def cos_and_sin(angle: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 nearest to cosine and sine of `angle` 2^-24 turns, for integers below 2^24.

    The angle is a number of quarter turns and at most an eighth more, or less; of that cosine and
    sine are never nearer to the middle of two float32 than 129 units of float64.
    """
    quarter = 1 << ANGLE_BITS - 2
    quarters = angle + quarter // 2 >> ANGLE_BITS - 2
    rest = (angle - quarters * quarter).double() * (2 * math.pi * 2.0**-ANGLE_BITS)
    cos, sin = R(torch.cos(rest)), R(torch.sin(rest))
    quarters = quarters % 4
    is_odd = quarters % 2 == 1
    first, second = torch.where(is_odd, sin, cos), torch.where(is_odd, cos, sin)
    # 0 minus, so that no zero is -0.
    return (
        torch.where((quarters == 1) | (quarters == 2), 0 - first, first),
        torch.where(quarters >= 2, 0 - second, second),
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`a' = R(a cos - b sin)` and `b' = R(b cos + a sin)` of channels paired across two halves.

    Channel i is a and channel `i + R / 2` is b, for i below R / 2; the channels from R on stay.
    Backward: the same with -sin.

    Args:
      x: `[..., H]`, float32 or bfloat16.
      cos, sin: float32, broadcastable to `[..., R / 2]`.

    Returns:
      `[..., H]`, of the dtype of x. Differentiable once.
    """
    return _Rotary.apply(x, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _turned(dy, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = flush(x).split((half, half, x.shape[-1] - 2 * half), -1)
    cos, sin = flush(cos), flush(sin)
    turned = (R(a * cos - b * sin), R(b * cos + a * sin), R(rest))
    return narrow(torch.cat(turned, -1), x.dtype)
