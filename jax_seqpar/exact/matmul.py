"""Products of float32 matrices as sums of integers: the same bits by every engine, on every mesh.

Rows and columns are rounded `OPERAND_BITS` below the largest number of each along the summed axes.
The sum of their products is an exact integer, which is rounded once. Products of arrays are written
as einsums, so that no axis has to be merged with another that lies elsewhere on a mesh.

Global arrays only: a compiler that shards a sum over devices adds up integers.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from .arithmetic import exponent, flush, power_of_two
from .rounding import nearest

# The first width whose error is that of float32 (0.83 of it; 22 bits have 2.8 times that).
OPERAND_BITS = 24
LOW_DIGIT_BITS = 12
# Terms of two digit products that float64 has room for: 2^24 * 2^12 * 2^17 = 2^53.
MOST_TERMS = 1 << 17
# Of 8 bits with a sign, which hold 2^24 itself.
DIGITS = 4

Engine = Callable[[str, Array, Array, Any], tuple[Array, Array, int]]


def matmul(
    letters: str,
    a: Float32[Array, "..."],
    b: Float32[Array, "..."],
    *,
    engine: Engine | None = None,
    out_sharding: Any = None,
) -> Float32[Array, "..."]:
    """`mm` of the specification: `einsum(letters, a, b)` of operands on grids, rounded once.

    Args:
      letters: an einsum of two arrays whose letters are all in the output or in both operands.
      engine: how the integer sum is found, `float64_products` if None; it changes no bit.
      out_sharding: as for `jnp.einsum`.

    Raises:
      ValueError: for more terms in a sum than 53 bits have room for.
    """
    return _on_grids(letters, flush(a), flush(b), engine, out_sharding)


def balanced_matmul(
    letters: str,
    x: Float32[Array, "..."],
    dy: Float32[Array, "..."],
    *,
    engine: Engine | None = None,
    out_sharding: Any = None,
) -> Float32[Array, "..."]:
    """`mmT` of the specification: a sum over tokens, each of them balanced first.

    A power of two moves from the activation to the gradient of each token until both have exponents
    as near as can be, so that a token with a large activation and a small gradient takes no bits
    from the others of its column.

    Args:
      letters: an einsum whose summed letters are the tokens.
      x, dy: the activation and the gradient; the floor in the balance is not symmetric.
      engine, out_sharding: as for `matmul`.
    """
    x, dy = balanced(letters, flush(x), flush(dy))
    return _on_grids(letters, x, dy, engine, out_sharding)


def balanced(
    letters: str, x: Float[Array, "..."], dy: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both operands of `balanced_matmul`, flushed, after the balance of each token."""
    first, second, summed = _parts(letters)
    features_x, features_dy = (
        tuple(i for i, c in enumerate(own) if c not in summed) for own in (first, second)
    )
    balance = (
        _lined_up(exponent(x, features_x), first, summed)
        - _lined_up(exponent(dy, features_dy), second, summed)
    ) // 2
    x = x * power_of_two(-_lined_up(balance, summed, first))
    dy = dy * power_of_two(_lined_up(balance, summed, second))
    return x, dy


def _on_grids(
    letters: str, a: Array, b: Array, engine: Engine | None, out_sharding: Any
) -> Float32[Array, "..."]:
    e, f = operand_exponents(letters, a, b)
    high, low = integer_sums(letters, (a, e), (b, f), engine, out_sharding)
    return rounded_sum(letters, high, low, e, f)


