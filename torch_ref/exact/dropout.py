"""Dropout of activations: which are dropped is a function of a key and of global coordinates."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dropout import gain, is_kept, threefry2x32
from .rounding import multiply, narrow


def fold(key: Tensor, number: int) -> Tensor:
    """`threefry(key, (0, number))`: the key of one of several steps, batches, layers or places."""
    words = key.long()
    counter = torch.tensor(0), torch.tensor(number)
    return torch.stack(threefry2x32((words[0], words[1]), counter))


def dropout(
    x: Tensor, rate: float, rng: Tensor, *, first_sequence: int = 0, first_token: int = 0
) -> Tensor:
    """`x (*) c`, or 0 where the word of an activation is below `rint(rate 2^32)`.

    The word is the first of `threefry(threefry(rng, (b, 0)), (s, d))`, as that of the attention's
    head 0. Backward: the same of the gradient.

    Args:
      x: `[B, S, D]`, float32 or bfloat16: sequences b, tokens s and channels d.
      rate: the share that is dropped; `c = 2^32 / (2^32 - rint(rate 2^32))`, as the nearest
        float32.
      rng: `(2,)`, the two words of a threefry key. Every layer needs another one.
      first_sequence, first_token: the global numbers of those that come first in x.

    Returns:
      The result has the shape and dtype of x. Differentiable once.
    """
    b, s, d = (torch.arange(n, device=x.device) for n in x.shape)
    key = rng.to(x.device).long()
    keys = threefry2x32((key[0], key[1]), (b + first_sequence, torch.zeros_like(b)))
    keys = torch.stack(keys, -1)[:, None, None]
    kept = is_kept(keys, rate, (s + first_token)[:, None], d)
    return _Dropout.apply(x, kept, gain(rate))  # pyright: ignore[reportReturnType]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, c: float) -> Tensor:
        ctx.c = c
        ctx.save_for_backward(kept)
        return _where_kept(x, kept, c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return _where_kept(dy, kept, ctx.c), None, None


def _where_kept(x: Tensor, kept: Tensor, c: float) -> Tensor:
    return narrow(torch.where(kept, multiply(x, c), 0.0), x.dtype)
