"""Sums of integers in the place of sums of float32, over the tokens of one process or of many.

Exponents meet by maximum, integers by sum, before any rounding: neither depends on an order, so
that the number of ranks and of threads cannot change a bit.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .arithmetic import exponent, flush, power
from .rounding import R

# Bits of a number below the largest of its sum.
TOTAL_BITS = 32


def grid(x: Tensor, e: Tensor, bits: int) -> Tensor:
    """The integers `rint(x 2^(bits - e))`, in float64."""
    return torch.round(x * power(bits - e))


def meet(e: Tensor, group: Any) -> Tensor:
    """The largest exponents over the ranks of a process group; None stands for this process."""
    if group is not None:
        dist.all_reduce(e, dist.ReduceOp.MAX, group)
    return e


def add_up(n: Tensor, group: Any) -> Tensor:
    """The sums of int64 over the ranks of a process group; None stands for this process."""
    if group is not None:
        dist.all_reduce(n, dist.ReduceOp.SUM, group)
    return n


def total(x: Tensor, dim: int | tuple[int, ...], group: Any = None) -> Tensor:
    """The sum along one axis or more, `T = rint(x 2^(32 - E))` and `R(RN64(sum T) 2^(E - 32))`.

    Args:
      x: float32; E is the exponent of its largest magnitude along the axes.
      dim: the axes, which go.
      group: the ranks that hold the rest of the axes.

    Returns:
      float32. Fewer than 2^31 terms of 2^32 fit int64.
    """
    x = flush(x)
    e = meet(exponent(x, dim), group)
    T = add_up(grid(x, e, TOTAL_BITS).long().sum(dim, keepdim=True), group)
    return R(T.double() * power(e - TOTAL_BITS)).squeeze(dim)
