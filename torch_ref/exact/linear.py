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
    """`y (+) bias`. Backward: `dbias` is the total over the axes that the bias lacks or has of size
    1, and over the ranks.

    Args:
      y: `[*tokens, *features]`, float32 or bfloat16.
      bias: `[*features]`, or another shape that broadcasts to that of y, float32.
      group: the ranks that hold the other tokens, and the same bias.

    Returns:
      Of the shape and dtype of y. Differentiable once.

    Raises:
      ValueError: a bias that does not broadcast to y.
    """
    sizes = zip(y.shape[::-1], bias.shape[::-1], strict=False)
    if bias.ndim > y.ndim or any(n not in (1, size) for size, n in sizes):
        raise ValueError(
            f"a bias broadcasts to y, got the bias {tuple(bias.shape)} and y {tuple(y.shape)}. "
            f"Write a bias of the last axes of y, such as {tuple(y.shape[-1:])}."
        )
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
        ctx.group, ctx.shape = group, bias.shape
        return narrow(add(y, bias), y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # One axis more, so that there is always one to sum over.
        shape = (1,) * (dy.ndim + 1 - len(ctx.shape)) + ctx.shape
        summed = tuple(axis for axis, size in enumerate(shape) if size == 1)
        return None, dy, total(dy[None], summed, ctx.group).view(ctx.shape)


def _rows(x: Tensor) -> Tensor:
    """The tokens of all leading axes, in float64."""
    return flush(x).reshape(-1, x.shape[-1])