def operand_exponents(
    letters: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Exponents of flushed operands along the summed axes, which stay, of size 1."""
    *operands, summed = _parts(letters)
    e, f = (
        exponent(x, tuple(i for i, c in enumerate(own) if c in summed))
        for x, own in zip((a, b), operands, strict=True)
    )
    return e, f


def integer_sums(
    letters: str,
    a: tuple[Array, Array],
    b: tuple[Array, Array],
    engine: Engine | None = None,
    out_sharding: Any = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """S of operands, each with its exponents, in two float64: the higher digits and the lower ones.

    Sums of several sets of terms add up, high to high and low to low, if the exponents are those of
    all terms, of which there are at most `MOST_TERMS`.
    """
    x, y = (jnp.rint(x * power_of_two(OPERAND_BITS - e)) for x, e in (a, b))
    high, low, bits = (engine or float64_products)(letters, x, y, out_sharding)
    return high * 2.0**bits, low


def rounded_sum(letters: str, high: Array, low: Array, e: Array, f: Array) -> Float32[Array, "..."]:
    """`R((high + low) 2^(e + f - 48))`, the sum rounded once to float64."""
    first, second, _ = _parts(letters)
    output = letters.split("->")[1]
    e = _lined_up(e, first, output) + _lined_up(f, second, output)
    return nearest((high + low) * power_of_two(e - 2 * OPERAND_BITS))


def _parts(letters: str) -> tuple[str, str, str]:
    """The letters of both operands, and those that are summed."""
    operands, output = letters.split("->")
    first, second = operands.split(",")
    return first, second, "".join(c for c in first if c not in output)


def _lined_up(x: Int[Array, "..."], own: str, other: str) -> Int[Array, "..."]:
    """x with the axes of other letters, in their order: of size 1 where it has none of them.

    Letters that `other` lacks are of size 1 in x.
    """
    x = jnp.squeeze(x, tuple(i for i, c in enumerate(own) if c not in other))
    own = "".join(c for c in own if c in other)
    x = jnp.transpose(x, [own.index(c) for c in other if c in own])
    return jnp.expand_dims(x, tuple(i for i, c in enumerate(other) if c not in own))


def float64_products(
    letters: str, a: Float[Array, "..."], b: Float[Array, "..."], out_sharding: Any
) -> tuple[Array, Array, int]:
    """Two float64 products, with the higher and the lower digits of b: for CPUs, and GPUs."""
    first, second, summed = _parts(letters)
    check_terms(letters, math.prod(a.shape[first.index(c)] for c in summed))
    high = jnp.rint(b * 2.0**-LOW_DIGIT_BITS)
    # One product of matrices, as a compiler that shards the sum may add two of them too early.
    digits = jnp.stack([high, b - high * 2.0**LOW_DIGIT_BITS])
    output = letters.split("->")[1]
    spelled = f"{first},Z{second}->Z{output}"
    sharding = _with_whole_axes(1, out_sharding)
    sums = jnp.einsum(spelled, a, digits, precision="highest", out_sharding=sharding)
    return sums[0], sums[1], LOW_DIGIT_BITS


def int8_products(
    letters: str, a: Float[Array, "..."], b: Float[Array, "..."], out_sharding: Any
) -> tuple[Array, Array, int]:
    """Sixteen products of digits of 8 bits, added up in int32: for units of int8.

    A sum of fewer than 2^17 products of two digits, each of at most 2^14, is below 2^31.
    """
    first, second, _ = _parts(letters)
    output = letters.split("->")[1]
    spelled = f"Y{first},Z{second}->YZ{output}"
    sums = jnp.einsum(
        spelled,
        _digits(a),
        _digits(b),
        preferred_element_type=jnp.int32,
        out_sharding=_with_whole_axes(2, out_sharding),
    ).astype(jnp.int64)
    # By the power of 2^8 of their digits: those below 2^24 are one half, the others the other.
    low = high = jnp.zeros_like(sums[0, 0])
    for i, k in itertools.product(range(DIGITS), repeat=2):
        if i + k < DIGITS - 1:
            low = low + (sums[i, k] << 8 * (i + k))
        else:
            high = high + (sums[i, k] << 8 * (i + k - DIGITS + 1))
    bits = 8 * (DIGITS - 1)
    # The carry of the lower half, so that what is left of it is below the last bit of the higher.
    carry = low >> bits
    return (high + carry).astype(jnp.float64), (low - (carry << bits)).astype(jnp.float64), bits


def _with_whole_axes(count: int, sharding: Any) -> Any:
    """A sharding of arrays with so many axes before the others, whole on each device."""
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * count, *sharding.spec))


def _digits(x: Float[Array, "..."]) -> Int[Array, "4 ..."]:
    """Four digits of -128 to 127, the lowest first, of integers up to 2^24 in size."""
    rest, digits = x.astype(jnp.int32), []
    for _ in range(DIGITS):
        digit = ((rest + 128) & 255) - 128
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) >> 8
    return jnp.stack(digits)


def check_terms(letters: str, terms: int) -> None:
    """Raises ValueError for more terms in a sum than 53 bits have room for."""
    if terms > MOST_TERMS:
        raise ValueError(
            f"a sum of {terms} terms has no room in the 53 bits of float64, which has it for "
            f"{MOST_TERMS}. Split the {_parts(letters)[2]!r} axes of {letters!r}, and add the "
            f"parts with jax_seqpar.exact.rounding.add."
        )
