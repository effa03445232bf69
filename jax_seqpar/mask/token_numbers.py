"""Tokens of the whole sequence that an array holds, and loops over blocks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Tokens:
    """Tokens `start ... start + size` of the whole sequence.

    Attributes:
      start: a Python integer, which is static, or a traced one.
      size: how many tokens; static.
    """

    start: int | Int[Array, ""]
    size: int

    @property
    def numbers(self) -> Int[Array, "size"]:
        """The number of each token in the sequence, counted from 0."""
        # int32, whether the caller has switched 64 bits on or not.
        return jnp.asarray(self.start, jnp.int32) + jnp.arange(self.size, dtype=jnp.int32)

    def slice(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """Slice of an array of the whole sequence at these tokens; an axis of size 1 broadcasts."""
        if x.shape[axis] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def block(self, start: Any, size: int) -> "Tokens":
        """Tokens `start ... start + size` of these."""
        if not isinstance(start, int):
            start = jnp.asarray(start, jnp.int32)  # with 64 bits on, loops count in int64
        return Tokens(self.start + start, size)

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Half-open range of numbers that holds them all."""
        return self.start, self.start + self.size

    def within(self, low: Any, high: Any) -> tuple[Any, Any]:
        """Half-open range, counted from the first of these, of those numbered `low ... high`."""
        return low - self.start, high - self.start

    def tree_flatten(self) -> Any:
        if type(self.start) is int:  # not True, which a transformation puts in place of an array
            return (), (self.start, self.size)
        return (self.start,), (None, self.size)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "Tokens":
        start, size = static
        # Made without the constructor: a transformation puts other objects in place of the array.
        tokens = object.__new__(cls)
        object.__setattr__(tokens, "start", leaves[0] if leaves else start)
        object.__setattr__(tokens, "size", size)
        return tokens


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class TokenList:
    """Tokens of the whole sequence by their numbers, in the order in which an array holds them.

    Two halves of a zigzag, every eighth token of a striped order, the slots of a cache. It has what
    `Tokens` has, but for a start.

    Attributes:
      numbers: each once, counted from 0.
      ascending: whether each is known to be larger than the one before it; static.
    """

    numbers: Int[Array, "size"]
    ascending: bool = False

    @property
    def size(self) -> int:
        return self.numbers.shape[0]

    def slice(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        if x.shape[axis] == 1:
            return x
        return jnp.take(x, self.numbers, axis, mode="clip")

    def block(self, start: Any, size: int) -> "TokenList":
        part = jax.lax.dynamic_slice_in_dim(self.numbers, start, size)
        return TokenList(part, self.ascending)

    @property
    def bounds(self) -> tuple[Array, Array]:
        return self.numbers.min(), self.numbers.max() + 1

    def within(self, low: Any, high: Any) -> tuple[Array, Array]:
        """Half-open range of places that has all of those numbered `low ... high`, and others."""
        return places((self.numbers >= low) & (self.numbers < high))

    def tree_flatten(self) -> Any:
        return (self.numbers,), self.ascending

    @classmethod
    def tree_unflatten(cls, ascending: bool, leaves: Any) -> "TokenList":
        tokens = object.__new__(cls)  # as `Tokens` does
        object.__setattr__(tokens, "numbers", leaves[0])
        object.__setattr__(tokens, "ascending", ascending)
        return tokens


AnyTokens = Tokens | TokenList


def places(some: Bool[Array, "size"]) -> tuple[Array, Array]:
    """Half-open range from the first to the last True; empty if all are False."""
    size = some.shape[0]
    numbers = jnp.arange(size, dtype=jnp.int32)
    return jnp.where(some, numbers, size).min(), jnp.where(some, numbers + 1, 0).max()


def for_blocks(
    tokens: int, size: int, bounds: tuple[Any, Any], body: Callable[..., Any], carry: Any
) -> Any:
    """`carry = body(block, fresh, carry)` for the blocks that overlap the half-open range `bounds`.

    The last block ends with the last token, so it may begin inside the one before it. `fresh` is
    False for tokens that the previous block has covered already, and None where no blocks overlap.
    """

    def step(i: Array, carry: Any) -> Any:
        if tokens % size == 0:
            return body(Tokens(i * size, size), None, carry)
        block = Tokens(jnp.minimum(i * size, tokens - size), size)
        return body(block, block.numbers >= i * size, carry)

    low, high = bounds
    return jax.lax.fori_loop(low // size, (high + size - 1) // size, step, carry)


def write(x: Array, part: Array, block: Tokens, axis: int) -> Array:
    """x with a block of tokens replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, block.start, axis)
