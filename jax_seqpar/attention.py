"""Attention of arrays whose tokens are sharded over a mesh: the public function."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from ._checks import axis_size
from .compiled import compiled_with
from .kernels import Blockwise, Kernel, as_kernel
from .kernels.choice import choose
from .kernels.kernel import check_residual
from .layout import (
    MeshLayout,
    axes_size,
    check_division,
    check_is_layout,
    check_mesh,
    check_sharding,
    names,
)
from .mask import Spec, accumulated, keyword_form
from .mask.keywords import checked, flat
from .mask.nouns import Axes
from .mesh import AnyMesh, check_devices, check_is_mesh, devices_of, find_mesh, reshard
from .strategies import Strategy, Ulysses
from .strategies.strategy import check_strategy


@keyword_form
def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    kernel: Any = None,
    strategy: Strategy = Ulysses(),
    layout: MeshLayout = MeshLayout(),
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` for sequences sharded over a mesh.

    Takes and returns global arrays, under `jax.jit` or not; arguments that have the name of one of
    `jax.nn.dot_product_attention` mean the same, and with the kernels here a query without any key
    gives 0. The work is the strategy's, inside a `jax.shard_map` that is manual over every axis of
    the mesh.

    Inside a `jax.shard_map` that is manual over the axis of the tokens, query, key and value are
    those of one device, and so is the output: the strategy runs right there. Masks and whatever has
    a token or a head axis stay those of the whole sequence and of all heads of the device's batch;
    dropout needs `head_keys`. Inside a `jax.shard_map` over other axes only, it runs forward: JAX
    cannot differentiate nested ones.

    Args:
      query, key, value: of one floating dtype; K divides N. Sharded as `layout` says; on a mesh
        with Explicit axes they are resharded where their type says otherwise. The degree divides T
        and S (`pad_to_degree` sees to it), the heads need not be divisible.
      bias, mask, ... dropout: as in `jax_seqpar.mask.Attention`. Arrays with a head axis are
        sharded like the heads, so each device gets its part; those of tokens, and what is small,
        every device gets whole.
      kernel: the attention of one device: `Blockwise()`, `Fused()`, `Exact()`, `Dense()` with their
        options, or a function of query, key and value, which is given the keywords of `jax.nn`
        above that differ from their defaults. If None, that of `choose_kernel` for the platform of
        the mesh: the platform's own where it supports what is asked, else blockwise. A function is
        traced under `jax.jit`, also in an eager call, whose program is kept as long as the function
        and is used again for equal `functools.partial`s; so it must be pure.
      strategy: how the devices of the token axis share the work: `Ulysses(head_chunks=, overlap=)`
        or `AllGatherKV()`.
      layout: the mesh axes of tokens, batch and heads, and the mesh where it is not that of
        `jax.set_mesh` or of the query.
        With Explicit axes the cotangent of an eager `jax.vjp` may be sharded or not; one made under
        `jax.set_mesh` has a sharding in its type, which must be that of the output. The eager
        gradient of a loss such as `out.sum()` needs `jax.set_mesh`, as that of any sharded array's
        sum does in JAX 0.10.2.
      return_residual: also return the log of the sum of exp of the logits, `[B, T, N]`, sharded as
        the output; of `Dense` and `Blockwise`.

    Returns:
      The attention output, of the query's dtype, sharded as `layout` says; with `return_residual` a
      pair.

    Raises:
      ValueError: before any communication, for everything that does not fit or is not supported.

    Example:
      mesh = jax.make_mesh((2, 4), ("data", "seq"))
      layout = MeshLayout(tokens="seq", batch="data", mesh=mesh)
      out = dot_product_attention(q, k, v, is_causal=True, layout=layout)
    """
    check_strategy(strategy)
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes
    check_is_layout(layout)
    is_here = bool(set(names(layout.tokens)) & set(manual))
    degree = axis_size(layout.tokens) if is_here else 1
    spec = checked(spec, query, key, value, degree=degree)
    check_is_mesh(layout.mesh, context if manual else None)
    mesh = context if manual else find_mesh(layout.mesh, query)
    if is_here:
        return _attend_here(query, key, value, spec, kernel, strategy, layout, return_residual)
    check_mesh(layout, mesh.shape, manual)
    if layout.tokens is None and strategy != type(strategy)():
        raise ValueError(
            f"{strategy!r} has no reshard to work on: {layout!r} shards no tokens. Leave it out, "
            f"or name the mesh axis in MeshLayout(tokens=)."
        )
    operands = {"query": query, "key": key, "value": value}
    for name, x in operands.items():
        check_sharding(name, jax.typeof(x).sharding.spec, layout)
    check_devices(operands | flat(spec), devices_of(mesh))
    check_division(query.shape, key.shape, layout, mesh.shape)
    kernel = _kernel_of(kernel, query, key, value, spec, strategy, layout, mesh)
    check_residual(kernel, value, return_residual)
    arrange = _Arrangement(
        layout,
        mesh,
        # None given means all; to name them all forbids a vmap over one more sharded axis.
        frozenset(mesh.axis_names) - set(manual) if manual else frozenset(),
        strategy,
        return_residual,
    )
    return compiled_with(kernel, _attend, arrange)(query, key, value, spec)


