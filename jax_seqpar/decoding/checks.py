"""Validation of a cache, of the tokens written to it and of the queries that attend to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .._checks import check_count, check_has_numbers, check_is_array
from ..kernels import Kernel
from ..mask import Logits, Mask, Spec
from ..mask.array_fields import arrays_of
from ..mask.checks import check_call
from ..mesh_layout import MeshLayout, axes_size, check_mesh
from .slots import EMPTY
from .split_kv import SplitKV


def check_sizes(
    batch: Any,
    tokens: Any,
    kv_heads: Any,
    head_dim: Any,
    value_dim: Any,
    dtype: Any,
    window: Any,
) -> None:
    """Raises ValueError unless a cache of floats can be made."""
    sizes = {"batch": batch, "tokens": tokens, "kv_heads": kv_heads, "head_dim": head_dim}
    if value_dim is not None:
        sizes["value_dim"] = value_dim
    for name, n in sizes.items():
        check_count(name, n)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the cache must have a floating dtype, got {dtype}. Write jnp.bfloat16.")
    if window is None:
        return
    if isinstance(window, bool) or not isinstance(window, int | np.integer) or window < 0:
        raise ValueError(
            f"window must be how many tokens before its own a query may attend to, got {window!r}. "
            f"Write window=4095, say, or None for a cache of all tokens."
        )
    if tokens <= window:
        raise ValueError(
            f"a ring buffer of tokens = {tokens} does not hold the window of {window} tokens "
            f"before a query and the query's own. Write tokens={window + 1}, or more for steps of "
            f"several tokens."
        )


def check_fits(batch: int, kv_heads: int, layout: MeshLayout, mesh: Mapping[str, int]) -> None:
    """Raises ValueError unless the devices divide the sequences and the heads of a cache."""
    check_mesh(layout, mesh, ())
    for name, n, field in (("batch", batch, "batch"), ("kv_heads", kv_heads, "heads")):
        axes = getattr(layout, field)
        devices = axes_size(axes, mesh)
        if n % devices:
            raise ValueError(
                f"a cache of {name} = {n} is not divisible by the {devices} devices of mesh axis "
                f"{axes!r}. Write MeshLayout({field}=None), or use a mesh axis that divides {n}."
            )


def check_tokens(what: str, cache: Any, key: Any, value: Any) -> None:
    """Raises ValueError unless tokens have the sizes of the cache that they are written to."""
    held = cache.slots
    for name, new, old in (("key", key, held.key), ("value", value, held.value)):
        check_is_array(name, new)
        fits = new.ndim == 4 and new.shape[0] == old.shape[0] and new.shape[2:] == old.shape[2:]
        if not fits:
            raise ValueError(
                f"{what}: {name} has shape {new.shape}, and the cache's is {old.shape}: they "
                f"differ in tokens only. Make the cache by KeyValueCache.empty(...) of these sizes."
            )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"{what}: key has {key.shape[1]} tokens and value {value.shape[1]}. Give both alike."
        )


def as_positions(what: str, positions: Any, shapes: Sequence[tuple[int, ...]]) -> Array:
    """Positions as int32, at most `EMPTY`.

    Raises:
      ValueError: unless they are integers of one of the shapes.
    """
    check_is_array("positions", positions)
    if positions.shape not in shapes:
        raise ValueError(
            f"{what}: positions have shape {positions.shape}, expected {shapes[-1]}, one of each "
            f"token. Write jnp.broadcast_to(positions, {shapes[-1]})."
        )
    return _as_int32(f"{what}: positions", positions)


def as_numbers(name: str, x: Any, batch: int) -> Array:
    """One number of each row `[B]`, as int32 and at most `EMPTY`.

    Raises:
      ValueError: unless they are integers of that shape.
    """
    x = x if hasattr(x, "shape") else np.asarray(x)
    if x.shape != (batch,):
        raise ValueError(
            f"{name} have shape {x.shape}, expected ({batch},), one of each row. Write "
            f"jnp.full({batch}, ...)."
        )
    return _as_int32(name, x)


def _as_int32(name: str, x: Any) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} are {x.dtype}, expected integers. Write .astype(jnp.int32).")
    if x.dtype.itemsize >= 4:  # what 32 bits do not hold is later than everything
        x = (np if isinstance(x, np.ndarray) else jnp).minimum(x, EMPTY)
    return jnp.asarray(x).astype(jnp.int32)


def check_distinct(positions: Any) -> None:
    """Raises ValueError for a position that a row has twice, where they are known.

    A ring buffer has one slot for each.
    """
    if isinstance(positions, Tracer) or not getattr(positions, "is_fully_addressable", True):
        return
    for row in np.asarray(positions):
        row = row[row < EMPTY]
        found, counts = np.unique(row, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"fill: a row has position {found[counts > 1][0]} twice, of which a ring buffer "
                f"keeps one. Write EMPTY for what is padding, and each other position once."
            )


def no_slots(what: str, tokens: int, slots: int, on: str = "all devices") -> ValueError:
    """Error for tokens that have no slot."""
    return ValueError(
        f"{what}: {tokens} tokens do not fit in {slots} slots of a row on {on}. Make a cache with "
        f"more tokens by KeyValueCache.empty(..., tokens=...), or drop some."
    )


def check_attention(cache: Any, query: Any, mask: Mask, logits: Logits, kernel: Any) -> None:
    """Raises ValueError for masks and options that attention to a cache does not support."""
    if not isinstance(mask, Mask) or not isinstance(logits, Logits):
        raise ValueError(f"mask and logits are {mask!r} and {logits!r}. Write Mask() and Logits().")
    if not mask.is_causal and (mask.window is not None or logits.alibi_slopes is not None):
        raise ValueError(
            f"{mask!r} is not causal, and causality hides the slots without a token from a window "
            f"or ALiBi slopes. Write mask=Mask(is_causal=True, ...)."
        )
    given = [name for name, _ in arrays_of(mask)]
    given += [name for name, _ in arrays_of(logits) if name == "bias"]
    if given or mask.query_offset:
        name = given[0] if given else "query_offset"
        raise ValueError(
            f"{name} says what attends to what by places in arrays, and the slots of a cache lie "
            f"in no order. Leave {name} out; fill(..., lengths=) leaves out padding."
        )
    key, value = (jax.ShapeDtypeStruct(x.shape, query.dtype) for x in cache.slots[:2])
    check_has_numbers({"query": query})
    check_call(query, key, value, Spec(logits=logits), shapes_suffice=True)
    _check_window(cache, query.shape[1], mask)
    if not isinstance(kernel, Kernel) or not (kernel.gives_parts or kernel.attends_in_turns):
        raise ValueError(
            f"kernel={kernel!r} does not attend to a part of the keys, as devices with parts of a "
            f"cache need it to. Write kernel=SlotBlocks(), or Exact()."
        )


def _check_window(cache: Any, tokens: int, mask: Mask) -> None:
    if cache.window is None:
        return
    before, _ = mask.reach
    if before is None or before > cache.window:
        raise ValueError(
            f"the cache keeps a window of {cache.window} tokens, and {mask!r} attends to more. "
            f"Write Mask(is_causal=True, local_window_size=({cache.window}, 0))."
        )
    if tokens + before > cache.tokens:
        raise ValueError(
            f"{tokens} queries at once, with {before} tokens before each, do not fit in a ring "
            f"buffer of {cache.tokens} slots. Write KeyValueCache.empty(..., "
            f"tokens={tokens + before}), or give fewer at once."
        )


def check_scatter(strategy: Any, heads: int, layout: MeshLayout, mesh: Mapping[str, int]) -> None:
    """Raises ValueError unless the devices of the tokens can share the heads of the output."""
    if not isinstance(strategy, SplitKV):
        raise ValueError(
            f"strategy={strategy!r} does not attend to a cache. Write strategy=SplitKV()."
        )
    devices = axes_size(layout.heads, mesh) * axes_size(layout.tokens, mesh)
    if strategy.scatter_heads and heads % devices:
        raise ValueError(
            f"{strategy!r}: the query's heads N = {heads} are not divisible by {devices} devices "
            f"of mesh axes {layout.heads!r} and {layout.tokens!r}. Write SplitKV()."
        )
