"""Attention of arrays whose tokens are sharded over a mesh: the public function."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from ._checks import axis_size
from .kernels import Kernel
from .kernels.kernel import check_residual
from .mask import Spec, accumulated, keyword_form
from .mask.array_fields import Axes
from .mask.keywords import canonical, to_flat
from .mesh import (
    AnyMesh,
    mesh_of_operands,
    mesh_of_shard_map,
    set_explicit_sharding,
)
from .mesh_layout import MeshLayout, axes_size, check_is_layout, names
from .order import TokenOrder
from .program_cache import compiled_with
from .strategies import Strategy, Ulysses
from .strategies.choice import Call, choose
from .strategies.strategy import check_has_tokens, check_strategy
from .varying_axes import varying_axes


@keyword_form
def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    spec: Spec,
    *,
    kernel: Any = None,
    strategy: Strategy | Literal["auto"] = Ulysses(),
    layout: MeshLayout = MeshLayout(),
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention` for sequences sharded over a mesh.

    Takes and returns global arrays, under `jax.jit` or not; arguments that have the name of one of
    `jax.nn.dot_product_attention` mean the same, and with the kernels here a query without any key
    gives 0. The work is the strategy's, inside a `jax.shard_map` that is manual over every axis of
    the mesh.

    Args:
      query, key, value: of one floating dtype; K divides N. Sharded as `layout` says; on a mesh
        with Explicit axes they are resharded where their type says otherwise. The degree divides T
        and S (`pad_to_degree` sees to it), the heads need not be divisible.
      kernel: of one device: `Blockwise()`, `Fused()`, `Triton()`, `Exact()`, `Dense()` with their
        options, or a function of query, key and value, which is given the keywords of
        `jax.nn` above that differ from their defaults. If None, that of `choose_kernel` for the
        platform of the mesh: the platform's own where it supports what is asked, else blockwise. A
        function is traced under `jax.jit`, also in an eager call, whose program is kept as long as
        the function and is used again for equal `functools.partial`s; so it must be pure.
      strategy: how the devices of the token axis share the work: `Ulysses(head_chunks=, overlap=)`,
        `AllGatherKV()`, `Ring()`, or `Hybrid(outer, inner)` over two mesh axes; "auto" is that of
        `choose_strategy`, which tells why.
      layout: the mesh axes of tokens, batch and heads, the order of the tokens, in which every
        array with a token axis lies, and the mesh where it is not that of
        `jax.set_mesh` or of the query.
      return_residual: also return the log of the sum of exp of the logits, `[B, T, N]`, sharded as
        the output; of `Dense`, `Blockwise` and `Triton`.

    Returns:
      The attention output, of the query's dtype, sharded as `layout` says; with `return_residual` a
      pair.

    Raises:
      ValueError: before any communication, for everything that does not fit or is not supported.

    Example:
      mesh = jax.make_mesh((2, 4), ("data", "seq"))
      layout = MeshLayout(tokens="seq", batch="data", mesh=mesh)
      out = dot_product_attention(q, k, v, is_causal=True, layout=layout)

    Notes:
      Arrays with a head axis in mask, logits and dropout are sharded like the heads, so each device
      gets its part; every device gets per-token and small arrays whole.

      Inside a `jax.shard_map` that is manual over the axis of the tokens, query, key and value are
      those of one device, and so is the output: the strategy runs right there. Masks and whatever
      has a token or a head axis stay those of the whole sequence and of all heads of the device's
      batch; dropout needs `head_keys`. Inside a `jax.shard_map` over other axes only, it runs
      forward: JAX differentiates nested ones with `check_vma=False` alone.

      With Explicit axes the cotangent of an eager `jax.vjp` may be sharded or not; one made under
      `jax.set_mesh` has a sharding in its type, which must be that of the output. The eager
      gradient of a loss such as `out.sum()` needs `jax.set_mesh`, as that of any sharded array's
      sum does in JAX 0.10.2.
    """
    check_strategy(strategy)
    check_is_layout(layout)
    manual = jax.sharding.get_abstract_mesh().manual_axes
    # Inside a jax.shard_map over the axis of the tokens the arrays are those of one device.
    on_device = bool(set(names(layout.tokens)) & set(manual))
    degree = axis_size(layout.tokens) if on_device else 1
    spec = canonical(spec, query, key, value, degree=degree)
    operands = {"query": query, "key": key, "value": value}
    if on_device:
        mesh = mesh_of_shard_map(layout, operands)
    else:
        mesh = mesh_of_operands(layout, operands, to_flat(spec))
    q, k, v = (_of_sequence(x, degree) for x in (query, key, value))
    # Inside a jax.shard_map types say what varies over its axes.
    check_vma = bool(varying_axes((query, key, value, spec)))
    call = Call(q, k, v, spec, mesh, layout, kernel, return_residual, check_vma)
    if strategy == "auto":
        strategy = Ulysses() if layout.tokens is None else choose(call).strategy
    check_has_tokens(strategy, layout)
    kernel = call.kernel_for(strategy)
    check_residual(kernel, value, return_residual)
    # None given means all; to name them all forbids a vmap over one more sharded axis.
    axis_names = frozenset(mesh.axis_names) - set(manual) if manual else frozenset()
    division = _Division(layout, mesh, axis_names, strategy, return_residual)
    if on_device:
        return _attend_on_device(kernel, division, query, key, value, spec)
    return compiled_with(kernel, _attend, division)(query, key, value, spec)


