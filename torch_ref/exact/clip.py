"""Gradients clipped by their global norm."""

import torch
from torch import Tensor

from .arithmetic import nearest32
from .rounding import divide, multiply, square_root
from .sums import total


def global_norm(gradients: dict[str, Tensor]) -> Tensor:
    """The root of the sum of squares of all tensors, a float32 scalar.

    Each tensor has the `total` of `g (*) g` along the last axis, then the `total` of these; then
    the `total` over tensors, and `R(sqrt)`.
    """
    squares = [multiply(g, g) for g in gradients.values()]
    of_tensors = [total(total(x, -1).flatten(), 0) for x in squares]
    return square_root(total(torch.stack(of_tensors), 0))


def clip(gradients: dict[str, Tensor], largest: float) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients, `g (*) (C (/) norm)` where the norm is above C, and the norm before that.

    Args:
      gradients: float32 tensors by name.
      largest: C, as the nearest float32; infinity never scales.

    Raises:
      ValueError: a C that is not above 0 in float32; a norm that is not finite, whose step is not
        taken, on any rank.
    """
    if not nearest32(largest) > 0:
        raise ValueError(
            f"largest must be above 0 in float32, got {largest!r}: 0 makes every gradient 0, a "
            f"negative one changes their signs, and NaN never clips. Give 1.0."
        )
    norm = global_norm(gradients)
    if not norm.isfinite():
        raise ValueError(
            f"The norm of the gradients of {len(gradients)} tensors is {norm.item()}. Give a "
            f"smaller learning rate, or leave this batch out."
        )
    factor = torch.where(norm > largest, divide(largest, norm), 1.0)
    return {name: multiply(g, factor) for name, g in gradients.items()}, norm
