"""Sums without rounding: numbers on grids, whose products add up exactly in float64.

The words are those of the specification, `SPEC.md` beside this file. `exact_dot` and `contract`
switch float64 on for themselves; call the rest inside `with jax.enable_x64(True):`. On a backend
that `certify` passes, no compiler, BLAS, thread count or order of additions can change a bit of any
result.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped

Axes = int | tuple[int, ...]

TOKEN_BITS = 32  # of a number, or of a weight, in a sum over tokens
DIGIT_BITS = 11  # of one of the three digits of such a number
CONTRACT_TOKENS = 1 << (53 - TOKEN_BITS - (DIGIT_BITS - 1))  # that one float64 sum has room for

LEFT_BITS = 31  # of the left operand of a dot product, in two digits
LEFT_DIGIT_BITS = 16

LEAST_EXPONENT = -400
NOT_A_NUMBER = 1 << 20  # the exponent of an axis with a NaN or infinity; the largest, under max

SMALLEST_NORMAL = 2.0**-126  # of float32


def flush(x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """x as float64, with 0 for what float32 holds only as a subnormal."""
    x = x.astype(jnp.float64)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)


def round32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float32; 0 where |x| < 2^-126.

    The selection comes after the conversion and so stands between it and one that widens the result
    again. Where one follows the other XLA:GPU leaves out both, as `xla_allow_excess_precision`
    permits (https://github.com/openxla/xla/issues/41605 for 16 bits), and the rounding is lost.
    """
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.float32(0), x.astype(jnp.float32))


