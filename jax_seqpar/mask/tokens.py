"""Runs of tokens of the whole sequence, and loops over blocks of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


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
        """These tokens of an array of the whole sequence; an axis of size 1 broadcasts."""
        if x.shape[axis] == 1:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, axis)

    def block(self, start: Any, size: int) -> "Tokens":
        """Tokens `start ... start + size` of these."""
        return Tokens(self.start + start, size)

    def tree_flatten(self) -> Any:
        if isinstance(self.start, int):
            return (), (self.start, self.size)
        return (self.start,), (None, self.size)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: Any) -> "Tokens":
        start, size = static
        # Not by the constructor: a transformation puts other things in place of the array.
        tokens = object.__new__(cls)
        object.__setattr__(tokens, "start", leaves[0] if leaves else start)
        object.__setattr__(tokens, "size", size)
        return tokens


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


def full(shape: tuple[int, ...], value: float | int, dtype: Any, like: Any) -> Array:
    """`jnp.full` with the varying mesh axes of `like`: an initial loop carry.

    Args:
      like: a tree of arrays.
    """
    # Computed from the arrays, as a vmap may let them vary over more axes than their types say now.
    # Only the types matter: the compiler knows that the sum is 0.
    marks = [(x != x).ravel()[:1].astype(jnp.int32) for x in jax.tree.leaves(like) if x.size]
    nothing = sum((jnp.sum(x, dtype=jnp.int32) * 0 for x in marks), start=jnp.int32(0))
    return jnp.full(shape, value, dtype) + nothing.astype(dtype)


def match_varying_axes(tree: Any) -> Any:
    """The arrays of a tree, each cast to vary over every mesh axis that some of them vary over.

    A gradient varies as everything that it is computed from. The derivative of the cast adds up the
    gradients of an array that was the same on several devices.
    """
    axes = varying_axes(tree)
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def varying_axes(tree: Any) -> frozenset[str]:
    """The manual mesh axes that some array of a tree varies over."""
    leaves = jax.tree.leaves(tree)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def _vary(x: Array, axes: frozenset[str]) -> Array:
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
