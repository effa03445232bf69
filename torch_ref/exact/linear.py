"""Linear layers, `y = mm(x, W)`, and biases."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import flush
from .matmul import mm, mmT
from .rounding import add, narrow
from .sums import total


def linear(
    x: Tensor, weight: Tensor, group: Any = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`x W`; for arguments see `linears`."""
    (y,) = linears(x, weight, group=group, dtype=dtype)
    return y


def linears(
    x: Tensor, *weights: Tensor, group: Any = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Several linear layers of one input, as query, key and value, or gate and up.

    Backward: `dx = (dx_1 (+) dx_2) (+) dx_3`, in the order of the weights, each `mm(dy, W^T)`
    rounded to the dtype of x, as their sum is; `dW = mmT(x, dy)`, over the tokens of all ranks.

    Args:
      x: `[..., I]`, float32 or bfloat16.
      weights: `[I, O]` each, float32.
      group: the ranks that hold the other tokens.
      dtype: of the results, that of x if None; float32 for logits.

    Returns:
      `[..., O]` for each weight. Differentiable once.
    """
    return _Linears.apply(group, dtype or x.dtype, x, *weights)  # pyright: ignore[reportReturnType]


def add_bias(y: Tensor, bias: Tensor, group: Any = None) -> Tensor:
    """`y (+) bias` of every token. Backward: `dbias` is the total over the tokens of all ranks.

    Args:
      y: `[*tokens, *features]`, float32 or bfloat16.
      bias: `[*features]`, float32.
      group: the ranks that hold the other tokens.

    Returns:
      Of the shape and dtype of y. Differentiable once.
    """
    return _Bias.apply(group, y, bias)  # pyright: ignore[reportReturnType]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: Any, dtype: torch.dtype, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        rows = _rows(x)
        products = (mm(rows, flush(weight)) for weight in weights)
        return tuple(narrow(y, dtype).view(*x.shape[:-1], -1) for y in products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *weights = ctx.saved_tensors
        dys = [_rows(dy) for dy in grads]
        products = (mm(dy, flush(weight).T) for dy, weight in zip(dys, weights, strict=True))
        dx = reduce(add, [narrow(product, x.dtype).float() for product in products])
        dx = narrow(dx, x.dtype).view(x.shape)
        return None, None, dx, *(mmT(_rows(x), dy, ctx.group) for dy in dys)


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, y: Tensor, bias: Tensor) -> Tensor:
        ctx.group, ctx.axes = group, bias.ndim
        return narrow(add(y, bias), y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens = dy.ndim - ctx.axes
        return None, dy, total(dy.flatten(0, tokens - 1), 0, ctx.group)


def _rows(x: Tensor) -> Tensor:
    """The tokens of all leading axes, in float64."""
    return flush(x).flatten(0, -2)
