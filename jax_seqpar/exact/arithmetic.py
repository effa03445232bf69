"""Sums without rounding: numbers on grids, whose products add up exactly in float64.

The words are those of the specification, `SPEC.md` beside this file. `exact_dot`, `weighted_sum`
and `gradient_sum` switch float64 on for themselves; call the rest inside
`with jax.enable_x64(True):`. On a backend that `certify` passes, no compiler, BLAS, thread count or
order of additions can change a bit of any result.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped

Axes = int | tuple[int, ...]

BLOCK = 256  # tokens of one float64 sum, and those of the gradients that have one unit

LEFT_BITS, RIGHT_BITS = 33, 34  # of the operands of a dot product, below their norms
LEFT_DIGIT_BITS = 15  # of the lower of two digits
NORM_BITS = 12
DOT_CHANNELS = 512  # that one float64 sum has room for

VALUE_BITS, VALUE_DIGIT_BITS = 32, 16  # of a token in a sum over tokens, and of its lower digit
WEIGHT_BITS = 41  # of a weight where weights alone are added up
LEAST_WEIGHT_BITS = 29  # of a weight in a sum over tokens
ROW_BITS = 49  # of a row of weights, with the number of its tokens
GRADIENT_BITS = 29
SLICE_BITS = (31, 39)
HALF_BITS = 20  # what the lower part of a sum above 2^53 has

LEAST_EXPONENT = -300
NOT_A_NUMBER = 1 << 20  # the exponent of an axis with a NaN or infinity; the largest, under max

SMALLEST_NORMAL = 2.0**-126  # of float32


def flush(x: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """x as float64, with 0 for what float32 holds only as a subnormal."""
    x = x.astype(jnp.float64)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)


def round32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest float32; 0 where |x| < 2^-126.

    The rounding is made of integers: the conversion that follows it is exact. A conversion that
    rounds is one that a compiler may leave out together with one that widens the result again, as
    XLA:GPU does (`xla_allow_excess_precision`, https://github.com/openxla/xla/issues/41605) and
    XLA:CPU with fast-math flags.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int64)
    rounded = (bits + 0x0FFFFFFF + ((bits >> 29) & 1)) & ~0x1FFFFFFF
    is_number = (bits & 0x7FF0000000000000) != 0x7FF0000000000000
    nearest = jax.lax.bitcast_convert_type(jnp.where(is_number, rounded, bits), jnp.float64)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.float32(0), nearest.astype(jnp.float32))


def pinned(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x itself, for |x| < 2^600 whose last bit is above 2^-400.

    With fast-math flags a compiler reorders sums and products of three; not across a rounding to
    integers, and this is one that changes nothing.
    """
    return jnp.rint(x * 2.0**400) * 2.0**-400


def exponent(x: Float[Array, "..."], axis: Axes) -> Int[Array, "..."]:
    """The smallest e with max |x| < 2^e along axes (kept, of size 1), as int32.

    At least `LEAST_EXPONENT`; `NOT_A_NUMBER` where one of them is NaN or infinite.
    """
    # The upper words without the sign are ordered like the numbers as far as their exponents go;
    # NaN above infinity above the rest.
    words = (jax.lax.bitcast_convert_type(x, jnp.int64) >> 32).astype(jnp.int32) & 0x7FFFFFFF
    biased = jnp.max(words, axis=axis, keepdims=True, initial=0) >> 20
    e = jnp.maximum(biased - 1022, LEAST_EXPONENT)
    return jnp.where(biased == 0x7FF, NOT_A_NUMBER, e)


