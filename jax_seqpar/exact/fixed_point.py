"""Float32 as integers of 24 bits, and sums of their products as float32, by integer operations.

A TPU has no float64: XLA makes it of pairs of float32, which have neither its bits nor its range,
and cannot see the bits of one. Integers of 64 bits it makes of two words, exactly.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, UInt32

from .arithmetic import LEAST_EXPONENT, NOT_A_NUMBER, Axes

MANTISSA_BITS = 24
WORD = (1 << 32) - 1


def exponents(x: Float32[Array, "..."]) -> Int[Array, "..."]:
    """The smallest e with |x| < 2^e of each number, as int32.

    `LEAST_EXPONENT` of 0 and subnormals, `NOT_A_NUMBER` of NaN and infinity.
    """
    biased = _biased(x)
    e = jnp.where(biased == 0, LEAST_EXPONENT, biased - 126)
    return jnp.where(biased == 0xFF, NOT_A_NUMBER, e)


def largest_exponent(e: Int[Array, "..."], axis: Axes) -> Int[Array, "..."]:
    """The largest of exponents along axes (kept, of size 1), at least `LEAST_EXPONENT`."""
    return jnp.max(e, axis=axis, keepdims=True, initial=LEAST_EXPONENT)


def on_grid(
    x: Float32[Array, "..."], e: Int[Array, "..."], largest: Int[Array, "..."], bits: int
) -> Int[Array, "..."]:
    """`rint(x 2^(bits - largest))` of numbers whose exponents are e <= largest, as int32.

    Where e is not that of x, x stands for its product with the power of two between the two.

    Args:
      bits: 24 at most.
    """
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    mantissa = jnp.where(_biased(x) == 0, 0, (word & 0x7FFFFF) | 0x800000)
    # From 25 bits on nothing is left.
    shift = jnp.minimum(largest - e + (MANTISSA_BITS - bits), MANTISSA_BITS + 1)
    odd = (mantissa >> shift) & 1
    # Half to even: with one bit more, so that a shift by 0 has a half, too.
    rounded = (2 * mantissa + (1 << shift) - 1 + odd) >> (shift + 1)
    return jnp.where(word < 0, -rounded, rounded)


def sum_of_parts(
    parts: list[tuple[int, Int[Array, "..."]]],
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """high and low of `sum part 2^bits = high 2^32 + low`, int64, low of 0 to 2^32 - 1.

    Args:
      parts: bits and int64, in which each `part 2^(bits - 32)` has room.
    """
    high = low = jnp.zeros_like(parts[0][1])
    for bits, part in parts:
        if bits < 32:
            high = high + (part >> (32 - bits))
            low = low + ((part & (WORD >> bits)) << bits)
        else:
            high = high + (part << (bits - 32))
    return high + (low >> 32), low & WORD


def nearest(
    high: Int[Array, "..."], low: Int[Array, "..."], n: Int[Array, "..."]
) -> Float32[Array, "..."]:
    """`R(RN64(high 2^32 + low) 2^n)`: to the 53 bits of float64 first, then to the 24 of float32.

    Args:
      high, low: int64, low of 0 to 2^32 - 1.
      n: int32; half of `NOT_A_NUMBER` and more for NaN.
    """
    is_negative = high < 0
    borrow = (low != 0).astype(high.dtype)
    high = jnp.where(is_negative, -high - borrow, high)
    low = jnp.where(is_negative, -low & WORD, low)
    first, second, third, length = _normalised(high, low)
    mantissa = first >> 8
    rest = first & 0xFF
    # How far the bits below the mantissa are from their half, 0x80 and 32 zeros, decides. The
    # rounding to 53 bits takes what is within half a unit of 2^11 there for the half itself; half
    # a unit above it is a tie, which goes to the half, unless more bits follow.
    far = (second > 0x400) | ((second == 0x400) & (third != 0))
    is_above = (rest > 0x80) | ((rest == 0x80) & far)
    is_half = (rest == 0x80) | ((rest == 0x7F) & (second >= 0xFFFFFC00))
    is_odd = (mantissa & 1) == 1
    up = (is_above | (is_half & is_odd)).astype(jnp.int32)
    biased = length + n + 126
    # A mantissa that becomes 2^24 carries into the exponent, up to that of infinity.
    bits = (jnp.clip(biased, 0, 254) << 23) + (mantissa & 0x7FFFFF).astype(jnp.int32) + up
    # Below 2^-126, but for what the rounding to 53 bits brings there.
    at_the_end = (first == WORD) & (second >= 0xFFFFFC00)
    is_zero = (biased < 0) | ((biased == 0) & ~at_the_end) | (first == 0)
    bits = jnp.where(biased > 254, jnp.int32(0x7F800000), bits)
    bits = jnp.where(is_negative, bits | np.int32(-(1 << 31)), bits)
    bits = jnp.where(is_zero, 0, bits)
    bits = jnp.where(n >= NOT_A_NUMBER // 2, jnp.int32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _normalised(
    high: Int[Array, "..."], low: Int[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."], UInt32[Array, "..."], Int[Array, "..."]]:
    """Three words of an integer of at least 0 from its first 1 on, and how many bits it has."""
    words = [(high >> 32).astype(jnp.uint32), (high & WORD).astype(jnp.uint32)]
    words = [*words, low.astype(jnp.uint32)]
    none = jnp.zeros_like(words[0])
    length = jnp.full_like(none, 96, jnp.int32)
    for _ in range(2):
        is_empty: Bool[Array, ...] = words[0] == 0
        moved = [*words[1:], none]
        words = [jnp.where(is_empty, b, a) for a, b in zip(words, moved, strict=True)]
        length = jnp.where(is_empty, length - 32, length)
    zeros = jnp.minimum(jax.lax.clz(words[0]), 31)
    # In two steps, as a shift by all 32 bits is undefined.
    carried = [(b >> 1) >> (31 - zeros) for b in words[1:]]
    first, second = (a << zeros | b for a, b in zip(words[:2], carried, strict=True))
    return first, second, words[2] << zeros, length - zeros.astype(jnp.int32)


def _biased(x: Float32[Array, "..."]) -> Int[Array, "..."]:
    """The exponent field of each number, int32."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
