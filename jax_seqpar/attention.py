"""The front door: attention of global arrays on a mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from . import refusals
from .compiled import compiled_with
from .exact.kv_replicas import tell_shared_heads
from .kernels import blockwise_attention, choose_kernel
from .layout import MeshLayout, axes_size, names
from .mask import Spec, keyword_form
from .mask.keywords import keywords_of
from .mask.nouns import Axes
from .mesh import AnyMesh, devices_of, find_mesh, reshard
from .strategies import Strategy, Ulysses


@keyword_form
def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    attention: Callable[..., Array] | None = None,
    layout: MeshLayout = MeshLayout(),
    mesh: AnyMesh | None = None,
    strategy: Strategy = Ulysses(),
    check_vma: bool | None = None,
) -> Float[Array, "B T N V"]:
    """`jax.nn.dot_product_attention` for sequences sharded over a mesh.

    Takes and returns global arrays, under `jax.jit` or not; arguments that have the name of one of
    `jax.nn.dot_product_attention` mean the same, and with the kernels here a query without any key
    gives 0. The work is `ulysses_attention` inside a `jax.shard_map` that is manual over every axis
    of the mesh. Inside a `jax.shard_map` over other axes it runs forward only: JAX cannot
    differentiate nested ones. Make the outer one manual over all, and call `ulysses_attention`.
    There, dropout needs `head_keys` of the whole attention.

    Args:
      query, key, value: of one floating dtype; K divides N. Sharded as `layout` says; on a mesh
        with Explicit axes they are resharded where their type says otherwise. The degree divides T
        and S (`pad_to_degree` sees to it), the heads need not be divisible.
      bias, mask, ... dropout_rng: as in `jax_seqpar.mask.Attention`. Arrays with a head
        axis are sharded like the heads, so each device gets its part; those of tokens, and what is
        small, every device gets whole.
      attention: the local attention, called with all the tokens of some heads and with those
        keywords above that differ from their defaults. If None, that of `choose_kernel` for the
        platform of the mesh: the platform's own where it supports what is asked, else blockwise. It
        is traced under `jax.jit`, also in an eager call, whose program is kept as long as the
        function and is used again for equal `functools.partial`s; so it must be pure.
      layout: the mesh axes of tokens, batch and heads.
      mesh: the mesh; if None, that of `jax.set_mesh`, otherwise the one query is sharded over.
        With Explicit axes the cotangent of an eager `jax.vjp` may be sharded or not; one made under
        `jax.set_mesh` has a sharding in its type, which must be that of the output. The eager
        gradient of a loss such as `out.sum()` needs `jax.set_mesh`, as that of any sharded array's
        sum does in JAX 0.10.2.
      strategy: how the devices of the token axis share the work: `Ulysses(head_chunks=, overlap=)`
        or `AllGatherKV()`.
      check_vma: of `jax.shard_map`; False for a Pallas kernel, which does not state how its output
        varies. If None, True but for the platform's own kernel chosen here.

    Returns:
      The attention output, of the query's dtype, sharded as `layout` says.

    Raises:
      ValueError: before any communication, for everything that does not fit or is not supported.

    Example:
      mesh = jax.make_mesh((2, 4), ("data", "seq"))
      layout = MeshLayout(tokens="seq", batch="data")
      out = dot_product_attention(q, k, v, is_causal=True, layout=layout, mesh=mesh)
    """
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes
    refusals.check_is_mesh(mesh, context if manual else None)
    mesh = context if manual else find_mesh(mesh, query)
    refusals.check_mesh(layout, mesh.shape, manual)
    operands = {"query": query, "key": key, "value": value}
    for name, x in operands.items():
        refusals.check_sharding(name, jax.typeof(x).sharding.spec, layout)
    given = keywords_of(spec)
    refusals.check_devices(operands | given, devices_of(mesh))
    refusals.check_strategy(strategy, Strategy, layout)
    refusals.check_division(query.shape, key.shape, layout, mesh.shape)
    if attention is None:
        choice = choose_kernel(query, key, value, platform=_platform(mesh), **given)
        # Fused kernels count their queries from 0.
        is_whole = strategy.heads_axes(layout.tokens) != () or layout.tokens is None
        attention = choice.attention if is_whole else blockwise_attention
        own = not is_whole or choice.name == "blockwise"
        check_vma = own if check_vma is None else check_vma
    refusals.check_keywords(attention, list(given))
    refusals.check_flag("check_vma", check_vma, (None, True, False))

    arrange = _Arrangement(
        layout,
        mesh,
        # None given means all; to name them all forbids a vmap over one more sharded axis.
        frozenset(mesh.axis_names) - set(manual) if manual else frozenset(),
        strategy,
        check_vma is not False,
    )
    return compiled_with(attention, _attend, arrange)(query, key, value, spec)


@dataclass(frozen=True)
class _Arrangement:
    """How the work is divided: hashable, part of the compiled program."""

    layout: MeshLayout
    mesh: AnyMesh
    axis_names: frozenset[str]
    strategy: Strategy
    check_vma: bool


def _attend(
    attention: Callable[..., Array],
    arrange: _Arrangement,
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
) -> Array:
    """The attention that all checks have passed."""
    layout, mesh = arrange.layout, arrange.mesh
    shape = (*query.shape[:3], value.shape[3])
    if 0 in shape:  # JAX 0.10.2 cannot compile the gradient of some kernels without elements
        sizes = (axes_size(axes, mesh.shape) for axes in layout.spec)
        local = tuple(n // size for n, size in zip(shape, sizes, strict=True))
        # In a shard_map, as under jax.jit an array made outside of one has no mesh.
        return jax.shard_map(
            lambda: jnp.zeros(local, query.dtype),
            mesh=mesh,
            in_specs=(),
            out_specs=layout.spec,
            axis_names=set(arrange.axis_names),
        )()
    degree, tensor_parallel = (axes_size(x, mesh.shape) for x in (layout.tokens, layout.heads))
    N, K = query.shape[2] // tensor_parallel, max(key.shape[2] // tensor_parallel, 1)
    strategy = arrange.strategy
    if layout.tokens is not None:
        spec = strategy.pad_heads(spec, N, K, degree, attention)
    # Fewer KV heads than tensor-parallel shards: they stay whole, and each shard takes its one.
    whole_kv = key.shape[2] % tensor_parallel != 0
    kv_spec = replace(layout, heads=None).spec if whole_kv else layout.spec

    def per_device(query: Array, key: Array, value: Array, spec: Spec) -> Array:
        local = attention
        if whole_kv:
            shared = ((names(layout.heads), tensor_parallel // key.shape[2]),)
            if layout.tokens is not None:
                shared += ((layout.tokens, strategy.kv_replicas(N, K, degree, attention)),)
            local = tell_shared_heads(local, shared)
            key, value = (_own_head(x, layout, tensor_parallel) for x in (key, value))
        if layout.tokens is None:
            out = local(query, key, value, **keywords_of(spec))
            refusals.check_local_output(out, query, value)
            return out
        return strategy(local, query, key, value, spec, axis_name=layout.tokens)

    specs = (
        layout.spec,
        kv_spec,
        kv_spec,
        spec.map(partial(_array_spec, layout=layout, strategy=strategy)),
    )
    operands = (query, key, value, spec)
    operands = jax.tree.map(partial(reshard, mesh=mesh), operands, specs)
    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=layout.spec,
        axis_names=set(arrange.axis_names),
        check_vma=arrange.check_vma,
    )(*operands)


def _platform(mesh: AnyMesh) -> str | None:
    """Platform of the mesh's devices; None where an abstract mesh does not tell, or another one."""
    # Under jax.set_mesh the mesh is abstract, and has one device that stands for all.
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    platform = getattr(device, "platform", None)
    return platform if platform in ("tpu", "gpu", "cpu") else None


def _own_head(x: Array, layout: MeshLayout, tensor_parallel: int) -> Array:
    """The one KV head that this tensor-parallel shard's query heads read."""
    head = jax.lax.axis_index(names(layout.heads)) * x.shape[2] // tensor_parallel
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def _array_spec(x: Array, axes: Axes, *, layout: MeshLayout, strategy: Strategy) -> PartitionSpec:
    """The batch as the layout has it, heads as the reshard leaves them, and the tokens whole."""
    mesh_axes: dict[Any, Any] = {
        "batch": layout.batch,
        "heads": (*names(layout.heads), *strategy.heads_axes(layout.tokens)),
    }
    return PartitionSpec(
        *(mesh_axes.get(axis) if n > 1 else None for n, axis in zip(x.shape, axes, strict=True))
    )
