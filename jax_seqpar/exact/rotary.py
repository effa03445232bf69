"""Rotary position embedding by angles that are integers."""

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from .._checks import check_finite
from .rounding import flush, nearest, no_negative_zero

TURN_BITS = 64  # of a frequency, in parts of a turn a token
ANGLE_BITS = 24
# pi to 80 digits, as Python has none.
PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862090")


def rotary(
    x: Float32[Array, "B T N H"], positions: Integer[Array, "#B T"], theta: float = 10_000.0
) -> Float32[Array, "B T N H"]:
    """x, its pairs of channels (i, i + H/2) turned by `position theta^(-2i / H)` radians.

    The frequency of a pair is `floor(theta^(-2i / H) / (2 pi) 2^64)`, so the angle modulo a turn is
    a product of integers, at any position. It is rounded to 24 bits of a turn (2e-7 radians).
    `a' = R(a cos - b sin)`, `b' = R(b cos + a sin)`.

    Args:
      positions: at least 0.
      theta: at least 1.

    Raises:
      ValueError: for a theta below 1, or not finite in float32.
    """
    with jax.enable_x64(True):
        sine, cosine = sines(positions, frequencies(theta, x.shape[-1]))
    return _turned(x, sine[:, :, None], cosine[:, :, None])


@lru_cache(maxsize=8)
def frequencies(theta: float, channels: int) -> tuple[int, ...]:
    """Rotary frequencies of the pairs of channels, in 2^-64 of a turn."""
    check_finite("theta", theta, 10_000.0, least=1.0)
    with localcontext() as context:
        context.prec = 80
        logarithm = Decimal(theta).ln()
        turns = ((-logarithm * (2 * i) / channels).exp() / (2 * PI) for i in range(channels // 2))
        return tuple(int(turn * 2**TURN_BITS) for turn in turns)


def sines(positions: Array, frequencies: tuple[int, ...]) -> tuple[Array, Array]:
    """Sine and cosine of each position's angles, `[B, T, H/2]`, float32."""
    steps = jnp.asarray(np.array(frequencies, np.uint64))[None, None]
    # Whole turns overflow, and are meant to.
    turns = positions.astype(jnp.uint64)[:, :, None] * steps
    half = 1 << (TURN_BITS - ANGLE_BITS - 1)
    angles = ((turns + half) >> (TURN_BITS - ANGLE_BITS)).astype(jnp.int64)
    # The nearest quarter of a turn, and at most an eighth beside it.
    quarter_bits = ANGLE_BITS - 2
    quarter = (angles + (1 << (quarter_bits - 1))) >> quarter_bits
    beside = angles - (quarter << quarter_bits)
    radians = beside.astype(jnp.float64) * (2 * math.pi / 2**ANGLE_BITS)
    s, c = nearest(jnp.sin(radians)), nearest(jnp.cos(radians))
    # Sine and cosine by quarter of a turn: (s, c), (c, -s), (-s, -c), (-c, s).
    odd, back = quarter % 2 == 1, quarter % 4 >= 2
    sine = jnp.where(odd, c, s)
    cosine = jnp.where(odd, -s, c)
    sine, cosine = jnp.where(back, -sine, sine), jnp.where(back, -cosine, cosine)
    return no_negative_zero(sine), no_negative_zero(cosine)


@jax.custom_vjp
def _turned(x: Array, sine: Array, cosine: Array) -> Array:
    with jax.enable_x64(True):
        half = x.shape[-1] // 2
        a, b = flush(x[..., :half]), flush(x[..., half:])
        sine, cosine = flush(sine), flush(cosine)
        turned = nearest(a * cosine - b * sine), nearest(b * cosine + a * sine)
        return jnp.concatenate(turned, axis=-1)


def _forward(x: Array, sine: Array, cosine: Array) -> tuple[Array, Any]:
    return _turned(x, sine, cosine), (sine, cosine)


def _backward(saved: Any, dy: Array) -> tuple[Array, None, None]:
    sine, cosine = saved
    return _turned(dy, no_negative_zero(-sine), cosine), None, None


_turned.defvjp(_forward, _backward)
