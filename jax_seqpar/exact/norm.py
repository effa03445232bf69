"""RMSNorm with one rounding in each operation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from .rounding import add, divide, flush, multiply, nearest, total


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float32[Array, "*tokens D"], scale: Float32[Array, " D"], epsilon: float
) -> Float32[Array, "*tokens D"]:
    """`x rsqrt(mean(x^2) + epsilon) scale`, over the last axis.

    `s = total(x (*) x)`, `u = (s (/) D) (+) epsilon`, `r = rsqrt(u)`, `n = x (*) r`,
    `y = n (*) scale`.
    """
    with jax.enable_x64(True):
        return multiply(_normal(x, epsilon)[0], _beside_tokens(scale, x))


def _normal(x: Array, epsilon: float) -> tuple[Array, Array]:
    """n and r."""
    squares = divide(total(multiply(x, x), -1), jnp.float32(x.shape[-1]))
    r = reciprocal_root(add(squares, jnp.float32(epsilon)))
    return multiply(x, r), r


def reciprocal_root(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to `x^(-1/2)`.

    Of all mantissas the one that comes nearest to a tie is 1.41 float64 units away from it
    (403a18e3 -> 3f16209e), the next 11: two roundings of float64, of the root and of the quotient,
    err by less.
    """
    return nearest(1.0 / jnp.sqrt(flush(x)))


def _forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, Any]:
    return rms_norm(x, scale, epsilon), (x, scale)


def _backward(epsilon: float, saved: Any, dy: Array) -> tuple[Array, Array]:
    x, scale = saved
    with jax.enable_x64(True):
        normal, r = _normal(x, epsilon)
        tokens = tuple(range(x.ndim - 1))
        dscale = total(multiply(dy, normal), tokens).reshape(scale.shape)
        dnormal = multiply(dy, _beside_tokens(scale, x))
        c = divide(total(multiply(dnormal, normal), -1), jnp.float32(x.shape[-1]))
        # Both products are exact in float64: one rounding in the subtraction.
        dx = multiply(nearest(flush(dnormal) - flush(normal) * flush(c)), r)
    return dx, dscale


rms_norm.defvjp(_forward, _backward)


def _beside_tokens(scale: Array, x: Array) -> Array:
    return scale.reshape((1,) * (x.ndim - 1) + scale.shape)
