"""Engines of products of integers: what a machine adds up exactly, and how many products it takes.

An engine finds the sums of products of integers up to 2^24 in size, as an einsum, without a
rounding. The integers are split into digits so narrow that the sum of all products of two digits
has room in the numbers that the machine adds up in, wherever the terms lie on a mesh. Where there
is room, one product of sums of digits stands in for two (Karatsuba and Ofman 1962).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from .._checks import Shape

# Three products of float64: a digit of 13 bits is up to 2^12, the sum of two up to 2^13, and
# 2^13 2^13 2^27 = 2^53.
MOST_TERMS = (1 << 27) - 1
# Two, of a whole operand and a digit of 13 bits: 2^24 2^12 2^17 = 2^53.
TERMS_OF_TWO = 1 << 17
# Ten products of int8, of sums of two digits of 7 bits, up to 2^7: 2^14 2^17 = 2^31 is one more
# than int32 holds.
TERMS_OF_TEN = (1 << 17) - 1
# Most terms by the number n of digits, with n^2 products; digits are up to 2^6, 2^4, 2^3, 2^2.
DIGITS_BY_TERMS = {4: (1 << 19) - 1, 5: (1 << 23) - 1, 7: (1 << 25) - 1, 9: MOST_TERMS}

# Sums of integers, int64, each with the bits b of the 2^b that it counts for.
Parts = list[tuple[int, Int[Array, "..."]]]
Engine = Callable[[str, Int[Array, "..."], Int[Array, "..."], Any], Parts]
# Sums of products of two lists of digits, by the power of their base.
Multiply = Callable[[list[Array], list[Array]], list[Array]]


def float64_products(
    letters: str, a: Int[Array, "..."], b: Int[Array, "..."], out_sharding: Any
) -> Parts:
    """Two products of float64, three of more than 2^17 terms: for CPUs, and for GPUs.

    Args:
      letters, out_sharding: as for `jnp.einsum`.
      a, b: int32, up to 2^24 in size.

    Returns:
      parts, of which `sum part 2^bits` is the einsum.
    """
    times = partial(_times, letters, jnp.float64, jnp.float64, out_sharding)
    digits, width = _digits(b, 2)
    if count_terms(letters, a.shape) <= TERMS_OF_TWO:
        return _by_bits(width, _schoolbook(times, [a], digits))
    return _by_bits(width, _karatsuba(partial(_schoolbook, times), _digits(a, 2)[0], digits))


def int8_products(
    letters: str, a: Int[Array, "..."], b: Int[Array, "..."], out_sharding: Any
) -> Parts:
    """Ten products of int8 added up in int32, 16 to 81 of 2^17 terms and more: for TPUs.

    A TPU has no float64, and units for int8 that are as fast as those for bfloat16, or twice that.
    Args and result are those of `float64_products`.
    """
    times = partial(_times, letters, jnp.int8, jnp.int32, out_sharding)
    terms = count_terms(letters, a.shape)
    count = next(n for n, most in DIGITS_BY_TERMS.items() if terms <= most)
    (x, width), (y, _) = _digits(a, count), _digits(b, count)
    schoolbook = partial(_schoolbook, times)
    if terms > TERMS_OF_TEN:
        return _by_bits(width, schoolbook(x, y))
    # The sums of two digits have room in int8, those of all four have none.
    return _by_bits(width, _karatsuba(partial(_karatsuba, schoolbook), x, y, of_sums=schoolbook))


def count_terms(letters: str, a: Shape) -> int:
    """Number of products in each sum of an einsum, from the shape of its first operand."""
    operands, output = letters.split("->")
    first = operands.split(",")[0]
    return math.prod(size for c, size in zip(first, a, strict=True) if c not in output)


def _times(
    letters: str, dtype: Any, sums: Any, out_sharding: Any, x: Array, y: Array
) -> Int[Array, "..."]:
    """Sums of products of digits in a dtype, exact in the dtype of the sums, as int64."""
    x, y = x.astype(dtype), y.astype(dtype)
    # To int64 at once: of two all-reduces of float64 a compiler would make one of their sum, which
    # has no room.
    return jnp.einsum(
        letters,
        x,
        y,
        precision="highest",
        preferred_element_type=sums,
        out_sharding=out_sharding,
    ).astype(jnp.int64)


def _digits(x: Int[Array, "..."], count: int) -> tuple[list[Array], int]:
    """Digits, the lowest first, and how many bits each has, from half of -2^bits to half of 2^bits.

    Digits are of integers up to 2^24, which are 25 bits.
    """
    bits = -(-25 // count)
    half, found = 1 << (bits - 1), []
    for _ in range(count - 1):
        digit = ((x + half) & (2 * half - 1)) - half
        found.append(digit)
        x = (x - digit) >> bits
    return [*found, x], bits


def _schoolbook(
    times: Callable[[Array, Array], Array], x: list[Array], y: list[Array]
) -> list[Array]:
    """Every digit of x times every digit of y."""
    found: list[Any] = [0] * (len(x) + len(y) - 1)
    for i, p in enumerate(x):
        for k, q in enumerate(y):
            found[i + k] += times(p, q)
    return found


def _karatsuba(
    multiply: Multiply, x: list[Array], y: list[Array], of_sums: Multiply | None = None
) -> list[Array]:
    """Halves by `multiply`, and their sums by `of_sums`: three products in place of four."""
    half = len(x) // 2
    low, high = multiply(x[:half], y[:half]), multiply(x[half:], y[half:])
    sums = ([p + q for p, q in zip(z[:half], z[half:], strict=True)] for z in (x, y))
    of_both = (of_sums or multiply)(*sums)
    found: list[Any] = [0] * (4 * half - 1)
    for k, (p, q, r) in enumerate(zip(low, of_both, high, strict=True)):
        found[k] += p
        found[k + half] += q - p - r
        found[k + 2 * half] += r
    return found


def _by_bits(width: int, sums: list[Array]) -> Parts:
    return [(width * power, part) for power, part in enumerate(sums)]
