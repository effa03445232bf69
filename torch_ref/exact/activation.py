"""SwiGLU (Shazeer 2020, arXiv:2002.05202), GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arithmetic import exp, flush
from .normal import normal_cdf, normal_pdf
from .rounding import R, add, divide, multiply, narrow


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`gate (*) sig (*) up`, where `sig` is the logistic function of the gate.

    `t = exp(-|g|)`, `d = 1 (+) t`, `sig = (1 or t) (/) d` and `rest = (t or 1) (/) d`, the first
    where `g >= 0`; `s = g (*) sig`, `h = s (*) u`. Backward: `du = dh (*) s`,
    `dg = (dh (*) u) (*) (sig (*) R(1 + g rest))`.

    Args:
      gate, up: of one shape, float32 or bfloat16.

    Returns:
      Of the shape and dtype of the gate. Differentiable once.
    """
    return _SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]


def gelu(x: Tensor) -> Tensor:
    """`x (*) Phi(x)`, Phi the normal distribution function and not an approximation by tanh.

    Backward: `dx = dy (*) R(Phi(x) + x phi(x))`, phi the density.

    Args:
      x: float32 or bfloat16.

    Returns:
      Of the shape and dtype of x. Differentiable once.
    """
    return _GELU.apply(x)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        sig, _ = _logistic(gate)
        return narrow(multiply(multiply(gate, sig), up), gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        sig, rest = _logistic(gate)
        du = multiply(dh, multiply(gate, sig))
        slope = multiply(sig, R(1 + flush(gate) * flush(rest)))
        dg = multiply(multiply(dh, up), slope)
        return narrow(dg, gate.dtype), narrow(du, up.dtype)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return narrow(multiply(x, normal_cdf(x)), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        slope = R(flush(normal_cdf(x)) + flush(x) * flush(normal_pdf(x)))
        return narrow(multiply(dy, slope), x.dtype)


def _logistic(gate: Tensor) -> tuple[Tensor, Tensor]:
    """The logistic function of the gate, and 1 less it, without cancellation."""
    g = flush(gate)
    t = exp(-g.abs())
    d = add(1.0, t)
    one = torch.ones_like(t)
    return divide(torch.where(g >= 0, one, t), d), divide(torch.where(g >= 0, t, one), d)
