"""Sums without rounding: numbers on grids, whose products add up exactly in float64.

The words are those of the specification in `jax_seqpar.exact`. Call everything here inside
`with jax.enable_x64(True):`, as float64 needs. On a backend that `certify` passes, no compiler,
BLAS, thread count or order of additions can change a bit of any result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

Axes = int | tuple[int, ...]

TOKEN_BITS = 22  # of an operand summed over tokens
WEIGHT_BITS = 30  # of a weight summed over tokens, in two digits of 15
DIGIT_BITS = 15
CONTRACT_TOKENS = 1 << (53 - DIGIT_BITS - TOKEN_BITS)  # that one float64 sum has room for

LEAST_EXPONENT = -400
NOT_A_NUMBER = 1 << 20  # the exponent of an axis with a NaN or infinity; the largest, under max

SMALLEST_NORMAL = 2.0**-126  # of float32


def flush(x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """x as float64, with 0 for what float32 holds only as a subnormal."""
    x = x.astype(jnp.float64)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)


def round32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float32. Flushed before: a backend may flush a subnormal before rounding it."""
    return flush(x).astype(jnp.float32)


def exponent(x: Float[Array, "..."], axis: Axes) -> Int[Array, "..."]:
    """The smallest e with max |x| < 2^e along axes (kept, of size 1), as int64.

    At least `LEAST_EXPONENT`; `NOT_A_NUMBER` where one of them is NaN or infinite.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int64)
    # Ordered like the numbers; NaN above infinity above the rest.
    top = jnp.max(bits, axis=axis, keepdims=True, initial=0)
    biased = top >> 52
    e = jnp.maximum(biased - 1022, LEAST_EXPONENT)
    return jnp.where(biased == 0x7FF, NOT_A_NUMBER, e)


def power_of_two(n: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^n for -1022 <= n <= 1023, built from its bits; NaN beyond, so for `NOT_A_NUMBER`, too."""
    bits = (n.astype(jnp.int64) + 1023) << 52
    power = jax.lax.bitcast_convert_type(bits, jnp.float64)
    return jnp.where(jnp.abs(n) > 1022, jnp.nan, power)


def grid(x: Float[Array, "..."], e: Int[Array, "..."], bits: int) -> Float[Array, "..."]:
    """x in units of 2^(e - bits), rounded to an integer (half to even)."""
    return jnp.rint(x * power_of_two(bits - e))


def channel_bits(channels: int) -> int:
    """R: how many bits an operand may have whose products are summed over that many channels."""
    return (53 - max(channels - 1, 0).bit_length()) // 2


def on_grid(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """x rounded to the grid of its row, an operand of a dot product over H.

    Products of two of them are multiples of one power of two along a sum, and the sum stays below
    2^53 of those: `einsum` over H is exact.
    """
    bits = channel_bits(x.shape[-1])
    e = exponent(x, -1)
    return grid(x, e, bits) * power_of_two(e - bits)


def exact_dot(a: Shaped[Array, "... M H"], b: Shaped[Array, "... N H"]) -> Float[Array, "... M N"]:
    """Every row of a times every row of b, summed over H without rounding; float64.

    Each row is first rounded to `channel_bits(H)` bits below its largest element: 23 for H = 64
    and 128, so a float32 loses at most its last bit there.

    Args:
      a, b: float32, bfloat16 or float16, or float64 of their range; leading axes broadcast.
    """
    return jnp.einsum("...MH,...NH->...MN", on_grid(flush(a)), on_grid(flush(b)))


class TokenSums(NamedTuple):
    """Two exact sums over tokens, one for each digit of the weights; integers."""

    high: Array
    low: Array

    def total(self) -> Float[Array, "..."]:
        """Their value: one rounding each, where they are int64, and one in the addition."""
        return self.high.astype(jnp.float64) * 2.0**DIGIT_BITS + self.low.astype(jnp.float64)


def token_sums(
    equation: str, weights: Float[Array, "..."], x: Float[Array, "..."], dtype: jnp.dtype
) -> TokenSums:
    """`einsum(equation, weights, x)` over at most `CONTRACT_TOKENS` tokens, by digits.

    Args:
      equation: of `einsum`.
      weights: integers up to 2^30.
      x: integers up to 2^22.
      dtype: of the sums, `sum_dtype(all the tokens that they will be added over)`.
    """
    high = jnp.rint(weights * 2.0**-DIGIT_BITS)
    low = weights - high * 2.0**DIGIT_BITS
    return TokenSums(*(jnp.einsum(equation, digit, x).astype(dtype) for digit in (high, low)))


def sum_dtype(tokens: int, limit: int = CONTRACT_TOKENS) -> jnp.dtype:
    """What holds sums over so many tokens exactly."""
    return jnp.dtype(jnp.float64 if tokens <= limit else jnp.int64)


def contract(
    weights: Float[Array, "... S M"], x: Float[Array, "... S H"], limit: int = CONTRACT_TOKENS
) -> Float[Array, "... M H"]:
    """The sum over S tokens of weights * x, rounded once (S <= 65 536) at its end.

    Args:
      weights: integers up to 2^30, as `grid(weights, e, WEIGHT_BITS)`.
      x: integers up to 2^22, as `grid(x, e, TOKEN_BITS)`.
      limit: tokens of one float64 sum; more are added in int64.
    """
    S = x.shape[-2]
    dtype = sum_dtype(S, limit)

    def sums(start: int) -> TokenSums:
        a, b = (y[..., start : start + limit, :] for y in (weights, x))
        return token_sums("...SM,...SH->...MH", a, b, dtype)

    total = sums(0)
    for start in range(limit, S, limit):
        total = jax.tree.map(jnp.add, total, sums(start))
    return total.total()


def out(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x rounded to float32; no -0, no subnormal, one NaN."""
    x = round32(x)
    # By its bits: a compiler may take a selection between NaNs for no selection.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & jnp.uint32(0x7FFFFFFF)
    bits = jnp.where(magnitude == 0, jnp.uint32(0), bits)
    bits = jnp.where(magnitude > 0x7F800000, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
