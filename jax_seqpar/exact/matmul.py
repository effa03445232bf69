"""Products of float32 matrices as sums of integers: the same bits by every engine, on every mesh.

Rows and columns are rounded 24 bits below the largest number of each along the summed axes. The
sum of their products is an exact integer, which an engine finds (`engines.py`) and which is rounded
once. Everything but the products of some engines is made of integers, as a TPU has no float64.

Global arrays only: a compiler that shards a sum over devices adds up integers. Products of arrays
are written as einsums, so that no axis has to be merged with another that lies elsewhere on a mesh.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from .._checks import Shape
from .arithmetic import LEAST_EXPONENT, NOT_A_NUMBER
from .engines import MOST_TERMS, Engine, count_terms, float64_products, int8_products
from .fixed_point import exponents, largest_exponent, nearest, on_grid, sum_of_parts

# The first width whose error is that of float32 (0.83 of it; 22 bits have 2.8 times that).
OPERAND_BITS = 24

# Numbers, and the exponent beside each: its own, or that of its product with a power of two.
Numbers = tuple[Float32[Array, "..."], Int[Array, "..."]]


def matmul(
    letters: str,
    a: Float32[Array, "..."],
    b: Float32[Array, "..."],
    *,
    engine: Engine | None = None,
    out_sharding: Any = None,
) -> Float32[Array, "..."]:
    """`mm` of the specification: `einsum(letters, a, b)` of operands on grids, rounded once.

    Call inside `jax.enable_x64(True)`.

    Args:
      letters: an einsum of two arrays whose letters are all in the output or in both operands.
      engine: how the integer sum is found, that of the platform if None: `int8_products` of
        `jax_seqpar.exact.engines` on a TPU, `float64_products` elsewhere. It changes no bit.
      out_sharding: as for `jnp.einsum`.

    Raises:
      ValueError: for 2^27 terms in a sum, and more, and for operands that are not float32.
    """
    _check_float32(a, b)
    return _on_grids(letters, (a, exponents(a)), (b, exponents(b)), engine, out_sharding)


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

    Raises:
      ValueError: for 2^27 tokens and more.
    """
    _check_float32(x, dy)
    return _on_grids(letters, *balanced(letters, x, dy), engine, out_sharding)


def balanced(
    letters: str, x: Float32[Array, "..."], dy: Float32[Array, "..."]
) -> tuple[Numbers, Numbers]:
    """Both operands of `balanced_matmul`, with the exponents that the balance of a token leaves."""
    first, second, summed = _parts(letters)
    e, f = exponents(x), exponents(dy)

    def of_tokens(e: Array, own: str) -> Array:
        features = tuple(i for i, c in enumerate(own) if c not in summed)
        return _lined_up(largest_exponent(e, features), own, summed)

    of_x, of_dy = of_tokens(e, first), of_tokens(f, second)
    balance = (of_x - of_dy) // 2
    # A token with a NaN is NaN altogether.
    balance = jnp.where(jnp.maximum(of_x, of_dy) == NOT_A_NUMBER, NOT_A_NUMBER, balance)
    e = _moved(e, -1, _lined_up(balance, summed, first))
    f = _moved(f, 1, _lined_up(balance, summed, second))
    return (x, e), (dy, f)


def _moved(e: Int[Array, "..."], sign: int, balance: Int[Array, "..."]) -> Int[Array, "..."]:
    """Exponents of numbers, of which 0 has the least one, times a power of two."""
    moved = jnp.where(e == LEAST_EXPONENT, e, e + sign * balance)
    return jnp.where(balance == NOT_A_NUMBER, NOT_A_NUMBER, moved)


def _on_grids(
    letters: str, a: Numbers, b: Numbers, engine: Engine | None, out_sharding: Any
) -> Float32[Array, "..."]:
    check_terms(letters, a[0].shape, b[0].shape)
    largest = largest_exponents(letters, a, b)
    sums = integer_sums(letters, a, b, largest, engine, out_sharding)
    return rounded_sum(letters, sums, largest)


def largest_exponents(letters: str, a: Numbers, b: Numbers) -> tuple[Array, Array]:
    """Largest exponent of each row of a and column of b; summed axes stay, of size 1."""
    *operands, summed = _parts(letters)
    e, f = (
        largest_exponent(x[1], tuple(i for i, c in enumerate(own) if c in summed))
        for x, own in zip((a, b), operands, strict=True)
    )
    return e, f


def integer_sums(
    letters: str,
    a: Numbers,
    b: Numbers,
    largest: tuple[Array, Array],
    engine: Engine | None,
    out_sharding: Any,
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """high and low of `S = high 2^32 + low`, int64, of operands whose exponents are up to these.

    Sums of several sets of terms add up, high to high and low to low, if the largest exponents are
    those of all terms.
    """
    integers = (on_grid(*x, most, OPERAND_BITS) for x, most in zip((a, b), largest, strict=True))

    def by(engine: Engine) -> Any:
        return lambda a, b: sum_of_parts(engine(letters, a, b, out_sharding))

    if engine is not None:
        return by(engine)(*integers)
    return jax.lax.platform_dependent(
        *integers, tpu=by(int8_products), default=by(float64_products)
    )


def rounded_sum(
    letters: str, sums: tuple[Array, Array], largest: tuple[Array, Array]
) -> Float32[Array, "..."]:
    """`S 2^(e + f - 48)`, rounded once; high and low as of `integer_sums`, or sums of these."""
    first, second, _ = _parts(letters)
    output = letters.split("->")[1]
    e, f = (_lined_up(x, own, output) for x, own in zip(largest, (first, second), strict=True))
    high, low = sums
    return nearest(*sum_of_parts([(32, high), (0, low)]), e + f - 2 * OPERAND_BITS)


def check_terms(letters: str, a: Shape, b: Shape) -> None:
    """Raises ValueError for more terms in a sum than engines have room for."""
    terms, (*_, summed) = count_terms(letters, a), _parts(letters)
    if terms > MOST_TERMS:
        raise ValueError(
            f"exact products have room for fewer than 2^27 terms in a sum, got {terms} along "
            f"{summed!r} of {letters!r}, {a} and {b}. Write a smaller batch, and add the gradients "
            f"of several by jax_seqpar.exact.accumulation.accumulated_value_and_grad."
        )


def _check_float32(*operands: Array) -> None:
    """Raises ValueError for another dtype, whose bits would pass for those of float32."""
    for x in operands:
        if x.dtype != jnp.float32:
            raise ValueError(
                f"operands of exact products must be float32, got {x.dtype} of {x.shape}. Write "
                f"x.astype(jnp.float32)."
            )


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