def _of_sequence(x: Array, degree: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of the whole sequence."""
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * degree, *x.shape[2:]), x.dtype)


@dataclass(frozen=True)
class _Division:
    """Division of one call over the mesh: hashable, part of the compiled program."""

    layout: MeshLayout
    mesh: AnyMesh
    axis_names: frozenset[str]
    strategy: Strategy
    return_residual: bool

    @property
    def degree(self) -> int:
        return axes_size(self.layout.tokens, self.mesh.shape)

    @property
    def tensor_parallel(self) -> int:
        return axes_size(self.layout.heads, self.mesh.shape)

    @property
    def out_specs(self) -> Any:
        """PartitionSpec of the output, and of the log of the sums where they are returned."""
        spec = self.layout.partition_spec
        return (spec, PartitionSpec(*spec[:3])) if self.return_residual else spec

    def shard_map(self, per_device: Any, in_specs: Any, *, check_vma: bool) -> Any:
        return jax.shard_map(
            per_device,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=self.out_specs,
            axis_names=set(self.axis_names),
            check_vma=check_vma and self.layout.check_vma,
        )


def _attend(
    kernel: Kernel, division: _Division, query: Array, key: Array, value: Array, spec: Spec
) -> Any:
    """The attention that all checks have passed."""
    layout, mesh, strategy = division.layout, division.mesh, division.strategy
    shape = (*query.shape[:3], value.shape[3])
    if 0 in shape:
        return _attend_to_nothing(division, shape, query.dtype)
    N = query.shape[2] // division.tensor_parallel
    K = max(key.shape[2] // division.tensor_parallel, 1)
    if layout.tokens is not None:
        axes = {name: mesh.shape[name] for name in names(layout.tokens)}
        spec = strategy.pad_heads(spec, N, K, axes, kernel)
    # Fewer KV heads than tensor-parallel shards: they stay whole, and each shard takes its one.
    whole_kv = key.shape[2] % division.tensor_parallel != 0
    local = kernel
    if whole_kv:
        local = kernel.sharing(((names(layout.heads), division.tensor_parallel // key.shape[2]),))

    def per_device(query: Array, key: Array, value: Array, spec: Spec) -> Any:
        if whole_kv:
            key, value = (_own_head(x, layout, division.tensor_parallel) for x in (key, value))
        return _attend_on_device(local, division, query, key, value, spec)

    of_kv = replace(layout, heads=None).partition_spec if whole_kv else layout.partition_spec
    of_spec = spec.map(partial(_partition_of, layout=layout, strategy=strategy))
    in_specs = (layout.partition_spec, of_kv, of_kv, of_spec)
    operands = (query, key, value, spec)
    operands = jax.tree.map(partial(set_explicit_sharding, mesh=mesh), operands, in_specs)
    return division.shard_map(per_device, in_specs, check_vma=kernel.check_vma)(*operands)


def _attend_on_device(
    kernel: Kernel, division: _Division, query: Array, key: Array, value: Array, spec: Spec
) -> Any:
    """Attention of the arrays of one device, inside a `jax.shard_map`."""
    layout, rows = division.layout, division.return_residual
    if layout.tokens is None:
        out, residual = kernel.attend(query, key, value, spec)
    else:
        # Here, where every device has all the tokens of these arrays: outside, on Explicit axes,
        # JAX does not permute what is sharded by its type.
        spec = spec.map(partial(_in_sequence, order=layout.order, degree=division.degree))
        asked = {"axis_name": layout.tokens, "order": layout.order, "return_residual": rows}
        out, residual = division.strategy(kernel, query, key, value, spec, **asked)
    return (out, residual.lse) if rows and residual is not None else out


def _attend_to_nothing(division: _Division, shape: tuple[int, ...], dtype: Any) -> Any:
    """The output of an attention of which some axis is empty.

    No kernel is called: JAX 0.10.2 cannot compile the gradient of some of them without elements.
    """
    sizes = (axes_size(axes, division.mesh.shape) for axes in division.layout.partition_spec)
    local = tuple(n // size for n, size in zip(shape, sizes, strict=True))

    def per_device() -> Any:
        out = jnp.zeros(local, dtype)
        lse = jnp.full(local[:3], -jnp.inf, accumulated(dtype))
        return (out, lse) if division.return_residual else out

    # In a shard_map, as under jax.jit an array made outside of one has no mesh.
    return division.shard_map(per_device, (), check_vma=True)()


def _own_head(x: Array, layout: MeshLayout, tensor_parallel: int) -> Array:
    """The one KV head that this tensor-parallel shard's query heads read."""
    head = jax.lax.axis_index(names(layout.heads)) * x.shape[2] // tensor_parallel
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)


def _in_sequence(x: Array, axes: Axes, *, order: TokenOrder, degree: int) -> Array:
    """Array in the order of the sequence, from an array in the layout's order."""
    for axis, name in enumerate(axes):
        if name in ("queries", "keys"):
            x = order.restore(x, axis, degree)
    return x


def _partition_of(x: Array, axes: Axes, *, layout: MeshLayout, strategy: Strategy) -> PartitionSpec:
    """PartitionSpec of a kernel's arrays: the layout's batch, the reshard's heads, whole tokens."""
    mesh_axes: dict[Any, Any] = {
        "batch": layout.batch,
        "heads": (*names(layout.heads), *strategy.heads_axes(layout.tokens)),
    }
    return PartitionSpec(
        *(mesh_axes.get(axis) if n > 1 else None for n, axis in zip(x.shape, axes, strict=True))
    )
