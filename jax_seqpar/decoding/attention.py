"""Attention of a few queries to the keys and values of a cache."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from .._checks import check_is_array
from ..kernels import Kernel
from ..mask import Logits, Mask, Spec
from ..mesh import AnyMesh, find_mesh, set_explicit_sharding
from ..mesh_layout import names
from .cache import KeyValueCache, shard_map
from .checks import as_positions, check_attention, check_scatter
from .slot_blocks import SlotBlocks
from .slots import EMPTY, Slots
from .split_kv import SplitKV


def attend_to_cache(
    query: Float[Array, "B T N H"],
    cache: KeyValueCache,
    *,
    positions: Integer[Array | np.ndarray, "B T"],
    mask: Mask = Mask(is_causal=True),
    logits: Logits = Logits(),
    kernel: Kernel = SlotBlocks(),
    strategy: SplitKV = SplitKV(),
) -> Float[Array, "B T N V"]:
    """Attention to the tokens of a cache, at the positions of the queries and before.

    The tokens of the queries themselves have been appended. Each device attends to the slots that
    it holds, so nothing grows with the tokens but that; see `SplitKV` for what is sent.

    Args:
      query: whole on every device of the tokens, sharded by batch and heads as the cache's layout
        says.
      positions: of the queries; `EMPTY` for padding, whose output is 0.
      mask: causality and window. Without causality a query attends to all that the cache holds.
      logits: scale, soft cap, ALiBi slopes and sinks.
      kernel: of one device: `SlotBlocks()`, `Exact()`, which gives a row the bits that it has in
        the attention of the whole sequence, on any number of devices, or another kernel that gives
        parts.
      strategy: how parts of a row meet.

    Returns:
      The output in the query's dtype, whole on every device of the tokens, or sharded by heads with
      `SplitKV(scatter_heads=True)`. NaN in rows that have lost a token.

    Raises:
      ValueError: for arrays and options that do not fit, or that slots of a cache do not support.
    """
    check_is_array("query", query)
    check_attention(cache, query, mask, logits, kernel)
    layout, mesh = cache.layout, find_mesh(cache.layout.mesh, query)
    check_scatter(strategy, query.shape[2], layout, mesh.shape)
    positions = as_positions("attend_to_cache", positions, (query.shape[:2],))
    if 0 in query.shape:
        return jnp.zeros((*query.shape[:3], cache.slots.value.shape[3]), query.dtype)
    return _attend(_Call(mesh, mask, kernel, strategy), cache, query, positions, logits)


@dataclass(frozen=True)
class _Call:
    """Static arguments of a decoding call, part of the compiled program."""

    mesh: AnyMesh
    mask: Mask
    kernel: Kernel
    strategy: SplitKV

    def mask_of(self, queries: Array, slots: Array) -> Mask:
        """Mask that is causal by position, or without causality all tokens but the empty slots."""
        if not self.mask.is_causal:
            queries = jnp.full_like(queries, EMPTY - 1)
        return replace(self.mask, is_causal=True, positions=(queries, slots))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend(
    call: _Call, cache: KeyValueCache, query: Array, positions: Array, logits: Logits
) -> Array:
    return _forward(call, cache, query, positions, logits)


@_attend.defjvp
def _no_derivative(call: _Call, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"attention to a cache of {primals[0].tokens} slots is differentiated, and has no "
        f"derivative. Write jax_seqpar.dot_product_attention(query, key, value, ...)."
    )


@partial(jax.jit, static_argnums=0)
def _forward(
    call: _Call, cache: KeyValueCache, query: Array, positions: Array, logits: Logits
) -> Array:
    layout, axes = cache.layout, names(cache.layout.tokens)

    def per_device(slots: Slots, query: Array, positions: Array, logits: Logits) -> Array:
        spec = Spec(call.mask_of(positions, slots.positions), logits)
        key, value = (x.astype(query.dtype) for x in slots[:2])
        operands = query, key, value, spec, slots.lost
        out = call.strategy(call.kernel, *operands, axis_name=axes)
        return jnp.where((positions == EMPTY)[..., None, None], 0, out)

    whole, row = cache.whole_tokens, PartitionSpec(layout.batch, None)
    of_logits = Spec(logits=logits).map(lambda x, _: PartitionSpec(layout.heads)).logits
    heads = (*names(layout.heads), *(axes if call.strategy.scatter_heads else ()))
    out_spec = replace(layout, tokens=None, heads=heads or None).partition_spec
    in_specs = (cache.specs, whole, row, of_logits)
    operands = (cache.slots, query, positions, logits)
    operands = jax.tree.map(partial(set_explicit_sharding, mesh=call.mesh), operands, in_specs)
    return shard_map(call.mesh, per_device, in_specs, out_spec)(*operands)