def _kernel_of(
    kernel: Any,
    query: Any,
    key: Any,
    value: Any,
    spec: Spec,
    strategy: Strategy,
    layout: MeshLayout,
    mesh: AnyMesh,
) -> Kernel:
    if kernel is not None:
        return as_kernel(kernel)
    # Fused kernels count their queries from 0, so they cannot be given a part of them.
    is_whole = layout.tokens is None or strategy.heads_axes(layout.tokens) != ()
    return choose(query, key, value, spec, _platform(mesh)).kernel if is_whole else Blockwise()


def _attend_here(
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
    kernel: Any,
    strategy: Strategy,
    layout: MeshLayout,
    return_residual: bool,
) -> Any:
    """Attention inside the caller's `jax.shard_map`, of the arrays of one device."""
    assert layout.tokens is not None
    if layout.batch is not None or layout.heads is not None:
        raise ValueError(
            f"{layout!r} names axes of batch or heads inside a jax.shard_map, where arrays are "
            f"per-device. Write MeshLayout(tokens={layout.tokens!r}) here."
        )
    degree = axis_size(layout.tokens)
    q, k, v = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * degree, *x.shape[2:]), x.dtype)
        for x in (query, key, value)
    )
    mesh = jax.sharding.get_abstract_mesh()
    kernel = _kernel_of(kernel, q, k, v, spec, strategy, layout, mesh)
    check_residual(kernel, value, return_residual)
    out, residual = strategy(
        kernel, query, key, value, spec, axis_name=layout.tokens, return_residual=return_residual
    )
    return (out, residual.lse) if return_residual and residual is not None else out


@dataclass(frozen=True)
class _Arrangement:
    """How the work is divided: hashable, part of the compiled program."""

    layout: MeshLayout
    mesh: AnyMesh
    axis_names: frozenset[str]
    strategy: Strategy
    return_residual: bool


def _attend(
    kernel: Kernel,
    arrange: _Arrangement,
    query: Array,
    key: Array,
    value: Array,
    spec: Spec,
) -> Any:
    """The attention that all checks have passed."""
    layout, mesh = arrange.layout, arrange.mesh
    shape = (*query.shape[:3], value.shape[3])
    out_specs: Any = layout.spec
    if arrange.return_residual:
        out_specs = (layout.spec, PartitionSpec(*layout.spec[:3]))
    if 0 in shape:  # JAX 0.10.2 cannot compile the gradient of some kernels without elements
        sizes = (axes_size(axes, mesh.shape) for axes in layout.spec)
        local = tuple(n // size for n, size in zip(shape, sizes, strict=True))

        def nothing() -> Any:
            out = jnp.zeros(local, query.dtype)
            lse = jnp.full(local[:3], -jnp.inf, accumulated(query.dtype))
            return (out, lse) if arrange.return_residual else out

        # In a shard_map, as under jax.jit an array made outside of one has no mesh.
        return jax.shard_map(
            nothing,
            mesh=mesh,
            in_specs=(),
            out_specs=out_specs,
            axis_names=set(arrange.axis_names),
        )()
    degree, tensor_parallel = (axes_size(x, mesh.shape) for x in (layout.tokens, layout.heads))
    N, K = query.shape[2] // tensor_parallel, max(key.shape[2] // tensor_parallel, 1)
    strategy = arrange.strategy
    if layout.tokens is not None:
        spec = strategy.pad_heads(spec, N, K, degree, kernel)
    # Fewer KV heads than tensor-parallel shards: they stay whole, and each shard takes its one.
    whole_kv = key.shape[2] % tensor_parallel != 0
    kv_partition = replace(layout, heads=None).spec if whole_kv else layout.spec

    def per_device(query: Array, key: Array, value: Array, spec: Spec) -> Any:
        local = kernel
        if whole_kv:
            shared = ((names(layout.heads), tensor_parallel // key.shape[2]),)
            if layout.tokens is not None:
                shared += ((layout.tokens, strategy.kv_replicas(N, K, degree, kernel)),)
            local = local.sharing(shared)
            key, value = (_own_head(x, layout, tensor_parallel) for x in (key, value))
        if layout.tokens is None:
            out, residual = local.attend(query, key, value, spec)
        else:
            out, residual = strategy(
                local,
                query,
                key,
                value,
                spec,
                axis_name=layout.tokens,
                return_residual=arrange.return_residual,
            )
        return (out, residual.lse) if arrange.return_residual and residual else out

    partitions = (
        layout.spec,
        kv_partition,
        kv_partition,
        spec.map(partial(_partition_of, layout=layout, strategy=strategy)),
    )
    operands = (query, key, value, spec)
    operands = jax.tree.map(partial(reshard, mesh=mesh), operands, partitions)
    return jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=partitions,
        out_specs=out_specs,
        axis_names=set(arrange.axis_names),
        check_vma=kernel.check_vma and layout.check_vma,
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


def _partition_of(x: Array, axes: Axes, *, layout: MeshLayout, strategy: Strategy) -> PartitionSpec:
    """The batch as the layout has it, heads as the reshard leaves them, and the tokens whole."""
    mesh_axes: dict[Any, Any] = {
        "batch": layout.batch,
        "heads": (*names(layout.heads), *strategy.heads_axes(layout.tokens)),
    }
    return PartitionSpec(
        *(mesh_axes.get(axis) if n > 1 else None for n, axis in zip(x.shape, axes, strict=True))
    )
