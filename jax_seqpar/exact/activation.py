"""SwiGLU and GELU with one rounding in each operation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from .elementary import exp
from .normal import normal_cdf, normal_pdf
from .rounding import add, divide, flush, multiply, nearest
from .sharding import PrimalSharding


@jax.custom_vjp
def swiglu(gate: Float32[Array, "..."], up: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`gate sigmoid(gate) up`.

    `t = exp(-|g|)`, `d = 1 (+) t`, `sigmoid = (g >= 0 ? 1 : t) (/) d`, `s = g (*) sigmoid`,
    `h = s (*) u`.
    """
    with jax.enable_x64(True):
        sigmoid, _ = _sigmoids(gate)
        return multiply(multiply(gate, sigmoid), up)


def _sigmoids(gate: Array) -> tuple[Array, Array]:
    """The sigmoid of the gate, and 1 less it."""
    one, t = jnp.ones_like(gate), exp(-jnp.abs(gate))
    d = add(one, t)
    positive = gate >= 0
    return divide(jnp.where(positive, one, t), d), divide(jnp.where(positive, t, one), d)


def _forward(gate: Array, up: Array) -> tuple[Array, Any]:
    return swiglu(gate, up), (gate, up)


def _backward(saved: Any, dh: Array) -> tuple[Array, Array]:
    gate, up = saved
    with jax.enable_x64(True):
        sigmoid, rest = _sigmoids(gate)
        dup = multiply(dh, multiply(gate, sigmoid))
        slope = multiply(sigmoid, nearest(1.0 + flush(gate) * flush(rest)))
        dgate = multiply(multiply(dh, up), slope)
    return PrimalSharding.of(gate).reshard(dgate), PrimalSharding.of(up).reshard(dup)


swiglu.defvjp(_forward, _backward)


@jax.custom_vjp
def gelu(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`x (*) Phi(x)`, the GELU that is not an approximation by tanh.

    Phi is the float32 nearest to the normal distribution function, and phi that of its density:
    `dx = dy (*) R(Phi(x) + x phi(x))`.
    """
    with jax.enable_x64(True):
        return multiply(x, normal_cdf(x))


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, dy: Array) -> tuple[Array]:
    with jax.enable_x64(True):
        # The product is exact in float64: one rounding in the sum.
        slope = nearest(flush(normal_cdf(x)) + flush(x) * flush(normal_pdf(x)))
        return (multiply(dy, slope),)


gelu.defvjp(_gelu_forward, _gelu_backward)
