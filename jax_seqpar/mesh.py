"""The mesh of a call, and arrays put on it as a spec says."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .device_order import warn_of_slow_order
from .mesh_layout import MeshLayout, axes_size, check_division, check_mesh, check_sharding, names

AnyMesh = Mesh | AbstractMesh


def find_mesh(mesh: AnyMesh | None, x: Any = None) -> AnyMesh:
    """The mesh given; else that of `jax.set_mesh`, else the one x is sharded over.

    Raises:
      ValueError: without any of the three.
    """
    if mesh is not None:
        return mesh
    candidates: list[Any] = [jax.sharding.get_abstract_mesh()]
    if x is not None:
        # An array knows its devices; under jit only the type of its tracer knows the mesh.
        candidates.append(getattr(getattr(x, "sharding", None), "mesh", None))
        candidates.append(jax.typeof(x).sharding.mesh)
    for candidate in candidates:
        if candidate is not None and not candidate.empty:
            return candidate
    raise ValueError(
        "no mesh: query is not sharded over one, and no jax.set_mesh is active. Write "
        "MeshLayout(mesh=mesh), or `with jax.set_mesh(mesh):` around the call."
    )


def mesh_of_operands(
    layout: MeshLayout, operands: Mapping[str, Any], arrays: Mapping[str, Any]
) -> AnyMesh:
    """The mesh that global arrays are attended on, as `find_mesh` finds it.

    Args:
      operands: query, key and value by name.
      arrays: the other arrays of the attention.

    Warns where another order of the devices would keep the sequence within slices or hosts.

    Raises:
      ValueError: for a layout or arrays that do not fit the mesh, or one another.
    """
    context = jax.sharding.get_abstract_mesh()
    manual = context.manual_axes
    check_is_mesh(layout.mesh, context if manual else None)
    mesh = context if manual else find_mesh(layout.mesh, operands["query"])
    check_devices({**operands, **arrays}, devices_of(mesh))
    check_mesh(layout, mesh.shape, manual)
    for name, x in operands.items():
        check_sharding(name, jax.typeof(x).sharding.spec, layout)
    check_division(operands["query"].shape, operands["key"].shape, layout, mesh.shape)
    warn_of_slow_order(layout, mesh)
    return mesh


def mesh_of_shard_map(layout: MeshLayout, operands: Mapping[str, Any]) -> AnyMesh:
    """The mesh of the enclosing `jax.shard_map`, which is manual over the axis of the tokens.

    Args:
      operands: query, key and value by name, of one device.

    Raises:
      ValueError: for a layout or a number of tokens that does not fit it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    check_is_mesh(layout.mesh, mesh)
    if layout.batch is not None or layout.heads is not None:
        raise ValueError(
            f"{layout!r} names axes of batch or heads inside a jax.shard_map, where arrays are "
            f"per-device. Write MeshLayout(tokens={layout.tokens!r}) here."
        )
    degree = axes_size(layout.tokens, mesh.shape)
    for name in ("query", "key"):
        layout.order.check(name, operands[name].shape[1] * degree, degree)
    return mesh


def platform_of(mesh: AnyMesh) -> str | None:
    """Platform of the mesh's devices, "cpu", "gpu" or "tpu"; None for another or an unknown one."""
    # Under jax.set_mesh the mesh is abstract, and has one device that stands for all.
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else mesh.abstract_device
    platform = getattr(device, "platform", None)
    return platform if platform in ("tpu", "gpu", "cpu") else None


def devices_of(mesh: AnyMesh) -> set[Any] | None:
    """The devices of a mesh; None under `jax.jit`, where the devices of an array do not matter."""
    try:
        concrete = jax.sharding.get_mesh()
    except ValueError:  # under jax.jit
        return None
    if isinstance(mesh, Mesh):
        return set(mesh.devices.flat)
    return set(concrete.devices.flat) if concrete.abstract_mesh == mesh else None


def set_explicit_sharding(x: Array, spec: PartitionSpec, *, mesh: AnyMesh) -> Array:
    """Gives x its sharding in the Explicit axes; `jax.shard_map` does so for Auto ones."""
    kept = _of_kind(spec, mesh, AxisType.Explicit)
    return x if kept is None else jax.sharding.reshard(x, kept)


def place(x: Array, spec: PartitionSpec, *, mesh: AnyMesh) -> Array:
    """x, sharded as spec says: moved there, or under `jax.jit` constrained to it."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, NamedSharding(mesh, spec) if isinstance(mesh, Mesh) else spec)
    kept = _of_kind(spec, mesh, AxisType.Auto)
    x = set_explicit_sharding(x, spec, mesh=mesh)
    return x if kept is None else jax.lax.with_sharding_constraint(x, kept)


def _of_kind(spec: PartitionSpec, mesh: AnyMesh, kind: AxisType) -> NamedSharding | None:
    """`spec` restricted to mesh axes of one AxisType; None if the mesh has no such axis."""
    axes = {name for name, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its == kind}
    if not axes:
        return None
    kept = (tuple(n for n in names(part) if n in axes) or None for part in spec)
    return NamedSharding(mesh, PartitionSpec(*kept))


def check_devices(tree: Mapping[str, Any], devices: set[Any] | None) -> None:
    """Raises ValueError for arrays committed to other devices than those of the mesh.

    Args:
      tree: arrays by name.
      devices: of the mesh; None where they are not known.
    """
    if devices is None:
        return
    for name, x in tree.items():
        for leaf in jax.tree.leaves(x):
            if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array) or not leaf.committed:
                continue
            if leaf.sharding.device_set != devices:
                raise ValueError(
                    f"{name} is on {_ids(leaf.sharding.device_set)}, the mesh has "
                    f"{_ids(devices)}. Write jax.device_put({name}, jax.NamedSharding(mesh, spec)),"
                    f" where spec says which mesh axis shards which axis of the array."
                )


def _ids(devices: set[Any]) -> str:
    (platform, *more) = {device.platform for device in devices}
    ids = ", ".join(str(n) for n in sorted(device.id for device in devices))
    return f"{'/'.join((platform, *more))} device{'s' if len(devices) > 1 else ''} {ids}"


def check_is_mesh(mesh: Any, context: Any) -> None:
    """Raises ValueError unless `mesh` is a Mesh, and the mesh of the enclosing `jax.shard_map`.

    Args:
      context: the mesh of the enclosing `jax.shard_map`; None outside of one.
    """
    if mesh is None:
        return
    if not hasattr(mesh, "axis_names"):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}. Write jax.make_mesh().")
    if context is not None and dict(mesh.shape) != dict(context.shape):
        raise ValueError(
            f"mesh has the axes {dict(mesh.shape)}, but this is inside a jax.shard_map over "
            f"{dict(context.shape)}, whose mesh it is on. Leave mesh= out of the MeshLayout."
        )
