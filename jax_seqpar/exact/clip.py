"""Gradients scaled so that their norm over all tensors is at most a limit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float32

from .rounding import divide, multiply, square_root, total


def global_norm(tree: Any) -> Float32[Array, ""]:
    """`R(sqrt(total of the totals of g (*) g))`.

    Each tensor has a total over its last axis, then a total of these; then one over the tensors.
    """
    with jax.enable_x64(True):
        squares = jnp.stack([_squares(leaf) for leaf in jax.tree.leaves(tree)])
        return square_root(total(squares, 0)[0])


def _squares(x: Array) -> Array:
    x = jnp.atleast_1d(x)
    rows = total(multiply(x, x), -1)
    return total(rows, tuple(range(rows.ndim))).reshape(())


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """`g (*) (C (/) norm)` where the norm is above C.

    Args:
      limit: C, rounded to float32; infinity never scales.

    Raises:
      ValueError: for a limit that is not above 0 in float32.
    """
    if not isinstance(limit, Tracer) and not np.float32(limit) > 0:
        raise ValueError(
            f"limit must be above 0 in float32, got {limit!r}: 0 makes every gradient 0, a "
            f"negative limit changes their signs, and NaN never clips. Write 1.0."
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm, bound = global_norm(updates), jnp.float32(limit)
        with jax.enable_x64(True):
            factor = divide(bound, norm)
            clipped = jax.tree.map(
                lambda g: jnp.where(norm > bound, multiply(g, factor), g), updates
            )
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
