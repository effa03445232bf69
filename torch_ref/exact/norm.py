"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) and LayerNorm (Ba et al. 2016,
arXiv:1607.06450)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import check_finite, flush
from .elementary import rsqrt
from .rounding import R, add, divide, multiply, narrow, subtract
from .sums import total


def rms_norm(x: Tensor, gamma: Tensor, eps: float, *, group: Any = None) -> Tensor:
    """`x (*) r (*) gamma` with `r = rsqrt((total(x (*) x) (/) D) (+) eps)`.

    Backward: `dgamma = total_t(dy (*) n)`, over the tokens of all ranks; `dn = dy (*) gamma`,
    `c = total_i(dn (*) n) (/) D`, `dx = R(dn - n c) (*) r`, where `n = x (*) r`.

    Args:
      x: `[..., D]`, float32 or bfloat16.
      gamma: `[D]`, float32.
      eps: as the nearest float32.
      group: the ranks that hold the other tokens.

    Returns:
      Of the shape and dtype of x. Differentiable once.

    Raises:
      ValueError: an eps below 0, or infinite in float32.
    """
    check_finite("eps", eps, 1e-6)
    return _RMSNorm.apply(x, gamma, eps, group)  # pyright: ignore[reportReturnType]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, *, group: Any = None) -> Tensor:
    """`R(n gamma + beta)` with `d = x (-) m`, `n = d (*) r`, where `m = total(x) (/) D` and
    `r = rsqrt((total(d (*) d) (/) D) (+) eps)`.

    Backward: `dgamma = total_t(dy (*) n)` and `dbeta = total_t(dy)`, over the tokens of all ranks;
    `dn = dy (*) gamma`, `e = dn (-) (total_i(dn) (/) D)`, `c = total_i(dn (*) n) (/) D`,
    `dx = R(e - n c) (*) r`.

    Args:
      x: `[..., D]`, float32 or bfloat16.
      gamma, beta: `[D]`, float32.
      eps: as the nearest float32.
      group: the ranks that hold the other tokens.

    Returns:
      Of the shape and dtype of x. Differentiable once.

    Raises:
      ValueError: an eps below 0, or infinite in float32.
    """
    check_finite("eps", eps, 1e-6)
    return _LayerNorm.apply(x, gamma, beta, eps, group)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, eps: float, group: Any) -> Tensor:
        s = total(multiply(x, x), -1)[..., None]
        r = rsqrt(add(divide(s, x.shape[-1]), eps))
        n = multiply(x, r)
        ctx.dtype, ctx.group = x.dtype, group
        ctx.save_for_backward(n, r, gamma)
        return narrow(multiply(n, gamma), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, r, gamma = ctx.saved_tensors
        dgamma = _over_tokens(multiply(dy, n), ctx.group)
        dn = multiply(dy, gamma)
        c = divide(total(multiply(dn, n), -1)[..., None], n.shape[-1])
        dx = multiply(R(flush(dn) - flush(n) * flush(c)), r)
        return narrow(dx, ctx.dtype), dgamma, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: Any) -> Tensor:
        d = subtract(x, _mean(x))
        r = rsqrt(add(_mean(multiply(d, d)), eps))
        n = multiply(d, r)
        ctx.dtype, ctx.group = x.dtype, group
        ctx.save_for_backward(n, r, gamma)
        return narrow(R(flush(n) * flush(gamma) + flush(beta)), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, r, gamma = ctx.saved_tensors
        dgamma = _over_tokens(multiply(dy, n), ctx.group)
        dbeta = _over_tokens(dy, ctx.group)
        dn = multiply(dy, gamma)
        e = subtract(dn, _mean(dn))
        dx = multiply(R(flush(e) - flush(n) * flush(_mean(multiply(dn, n)))), r)
        return narrow(dx, ctx.dtype), dgamma, dbeta, None, None


def _mean(x: Tensor) -> Tensor:
    """`total(x) (/) D` over the last axis, which stays."""
    return divide(total(x, -1)[..., None], x.shape[-1])


def _over_tokens(x: Tensor, group: Any) -> Tensor:
    """The total over all axes but the last, of which there may be none, and over the ranks."""
    return total(x.reshape(-1, x.shape[-1]), 0, group)
