"""Correctly rounded exp, and a tanh made of it: functions whose float32 result is defined, not
approximated. Call inside `with jax.enable_x64(True):`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .arithmetic import pinned, round32

LEAST_ARGUMENT = -80.0  # exp is 0 below


def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The float32 nearest to e^x for float32 x <= 0; 0 for x < -80.

    No result comes nearer to a rounding boundary than 1.27 units of float64, so a float64 exp with
    a smaller error there rounds right: `certify` tries the worst cases on the backend at hand.
    """
    y = round32(jnp.exp(x.astype(jnp.float64)))
    return jnp.where(x < LEAST_ARGUMENT, jnp.float32(0), y)


def soft_cap(z: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """`cap * tanh(z / cap)` of float64 logits, exactly representable in float64.

    Args:
      cap: positive, a value of float32.
    """
    u, t = _argument(z, cap)
    size = jnp.abs(u).astype(jnp.float64)
    # Near 0 the difference 1 - t has few digits left, and Lambert's continued fraction has all.
    square = size * size
    fraction = jnp.full_like(square, 11.0)
    for odd in (9.0, 7.0, 5.0, 3.0, 1.0):
        fraction = odd + square / fraction
    tanh = jnp.where(size < 0.5, size / fraction, (1 - t) / (1 + t))
    return jnp.where(u < 0, -1.0, 1.0) * round32(tanh).astype(jnp.float64) * cap


def soft_cap_slope(z: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """The derivative of `soft_cap`: `1 - tanh^2`, as products of which none feeds an addition."""
    _, t = _argument(z, cap)
    g = 1 / (1 + t)
    return pinned((4 * t) * g) * g


def _argument(z: Float[Array, "..."], cap: float) -> tuple[Array, Array]:
    """`u = z / cap` as float32, and `exp(-2 |u|)` as float64."""
    u = round32(z * (1 / cap))
    return u, exp(-2 * jnp.abs(u)).astype(jnp.float64)