def pinned(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x itself, for |x| < 2^600 whose last bit is above 2^-400.

    With fast-math flags a compiler reorders sums and products of three; not across a rounding to
    integers, and this is one that changes nothing.
    """
    return jnp.rint(x * 2.0**400) * 2.0**-400


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
    return jnp.where((n < -1022) | (n > 1023), jnp.nan, power)


def grid(x: Float[Array, "..."], e: Int[Array, "..."], bits: int) -> Float[Array, "..."]:
    """x in units of 2^(e - bits), rounded to an integer (half to even)."""
    return jnp.rint(x * power_of_two(bits - e))


def right_bits(channels: int) -> int:
    """C: bits of the right operand of a dot product over so many channels."""
    room = 53 - (LEFT_DIGIT_BITS - 1) - max(channels - 1, 0).bit_length()
    return min(TOKEN_BITS, room)


def left_digits(x: Float[Array, "*shape H"]) -> Float[Array, "2 *shape H"]:
    """x rounded to the grid of its row, as the sum of two digits: a left operand."""
    e = exponent(x, -1)
    integers = grid(x, e, LEFT_BITS)
    high = jnp.rint(integers * 2.0**-LEFT_DIGIT_BITS) * 2.0**LEFT_DIGIT_BITS
    return jnp.stack([high, integers - high]) * power_of_two(e - LEFT_BITS)[None]


def right_on_grid(x: Float[Array, "*shape H"]) -> Float[Array, "*shape H"]:
    """x rounded to the grid of its row: a right operand.

    Its products with a left digit are multiples of one power of two all along a sum, which stays
    below 2^53 of those: `einsum` over H is exact.
    """
    bits = right_bits(x.shape[-1])
    e = exponent(x, -1)
    return grid(x, e, bits) * power_of_two(e - bits)


def exact_dot(a: Shaped[Array, "... M H"], b: Shaped[Array, "... N H"]) -> Float[Array, "... M N"]:
    """Every row of a times every row of b, summed over H with one rounding at the end; float64.

    Rows are first rounded to 31 (a) and 32 bits (b, up to H = 64) below their largest element.

    Args:
      a, b: float32, bfloat16 or float16, or float64 of their range; leading axes broadcast.
    """
    with jax.enable_x64(True):
        left, right = left_digits(flush(a)), right_on_grid(flush(b))
        high, low = jnp.einsum("d...MH,...NH->d...MN", left, right)
        return high + low


def digits(x: Float[Array, "... H"]) -> Float[Array, "... H3"]:
    """Integers up to 2^32 as three digits of 11 bits, the highest first, side by side."""
    high = jnp.rint(x * 2.0 ** (-2 * DIGIT_BITS))
    rest = x - high * 2.0 ** (2 * DIGIT_BITS)
    middle = jnp.rint(rest * 2.0**-DIGIT_BITS)
    return jnp.concatenate([high, middle, rest - middle * 2.0**DIGIT_BITS], axis=-1)


def token_sums(
    equation: str, weights: Float[Array, "..."], x: Float[Array, "..."], dtype: jnp.dtype
) -> Shaped[Array, "..."]:
    """`einsum(equation, weights, x)` over at most `CONTRACT_TOKENS` tokens: exact.

    Args:
      equation: of `einsum`.
      weights: integers up to 2^32.
      x: `digits` of integers up to 2^32.
      dtype: `sum_dtype(all the tokens that the sums will be added over)`.
    """
    return jnp.einsum(equation, weights, x).astype(dtype)


def sum_dtype(tokens: int, limit: int = CONTRACT_TOKENS) -> jnp.dtype:
    """What holds sums over so many tokens exactly."""
    return jnp.dtype(jnp.float64 if tokens <= limit else jnp.int64)


def combine_digits(sums: Shaped[Array, "... H3"]) -> Float[Array, "... H"]:
    """Recombines three digit sums into one float64: two roundings, and one each of int64 sums."""
    high, middle, low = jnp.split(sums.astype(jnp.float64), 3, axis=-1)
    return pinned(high * 2.0**DIGIT_BITS + middle) * 2.0**DIGIT_BITS + low


def contract(
    weights: Float[Array, "... S M"], x: Float[Array, "... S H"], limit: int = CONTRACT_TOKENS
) -> Float[Array, "... M H"]:
    """The sum over S tokens of weights * x: exact sums, rounded at the end.

    Args:
      weights: integers up to 2^32, as `grid(weights, e, TOKEN_BITS)`.
      x: integers up to 2^32, as `grid(x, e, TOKEN_BITS)`. A NaN of theirs is lost in int64, and
        comes back with `power_of_two(e - TOKEN_BITS)`. Fewer than 2^21: an int64 sum has room for
        2^63 of numbers up to 2^32 times digits up to 2^10.
      limit: tokens of one float64 sum; more are added in int64.
    """
    S = x.shape[-2]

    def piece(start: int) -> Array:
        own = slice(start, start + limit)
        a, b = (y[..., own, :].astype(jnp.float64) for y in (weights, x))
        return token_sums("...SM,...SH->...MH", a, digits(b), sum_dtype(S, limit))

    with jax.enable_x64(True):
        sums = piece(0)
        for start in range(limit, S, limit):
            sums = sums + piece(start)
        return combine_digits(sums)


def out(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x rounded to float32; no -0, no subnormal, one NaN."""
    x = round32(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _one_nan(jnp.where(bits << 1 == 0, jnp.uint32(0), bits), x.dtype)


def narrowed(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """What `out` gives, rounded to 16 bits if that is the dtype.

    A conversion makes of one NaN another one on another platform.
    """
    if dtype == x.dtype:
        return x
    return _one_nan(jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16), dtype)


def _one_nan(bits: Integer[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The numbers of these bits, but for every NaN the quiet one with sign and payload 0.

    By the bits: a compiler may take a selection between NaNs for no selection.
    """
    infinity, nan = (jnp.asarray(np.array(x, dtype).view(bits.dtype)) for x in (np.inf, np.nan))
    magnitude = bits & jnp.asarray(jnp.iinfo(bits.dtype).max >> 1, bits.dtype)
    bits = jnp.where(magnitude > infinity, nan, bits)
    return jax.lax.bitcast_convert_type(bits, dtype)
