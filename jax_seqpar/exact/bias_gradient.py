"""The gradient of a bias: exact sums of ds, whose unit is found while they are added up.

An entry of a bias that has axes of size 1 is added to many logits. Its sum is held as three digits
of 26 bits below an exponent G, a multiple of 26. Where a block has a larger number than all before
it, G grows and the digits move down: those of a number lie at fixed places, whatever G is.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import AnyTokens, Tokens
from ..varying_axes import full_varying, varying_axes
from .arithmetic import LEAST_EXPONENT, NOT_A_NUMBER, exponent, narrowed, out, pinned, power_of_two

DIGIT_BITS = 26
LEAST = -(-LEAST_EXPONENT // DIGIT_BITS) * DIGIT_BITS  # G of nothing
MOST_SUMMANDS = 1 << 27  # of 26 bits, in 53


class BiasSums(NamedTuple):
    """The sum of ds for each entry of a bias, of the queries that an array holds: `[B, N, S, T]`.

    Keys down, as ds lie; rows as the array has them.

    Attributes:
      exponent: G, int32.
      first, second, third: the sums of the digits of ds.
    """

    exponent: Array
    first: Array
    second: Array
    third: Array

    @property
    def digits(self) -> tuple[Array, Array, Array]:
        return self[1:]

    @classmethod
    def of_nothing(cls, shape: tuple[int, ...], queries: int, operands: Any) -> "BiasSums":
        """Initial carry of a loop, with the varying mesh axes of the operands.

        Args:
          shape: of the bias.
          queries: T of the array.
        """
        B, N, T, S = shape
        shape = (B, N, S, min(T, queries))
        digits = (full_varying(shape, 0, jnp.float64, operands) for _ in range(3))
        return cls(full_varying(shape, LEAST, jnp.int32, operands), *digits)

    def add(self, ds: Array, b: Any, n: Any, queries: Tokens, keys: Tokens) -> "BiasSums":
        """The sums with the ds `[s, t]` of one block.

        Args:
          b, n: the sequence and the query head.
          queries, keys: the tokens of the block, counted from the first of the arrays.
        """
        ds, shape = ds[None, None], self.exponent.shape
        at = zip(shape, (b, n, keys.start, queries.start), strict=True)
        start = [jnp.asarray(0 if size == 1 else i, jnp.int32) for size, i in at]
        size = tuple(min(pair) for pair in zip(shape, ds.shape, strict=True))
        own = BiasSums(*(jax.lax.dynamic_slice(x, start, size) for x in self))
        summed = tuple(axis for axis in (2, 3) if size[axis] == 1)
        larger = jnp.maximum(own.exponent, _multiple(exponent(ds, summed)))
        # The condition, true or not, keeps XLA:CPU from a loop that reads one array and writes
        # another in place, before which it copies them whole: for every block of 256 x 256.
        grows = (larger > own.exponent).any()
        own = jax.lax.cond(grows, lambda own: own.below(larger), lambda own: own, own)
        parts = (x.sum(summed, keepdims=True) for x in _digits(ds, own.exponent))
        added = (x + part for x, part in zip(own.digits, parts, strict=True))
        pairs = zip(self, (own.exponent, *added), strict=True)
        return BiasSums(*(jax.lax.dynamic_update_slice(x, part, start) for x, part in pairs))

    def below(self, exponent: Array) -> "BiasSums":
        """The same sums below an exponent G at least as large: digits far below G are lost."""
        places = jnp.clip((exponent - self.exponent) // DIGIT_BITS, 0, 3)
        first, second, third = self.digits
        nothing = jnp.zeros_like(first)
        return BiasSums(
            exponent,
            jax.lax.select_n(places, first, nothing, nothing, nothing),
            jax.lax.select_n(places, second, first, nothing, nothing),
            jax.lax.select_n(places, third, second, first, nothing),
        )

    def in_sequence(self, held: AnyTokens | None, tokens: int) -> "BiasSums":
        """The sums of the whole bias, of nothing for the queries of other devices.

        Args:
          held: the tokens that the array holds; None where it has all.
          tokens: T of the bias.
        """
        if held is None or tokens == 1:
            return self

        def placed(x: Array, nothing: int) -> Array:
            whole = full_varying((*x.shape[:-1], tokens), nothing, x.dtype, x)
            return whole.at[..., held.numbers].set(x)

        return BiasSums(placed(self.exponent, LEAST), *(placed(x, 0) for x in self.digits))

    def total(self, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
        """The gradient `[B, N, T, S]`, of all the devices along mesh axes."""
        met = self.below(jax.lax.pmax(self.exponent, axes)) if axes else self
        first, second, third = jax.lax.psum(met.digits, axes) if axes else met.digits
        digit = 2.0**DIGIT_BITS
        value = pinned(first * digit + second) * digit + third
        value = value * power_of_two(met.exponent - 3 * DIGIT_BITS)
        return narrowed(out(value), dtype).swapaxes(2, 3)


def axes_to_sum(bias: Array, operands: Any) -> tuple[str, ...]:
    """The mesh axes whose devices have summands of the same entries: those that the bias is not
    sharded over, and that something else is."""
    return tuple(sorted(varying_axes((bias, operands)) - varying_axes(bias)))


def check_summands(bias: Any, shape: tuple[int, ...], operands: Any) -> None:
    """Raises ValueError where the gradient of a bias cannot be an exact sum.

    Args:
      shape: B, N, T and S of this device.
      operands: query, key and value.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and not varying_axes(jax.lax.axis_index(manual[0])):
        raise ValueError(
            f"exact attention has no gradient for bias {bias.shape} in a jax.shard_map with "
            f"check_vma=False, where it cannot know which devices share the bias. Write "
            f"check_vma=True, or jax.lax.stop_gradient(bias)."
        )
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes_to_sum(bias, operands))
    added = [n for n, size in zip(shape, bias.shape, strict=True) if size == 1]
    if math.prod(added) * devices > MOST_SUMMANDS:
        raise ValueError(
            f"exact attention has room for 2^27 logits in the gradient of one entry of a bias, got "
            f"{math.prod(added)} on {devices} devices. Got bias {bias.shape} of [B, N, T, S] = "
            f"{shape}. Write jax.lax.stop_gradient(bias)."
        )


def _multiple(e: Array) -> Array:
    return jnp.where(e == NOT_A_NUMBER, e, -(-e // DIGIT_BITS) * DIGIT_BITS)


def _digits(x: Array, exponent: Array) -> tuple[Array, Array, Array]:
    """Three digits of x, each with the sign of x; |x| is below 2^exponent."""
    first = x * power_of_two(DIGIT_BITS - exponent)
    second = (first - jnp.trunc(first)) * 2.0**DIGIT_BITS
    third = (second - jnp.trunc(second)) * 2.0**DIGIT_BITS
    return jnp.trunc(first), jnp.trunc(second), jnp.trunc(third)