def power_of_two(n: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^n for -1022 <= n <= 1023, built from its bits; NaN beyond, so for `NOT_A_NUMBER`, too."""
    bits = (n.astype(jnp.int64) + 1023) << 52
    power = jax.lax.bitcast_convert_type(bits, jnp.float64)
    return jnp.where((n < -1022) | (n > 1023), jnp.nan, power)


def norm(x: Float[Array, "*shape H"]) -> Int[Array, "*shape 1"]:
    """N of each row of channels: its Euclidean norm is below 2^N, with room for roundings."""
    e = exponent(x, -1)
    magnitudes = jnp.ceil(jnp.abs(x) * power_of_two(NORM_BITS - e))
    squares = 256.0 + jnp.sum(magnitudes * magnitudes, axis=-1, keepdims=True)
    half = (exponent(squares, -1) + 1) // 2
    return jnp.where(e == NOT_A_NUMBER, NOT_A_NUMBER, e - NORM_BITS + half)


def left_digits(x: Float[Array, "*shape H"]) -> Float[Array, "2 *shape H"]:
    """x rounded to the grid of its row, as the sum of two digits: a left operand."""
    n = norm(x)
    integers = jnp.rint(x * power_of_two(LEFT_BITS - n))
    high = jnp.rint(integers * 2.0**-LEFT_DIGIT_BITS) * 2.0**LEFT_DIGIT_BITS
    return jnp.stack([high, integers - high]) * power_of_two(n - LEFT_BITS)[None]


def right_on_grid(x: Float[Array, "*shape H"]) -> Float[Array, "*shape H"]:
    """x rounded to the grid of its row: a right operand.

    Its products with a left digit are multiples of one power of two all along a sum, which stays
    below 2^53 of those: a product of matrices over H is exact.
    """
    n = norm(x)
    return jnp.rint(x * power_of_two(RIGHT_BITS - n)) * power_of_two(n - RIGHT_BITS)


def exact_dot(a: Shaped[Array, "... M H"], b: Shaped[Array, "... N H"]) -> Float[Array, "... M N"]:
    """Every row of a times every row of b, summed over H with one rounding at the end; float64.

    Rows are first rounded 33 (a) and 34 bits (b) below their norms. H is at most 512.

    Args:
      a, b: float32, bfloat16 or float16, or float64 of their range; leading axes broadcast.
    """
    with jax.enable_x64(True):
        left, right = left_digits(flush(a)), right_on_grid(flush(b))
        high, low = jnp.einsum("d...MH,...NH->d...MN", left, right)
        return high + low


def token_digits(
    x: Float[Array, "*shape H"],
) -> tuple[Int[Array, "*shape 1"], Float[Array, "*shape H2"]]:
    """Each row of channels as an exponent and two digits of 16 bits, the higher ones first.

    The digits of a row with a NaN are 0, so that no sum but those that its exponent reaches is NaN.
    """
    e = exponent(x, -1)
    integers = jnp.rint(x * power_of_two(VALUE_BITS - e))
    high = jnp.rint(integers * 2.0**-VALUE_DIGIT_BITS)
    digits = jnp.concatenate([high, integers - high * 2.0**VALUE_DIGIT_BITS], axis=-1)
    return e, jnp.where(e == NOT_A_NUMBER, 0.0, digits)


def finite(e: Int[Array, "..."]) -> Int[Array, "..."]:
    """Exponents with `LEAST_EXPONENT` in place of `NOT_A_NUMBER`."""
    return jnp.where(e == NOT_A_NUMBER, LEAST_EXPONENT, e)


def finite_power(e: Int[Array, "..."]) -> Float[Array, "..."]:
    """2^e of a token's exponent; finite for a token with a NaN or infinity, whose digits are 0.

    So a weight of 0 leaves such a token out. Queries that may attend to it become NaN by the logit,
    or by an anchor.
    """
    return power_of_two(finite(e))


def halves(x: Float[Array, "..."]) -> Float[Array, "2 ..."]:
    """An integer below 2^53 as two, which stay exact when many are added up."""
    high = jnp.rint(x * 2.0**-HALF_BITS)
    return jnp.stack([high, x - high * 2.0**HALF_BITS])


def joined(sums: Float[Array, "2 ..."]) -> Float[Array, "..."]:
    """Added halves as one float64: one rounding."""
    return pinned(sums[0] * 2.0**HALF_BITS + sums[1])


def row_bits(largest: Int[Array, "..."], total: Float[Array, "..."]) -> Int[Array, "..."]:
    """`b - E`: the exponent of the unit of a row's weights, negated.

    Args:
      largest: E of the row.
      total: t of the row.
    """
    bits = ROW_BITS - exponent(total[..., None], -1)[..., 0]
    return jnp.maximum(LEAST_WEIGHT_BITS, bits) - largest


def on_unit(d: Array, axis: int, unit: Array | None = None) -> tuple[Array, Array]:
    """d as integers, on the unit of its block, and the exponent of the largest along an axis."""
    u = exponent(d, axis) if unit is None else unit
    return jnp.rint(d * power_of_two(GRADIENT_BITS - u)), u


def slices(
    sums: Float[Array, "... H2"], unit: Int[Array, "..."], anchor: Int[Array, "..."], axis: int
) -> Float[Array, "2 ... H"]:
    """Sums of the high and of the low digits as integers far below an anchor, which add up exactly.

    Args:
      sums: of integers times digits, the high ones first, along an axis.
      unit: the exponent u of the block, of size 1 along that axis.
      anchor: A, likewise.
    """
    high, low = jnp.split(sums, 2, axis=axis)
    shift = unit - anchor + (SLICE_BITS[0] - GRADIENT_BITS - VALUE_DIGIT_BITS)
    total = []
    for part, digit_bits in ((high, 0), (low, VALUE_DIGIT_BITS)):
        y = part * power_of_two(shift - digit_bits)
        first = jnp.rint(y)
        total.append((first, jnp.rint((y - first) * 2.0 ** SLICE_BITS[1])))
    return jnp.stack([a + b for a, b in zip(*total, strict=True)])


def value(total: Float[Array, "2 ..."], anchor: Int[Array, "..."]) -> Float[Array, "..."]:
    """Float64 value of two sums of `slices` below an anchor, with one rounding."""
    return (total[0] + total[1] * 2.0 ** -SLICE_BITS[1]) * power_of_two(anchor - SLICE_BITS[0])


def weighted_sum(
    weights: Float[Array, "M S"], x: Shaped[Array, "S V"], tile: int = BLOCK
) -> Float[Array, "M V"]:
    """The sum over tokens of weight times token, on the unit that a row of weights finds; float64.

    Args:
      weights: at least 0, of float32.
      tile: tokens of one float64 sum, at most `BLOCK`; no bit depends on it.
    """
    with jax.enable_x64(True):
        e, digits = token_digits(flush(x))
        scaled = weights.astype(jnp.float64) * finite_power(e).T
        largest = exponent(scaled, -1)
        counted = jnp.ceil(scaled * power_of_two(NORM_BITS - largest))
        bits = row_bits(largest[:, 0], 1.0 + counted.sum(-1))[:, None]
        integers = jnp.rint(scaled * power_of_two(bits))
        sums = jnp.zeros((2, weights.shape[0], digits.shape[1]))
        for start in range(0, x.shape[0], tile):
            own = slice(start, start + tile)
            sums += halves(integers[:, own] @ digits[own])
        return row_value(joined(sums), bits, axis=1)


def row_value(sums: Float[Array, "..."], bits: Int[Array, "..."], axis: int) -> Float[Array, "..."]:
    """`(S1 2^16 + S0) 2^(E - b - 32)` of sums of digits, the high ones first along an axis."""
    high, low = jnp.split(sums, 2, axis=axis)
    return (high * 2.0**VALUE_DIGIT_BITS + low) * power_of_two(-bits - VALUE_BITS)


def gradient_sum(
    d: Float[Array, "M S"], x: Shaped[Array, "S H"], anchor: Int[Array, "M 1"], block: int = BLOCK
) -> Float[Array, "M H"]:
    """The sum over tokens of d times token, block by block, 70 bits below an anchor; float64.

    Args:
      d: |d x| is below 2^anchor, row by row.
      block: tokens that share one unit. The bits depend on it.
    """
    with jax.enable_x64(True):
        e, digits = token_digits(flush(x))
        scaled = d.astype(jnp.float64) * finite_power(e).T
        total = jnp.zeros((2, d.shape[0], x.shape[1]))
        for start in range(0, x.shape[0], block):
            own = slice(start, start + block)
            integers, unit = on_unit(scaled[:, own], 1)
            total += slices(integers @ digits[own], unit, anchor, axis=1)
        return value(total, anchor)


def out(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x rounded to float32; no -0, no subnormal, one NaN."""
    x = round32(x)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return _one_nan(jnp.where(bits << 1 == 0, jnp.uint32(0), bits), x.dtype)


def narrowed(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Results of `out`, rounded to 16 bits if that is the dtype.

    XLA converts a NaN to other bits on other platforms, so every NaN becomes the one of `_one_nan`.
    """
    if dtype == x.dtype:
        return x
    bits = jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)
    return _one_nan(jnp.where(bits << 1 == 0, jnp.uint16(0), bits), dtype)


def _one_nan(bits: Integer[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """The numbers of these bits, but for every NaN the quiet one with sign and payload 0.

    The selection is made on integers, as a compiler may drop a selection between two NaNs.
    """
    infinity, nan = (jnp.asarray(np.array(x, dtype).view(bits.dtype)) for x in (np.inf, np.nan))
    magnitude = bits & jnp.asarray(jnp.iinfo(bits.dtype).max >> 1, bits.dtype)
    bits = jnp.where(magnitude > infinity, nan, bits)
    return jax.lax.bitcast_convert_type(bits, dtype)
