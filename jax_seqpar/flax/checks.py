"""Checks of the arrays that every Flax layer makes."""

from typing import Any

import jax.numpy as jnp

from .._checks import check_has_numbers, check_is_array


def check_array(name: str, x: Any) -> None:
    """Raises ValueError for a list, a number, or the shape of an array without its data."""
    check_is_array(name, x)
    check_has_numbers({name: x})


def check_floats(name: str, x: Any) -> None:
    """Raises ValueError unless x is an array of floats."""
    check_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must have a floating dtype, got {x.dtype}. Write {name}.astype(jnp.float32), "
            f"or embed the tokens first."
        )


def check_integers(name: str, x: Any) -> None:
    """Raises ValueError unless every number is an integer."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers, got {x.dtype}. For scaled positions give "
            f"Rotary(frequencies=...)."
        )


def check_tokens(x: Any, features: int, positions: Any, segment_ids: Any) -> None:
    """Raises ValueError unless x is `[B, T, features]` and positions and segments fit it."""
    check_floats("x", x)
    if len(x.shape) != 3 or x.shape[-1] != features:
        raise ValueError(
            f"x must be [B, T, {features}], got shape {x.shape}. For one sequence write x[None]."
        )
    for name, ids in (("positions", positions), ("segment_ids", segment_ids)):
        if ids is None:
            continue
        check_array(name, ids)
        fits = len(ids.shape) == 2 and ids.shape[1] == x.shape[1]
        if not fits or ids.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"{name} must be [B, T] of all tokens of x {x.shape}, got shape {ids.shape}. "
                f"Positions and segments are global: give those of the whole sequence."
            )
        check_integers(name, ids)
