"""Elementary operations on float32 with one rounding each, made of integer operations.

Each takes float32, computes in float64 and rounds once (`nearest`, R of the specification). For
`+ - * / sqrt` of float32 operands that is the correctly rounded float32 result: 53 bits are at
least 2 * 24 + 2, so that rounding twice does no harm (Figueroa 1995), and a fused multiply-add, a
product with a reciprocal or an error in the last bit of float64 changes nothing. Results are never
subnormal and never -0.

Call inside `with jax.enable_x64(True):`. None of these operations has a derivative: the layers
that are made of them state their derivatives.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .arithmetic import Axes, exponent, flush, power_of_two
from .arithmetic import round32 as nearest

TOTAL_BITS = 32
# Terms of 2^32 at most, of which float64 has room for fewer than this many.
FLOAT64_TERMS = 1 << 21


def add(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to a + b; `a (+) b`."""
    return nearest(flush(a) + flush(b))


def subtract(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to a - b."""
    return nearest(flush(a) - flush(b))


def multiply(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to a b; `a (*) b`."""
    return nearest(flush(a) * flush(b))


def divide(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to a / b; `a (/) b`."""
    return nearest(flush(a) / flush(b))


def square_root(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """The float32 nearest to sqrt(x)."""
    return nearest(jnp.sqrt(flush(x)))


def total(x: Float32[Array, "..."], axis: Axes) -> Float32[Array, "..."]:
    """The sum along axes (kept, of size 1), of numbers rounded 32 bits below the largest of them.

    A sum of integers: the order of the terms, and the devices that hold them, change no bit.
    """
    x = flush(x)
    e = exponent(x, axis)
    integers = jnp.rint(x * power_of_two(TOTAL_BITS - e))
    terms = math.prod(x.shape[a] for a in ((axis,) if isinstance(axis, int) else axis))
    if terms >= FLOAT64_TERMS:
        integers = integers.astype(jnp.int64)
    summed = jnp.sum(integers, axis=axis, keepdims=True).astype(jnp.float64)
    return nearest(summed * power_of_two(e - TOTAL_BITS))


def no_negative_zero(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, with +0 for -0."""
    return jnp.where(x == 0, jnp.zeros_like(x), x)
