"""The front door: attention of global arrays on a mesh."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from . import refusals
from .kernels import dense_attention
from .layout import MeshLayout, axes_size, names
from .masks import SegmentIds, Window
from .shared_heads import tell_shared_heads
from .ulysses import ulysses_attention

AnyMesh = Mesh | AbstractMesh


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    segment_ids: SegmentIds | None = None,
    logits_soft_cap: float | None = None,
    attention: Callable[..., Array] = dense_attention,
    layout: MeshLayout = MeshLayout(),
    mesh: AnyMesh | None = None,
    check_vma: bool = True,
) -> Float[Array, "B T N H"]:
    """`jax.nn.dot_product_attention` for sequences sharded over a mesh.

    Takes and returns global arrays, under `jax.jit` or not; arguments that have the name of one of
    `jax.nn.dot_product_attention` mean the same, and with the default kernel a query without any
    key gives 0. The work is `ulysses_attention` inside a `jax.shard_map` that is manual over every
    axis of the mesh. Inside a `jax.shard_map` over other axes it runs forward only: JAX cannot
    differentiate nested ones. Make the outer one manual over all, and call `ulysses_attention`.

    Args:
      query, key, value: of one floating dtype; K divides N. Sharded as `layout` says; on a mesh
        with Explicit axes they are resharded where their type says otherwise.
      bias: added to the logits, broadcastable to `[B, N, T, S]`. Each device gets its heads' slice.
      mask: True attends, broadcastable to `[B, N, T, S]`. Each device gets its heads' slice.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: query t attends to keys `s <= t`, both counted from 0.
      query_seq_lengths, key_value_seq_lengths: valid tokens per batch entry; the rest is padding,
        which is masked but has to be finite.
      local_window_size: `(left, right)` or one integer for both: keys `t - left <= s <= t + right`.
      segment_ids: a query attends to the keys of its own segment (packed documents): `[B, S]`, or a
        pair `[B, T]`, `[B, S]`. Every device gets those of the whole sequence.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.
      attention: the local attention, called with all the tokens of some heads and with those
        keywords above that differ from their defaults.
      layout: the mesh axes of tokens, batch and heads.
      mesh: the mesh; if None, that of `jax.set_mesh`, otherwise the one query is sharded over.
      check_vma: of `jax.shard_map`; False for a Pallas kernel that does not state how it varies.

    Returns:
      The attention output, of the query's shape and dtype, sharded as `layout` says.

    Raises:
      ValueError: before any communication, for everything that does not fit or is not supported.

    Example:
      mesh = jax.make_mesh((2, 4), ("data", "seq"))
      layout = MeshLayout(tokens="seq", batch="data")
      out = dot_product_attention(q, k, v, is_causal=True, layout=layout, mesh=mesh)
    """
    refusals.check_arrays(query, key, value)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mesh = jax.sharding.get_abstract_mesh() if manual else _find_mesh(mesh, query)
    refusals.check_mesh(layout, mesh.shape, manual)
    for name, x in (("query", query), ("key", key), ("value", value)):
        refusals.check_sharding(name, jax.typeof(x).sharding.spec, layout)
    refusals.check_division(query.shape, key.shape, layout, mesh.shape)
    static = {
        "scale": scale,
        "is_causal": is_causal,
        "local_window_size": local_window_size,
        "logits_soft_cap": logits_soft_cap,
    }
    refusals.check_scalars(**static)
    arrays = {
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "segment_ids": segment_ids,
    }
    refusals.check_masks(query.shape, key.shape, **arrays)

    static = _given(static | {"is_causal": is_causal or None})
    arrays = _given(arrays)
    refusals.check_keywords(attention, [*static, *arrays])

    # Fewer KV heads than tensor-parallel shards: they stay whole, and each shard takes its one.
    tensor_parallel = axes_size(layout.heads, mesh.shape)
    whole_kv = key.shape[2] % tensor_parallel != 0
    kv_spec = replace(layout, heads=None).spec if whole_kv else layout.spec

    def per_device(query: Array, key: Array, value: Array, arrays: dict[str, Any]) -> Array:
        local = partial(attention, **static, **arrays)
        if whole_kv:
            shared = ((names(layout.heads), tensor_parallel // key.shape[2]),)
            if layout.tokens is not None:
                shared += ((layout.tokens, axes_size(layout.tokens, mesh.shape)),)
            local = tell_shared_heads(local, shared)
            key, value = (_own_head(x, layout, tensor_parallel) for x in (key, value))
        if layout.tokens is None:
            out = local(query, key, value)
            refusals.check_local_output(out, query)
            return out
        return ulysses_attention(query, key, value, axis_name=layout.tokens, attention=local)

    array_specs = {
        name: jax.tree.map(partial(_array_spec, name, layout=layout), x)
        for name, x in arrays.items()
    }
    specs = (layout.spec, kv_spec, kv_spec, array_specs)
    operands = jax.tree.map(partial(_reshard, mesh=mesh), (query, key, value, arrays), specs)
    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=layout.spec,
        # None given means all; to name them all forbids a vmap over one more sharded axis.
        axis_names=set(mesh.axis_names) - set(manual) if manual else frozenset(),
        check_vma=check_vma,
    )(*operands)


def _find_mesh(mesh: AnyMesh | None, query: Any) -> AnyMesh:
    if mesh is not None:
        return mesh
    candidates = (
        jax.sharding.get_abstract_mesh(),
        # An array knows its devices; under jit only the type of its tracer knows the mesh.
        getattr(getattr(query, "sharding", None), "mesh", None),
        jax.typeof(query).sharding.mesh,
    )
    for candidate in candidates:
        if candidate is not None and not candidate.empty:
            return candidate
    raise refusals.no_mesh()


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _own_head(x: Array, layout: MeshLayout, tensor_parallel: int) -> Array:
    """The one KV head that this tensor-parallel shard's query heads read."""
    head = jax.lax.axis_index(names(layout.heads)) * x.shape[2] // tensor_parallel
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def _array_spec(name: str, x: Array, *, layout: MeshLayout) -> PartitionSpec:
    """The batch as the layout has it, heads as the reshard leaves them, and the tokens whole."""
    heads = (*names(layout.heads), *names(layout.tokens))
    per_token = (layout.batch, None)  # segment ids
    sharded = per_token if name == "segment_ids" else (layout.batch, heads, None, None)[: x.ndim]
    return PartitionSpec(
        *(axes if n > 1 else None for n, axes in zip(x.shape, sharded, strict=True))
    )


def _reshard(x: Array, spec: PartitionSpec, *, mesh: AnyMesh) -> Array:
    """Gives x its sharding in the Explicit axes; `jax.shard_map` does so for Auto ones."""
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        return x
    kept = (tuple(n for n in names(axes) if n in explicit) or None for axes in spec)
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*kept)))
