"""Embedding: rows of a table, whose gradient adds up the tokens of one row as integers."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import exponent, flush, power
from .rounding import R, narrow
from .sums import TOTAL_BITS, add_up, grid, meet


def embedding(
    table: Tensor, ids: Tensor, *, dtype: torch.dtype = torch.float32, group: Any = None
) -> Tensor:
    """`table[ids]`. Backward: `T = rint(dx 2^(32 - E))`, E of a feature over all tokens of all
    ranks, the sum of T over the tokens of a row, and `R(RN64(sum) 2^(E - 32))`.

    Args:
      table: `[V, D]`, float32.
      ids: integers, any shape, below V.
      dtype: of the result, float32 or bfloat16.
      group: the ranks that hold the other tokens.

    Returns:
      `[..., D]`. Differentiable once.
    """
    return _Embedding.apply(table, ids, dtype, group)  # pyright: ignore[reportReturnType]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, dtype: torch.dtype, group: Any) -> Tensor:
        ctx.rows, ctx.group = len(table), group
        ctx.save_for_backward(ids)
        return narrow(flush(table[ids]).float(), dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (ids,) = ctx.saved_tensors
        dx = flush(dx).flatten(0, -2)
        e = meet(exponent(dx, 0), ctx.group)
        T = grid(dx, e, TOTAL_BITS).long()
        sums = T.new_zeros(ctx.rows, T.shape[1]).index_add_(0, ids.flatten(), T)
        sums = add_up(sums, ctx.group)
        return R(sums.double() * power(e - TOTAL_BITS)), None, None, None
