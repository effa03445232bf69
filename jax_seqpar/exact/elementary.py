"""Correctly rounded exp and log, and a tanh made of exp: functions whose float32 result is defined,
not approximated. Call inside `with jax.enable_x64(True):`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .arithmetic import pinned, round32

LEAST_ARGUMENT = -80.0  # exp is 0 below
# The one float32 of (1, 2^21] whose logarithm comes nearer to a tie than half a unit of float64
# (0.19, found by trying all 176,160,768): 9.4726..., for which float64 logarithms of JAX, PyTorch,
# NumPy and the C library round to 400fe5e8.
HARD_LOGARITHM = (0x41178FEB, 0x400FE5E7)


def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The float32 nearest to e^x for float32 x <= 0; 0 for x < -80.

    No result comes nearer to a rounding boundary than 1.27 units of float64, so a float64 exp with
    a smaller error there rounds right: `certify` tries the worst cases on the backend at hand.
    """
    y = round32(jnp.exp(x.astype(jnp.float64)))
    return jnp.where(x < LEAST_ARGUMENT, jnp.float32(0), y)


def log(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The float32 nearest to ln x for float32 x from 1 to 2^21."""
    y = round32(jnp.log(x.astype(jnp.float64)))
    argument, result = (np.uint32(bits).view(np.float32) for bits in HARD_LOGARITHM)
    return jnp.where(x == argument, result, y)


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
