"""The cache of a decoding layer: shared by heads or along the tokens, and its checks."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from ..decoding import KeyValueCache, SlotBlocks
from ..exact import Exact
from ..kernels import FunctionKernel, Kernel
from ..mask import Mask
from ..mesh import find_mesh
from ..mesh_layout import MeshLayout, axes_size, names
from ..order import Contiguous

SharedBy = Literal["heads", "sequence"]


class LayerCache(NamedTuple):
    """State of an attention layer from call to call: the cache and the next positions.

    Attributes:
      tokens: keys and values.
      next_position: `[B]`, int32, the position of the next token of each row.
    """

    tokens: KeyValueCache
    next_position: Int[Array, "B"]


def empty_cache(
    batch: Any,
    tokens: Any,
    dtype: Any,
    *,
    kv_heads: int,
    head_dim: int,
    shared_by: SharedBy | None,
    layout: MeshLayout,
    mask: Mask,
    at_once: int | None,
) -> LayerCache:
    """A cache without tokens; arguments as of `Attention.init_cache`."""
    check_cache_sizes(batch, tokens, dtype, at_once)
    if shared_by not in (None, "heads", "sequence"):
        raise ValueError(
            f"shared_by must be None, 'heads' or 'sequence', got {shared_by!r}. Write "
            f"shared_by=None, which takes heads where the devices divide them."
        )
    batch, tokens, mesh = int(batch), int(tokens), find_mesh(layout.mesh).shape
    check_cache_batch(batch, axes_size(layout.batch, mesh), layout.batch)
    by_heads = _by_heads(layout)
    divided = kv_heads % axes_size(by_heads.heads, mesh) == 0
    if shared_by == "heads" and not divided:
        raise ValueError(
            f'shared_by="heads": num_kv_heads = {kv_heads} is not divisible by the '
            f"{axes_size(by_heads.heads, mesh)} devices of mesh axes {by_heads.heads!r}. Write "
            f'shared_by="sequence", which shares the tokens.'
        )
    is_by_heads = divided if shared_by is None else shared_by == "heads"
    window = mask.reach[0]
    if window is None or at_once is None or window + at_once >= tokens:
        window, slots = None, tokens
    else:
        slots = window + at_once
    held = KeyValueCache.empty(
        batch,
        slots,
        kv_heads,
        head_dim,
        dtype=dtype,
        layout=by_heads if is_by_heads else layout,
        window=window,
    )
    return LayerCache(held, jnp.zeros(batch, jnp.int32))


def _by_heads(layout: MeshLayout) -> MeshLayout:
    """Heads over all the axes of heads and tokens: each device has all tokens of its heads."""
    heads = (*names(layout.heads), *names(layout.tokens))
    return replace(layout, tokens=None, heads=heads or None, order=Contiguous())


def decoding_kernel(kernel: Any) -> Kernel:
    """The kernel of a decoding step: the layer's if it is exact, else that of few queries.

    Raises:
      ValueError: for a function, whose result for a part of the keys is unknown.
    """
    if isinstance(kernel, Exact):
        return kernel
    if kernel is None or (isinstance(kernel, Kernel) and not isinstance(kernel, FunctionKernel)):
        return SlotBlocks()
    raise ValueError(
        f"kernel={kernel!r} is a function, which a cache cannot be attended to with. Write "
        f"kernel=jax_seqpar.Blockwise()."
    )


def check_cache_sizes(batch: Any, tokens: Any, dtype: Any, at_once: Any) -> None:
    """Raises ValueError unless a cache of floats can be made."""
    sizes = {"batch": batch, "tokens": tokens} | ({} if at_once is None else {"at_once": at_once})
    for name, n in sizes.items():
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


def check_decode(
    cache: LayerCache | None,
    x: Any,
    tokens: Any,
    mesh_shape: Any,
    segment_ids: Any,
    dropout_rate: float,
    *,
    fills: bool,
) -> None:
    """Raises ValueError for decoding without a cache, or with what a cache does not keep.

    Args:
      tokens: of x that are no padding; a number, or those of each row.
      mesh_shape: of the mesh of this call, by axis; empty if that of the arrays is taken.
      dropout_rate: of this call, 0 if it is deterministic.
      fills: whether x is a whole prompt.
    """
    batch = x.shape[0]
    what = "fill_cache=True" if fills else "decode=True"
    if cache is None:
        raise ValueError(f"{what} needs a cache: call init_cache({batch}, tokens) first.")
    slots = cache.tokens.slots
    if slots.key.shape[0] != batch:
        raise ValueError(
            f"x has batch B = {batch}, but the cache is of {slots.key.shape[0]} sequences: call "
            f"init_cache({batch}, tokens) for this batch."
        )
    own = getattr(getattr(slots.key, "sharding", None), "mesh", None)
    if own is not None and mesh_shape and own.shape and dict(own.shape) != dict(mesh_shape):
        raise ValueError(
            f"the cache is on a mesh {dict(own.shape)}, this call on {dict(mesh_shape)}: call "
            f"init_cache(batch, tokens) under the mesh of the call."
        )
    _check_room(cache, x.shape[1] if fills else tokens, fills)
    if segment_ids is not None:
        raise ValueError(
            f"{what} keeps one document per sequence, got segment_ids of shape "
            f"{segment_ids.shape}: leave segment_ids out."
        )
    if dropout_rate > 0:
        raise ValueError(
            f"{what} has no dropout, got dropout_rate = {dropout_rate}: write deterministic=True."
        )


def _check_room(cache: LayerCache, tokens: Any, fills: bool) -> None:
    """Raises ValueError for a row with more tokens than slots, where that is known."""
    index, slots = cache.next_position, cache.tokens.tokens
    known = not isinstance(index, Tracer) and not isinstance(tokens, Tracer)
    if cache.tokens.window is not None or not (known or fills):
        return
    before = np.zeros(1, int) if fills else np.asarray(index)
    new = np.broadcast_to(np.asarray(tokens), before.shape)
    row = int((before + new).argmax())
    if before[row] + new[row] > slots:
        raise ValueError(
            f"{new[row]} tokens after {before[row]} do not fit the cache of {slots}: call "
            f"init_cache({cache.tokens.slots.key.shape[0]}, {before[row] + new[row]}), or with "
            f"more tokens."
        )
