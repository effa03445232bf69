"""The cache of a decoding layer: how its devices share keys and values, and its checks."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from ..mesh import AnyMesh, place
from ..mesh_layout import MeshLayout, axes_size, names
from ..order import Contiguous


def decode_layout(layout: MeshLayout) -> MeshLayout:
    """Heads over all the axes of heads and tokens: each device keeps its own part of each.

    Tokens come and are kept in the order of the sequence.
    """
    heads = (*names(layout.heads), *names(layout.tokens))
    return replace(layout, tokens=None, heads=heads, order=Contiguous())


def place_heads(x: Array, layout: MeshLayout, mesh: AnyMesh) -> Array:
    """`[B, S, heads, H]` sharded by heads, or whole on every device if these do not divide them."""
    shared = x.shape[2] % axes_size(layout.heads, mesh.shape) == 0
    return place(x, (layout if shared else replace(layout, heads=None)).partition_spec, mesh=mesh)


def check_cache_sizes(batch: Any, tokens: Any, dtype: Any) -> None:
    """Raises ValueError unless a cache of floats can be made."""
    for name, n in (("batch", batch), ("tokens", tokens)):
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(
                f"init_cache takes a positive integer of {name}, got {n!r}. Write "
                f"init_cache(batch, tokens) with x.shape[0] and the longest sequence."
            )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"the cache must have a floating dtype, got {dtype}. Write jnp.bfloat16.")


def check_cache_batch(batch: int, devices: int, axes: object) -> None:
    """Raises ValueError unless the devices divide the sequences of the cache."""
    if batch % devices:
        raise ValueError(
            f"init_cache of batch = {batch} sequences, which the {devices} devices of mesh axes "
            f"{axes!r} do not divide. Decode a batch that they divide, or with "
            f"MeshLayout(batch=None)."
        )


def check_cache_heads(num_heads: int, num_kv_heads: int, devices: int, axes: object) -> None:
    """Raises ValueError unless the devices can share the heads of the cache."""
    if num_heads % devices or (num_kv_heads % devices and devices % num_kv_heads):
        raise ValueError(
            f"decoding shares the heads of the cache among the {devices} devices of mesh axes "
            f"{axes!r}: num_heads = {num_heads} must be divisible by them, and num_kv_heads = "
            f"{num_kv_heads} divisible by them or divide them. Decode on a mesh with fewer."
        )


def check_decode(
    cache: Any, index: Any, x: Any, mesh_shape: Any, segment_ids: Any, dropout_rate: float
) -> None:
    """Raises ValueError for decoding without a cache, or with what a cache does not keep.

    Args:
      index: how many tokens the cache holds; under `jit` that is not known.
      mesh_shape: of the mesh of this call, by axis; empty if that of the arrays is taken.
      dropout_rate: of this call, 0 if it is deterministic.
    """
    batch, tokens = x.shape[:2]
    if cache is None:
        raise ValueError(f"decode=True needs a cache: call init_cache({batch}, tokens) first.")
    held = 0 if isinstance(index[...], Tracer) else int(index[...])
    if cache.shape[0] != batch:
        raise ValueError(
            f"x has batch B = {batch}, but the cache is of {cache.shape[0]} sequences: call "
            f"init_cache({batch}, tokens) for this batch."
        )
    own = getattr(getattr(cache[...], "sharding", None), "mesh", None)
    if own is not None and mesh_shape and own.shape and dict(own.shape) != dict(mesh_shape):
        raise ValueError(
            f"the cache is on a mesh {dict(own.shape)}, this call on {dict(mesh_shape)}: call "
            f"init_cache(batch, tokens) under the mesh of the call."
        )
    if held + tokens > cache.shape[1]:
        raise ValueError(
            f"{tokens} tokens after {held} do not fit the cache of {cache.shape[1]}: "
            f"call init_cache({batch}, {held + tokens}), or with more tokens."
        )
    if segment_ids is not None:
        raise ValueError(
            f"decode=True keeps one document per sequence, got segment_ids of shape "
            f"{segment_ids.shape}: leave segment_ids out."
        )
    if dropout_rate > 0:
        raise ValueError(
            f"decode=True has no dropout, got dropout_rate = {dropout_rate}: write "
            f"deterministic=True."
        )
