"""The manual mesh axes that an array varies over, which its type says inside a `jax.shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def full_varying(shape: tuple[int, ...], value: float | int, dtype: Any, like: Any) -> Array:
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
