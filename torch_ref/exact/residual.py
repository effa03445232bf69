"""Residual connections: a tensor used twice, and two added, without the additions of autograd.

Autograd adds the gradients of a tensor that is used twice by a plain addition of float32, which
keeps subnormals and -0; `fork` adds them by the addition of exact training.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import rounding
from .rounding import narrow


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` twice, for its two uses. Backward: `da (+) db`. Differentiable once."""
    return _Fork.apply(x)  # pyright: ignore[reportReturnType]


def residual(a: Tensor, b: Tensor) -> Tensor:
    """`a (+) b`, of the shape and dtype of a. Backward: the gradient of both. Differentiable
    once.
    """
    return _Residual.apply(a, b)  # pyright: ignore[reportReturnType]


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone(), x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: Tensor, db: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return narrow(rounding.add(da, db), da.dtype)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return narrow(rounding.add(a, b), a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, dy
