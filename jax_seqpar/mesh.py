"""The mesh of a call, and arrays put on it as a spec says."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from . import refusals
from .layout import names

AnyMesh = Mesh | AbstractMesh


def find_mesh(mesh: AnyMesh | None, x: Any = None) -> AnyMesh:
    """The mesh given; else that of `jax.set_mesh`, else the one x is sharded over.

    Raises:
      ValueError: if there is none.
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
    raise refusals.no_mesh()


def devices_of(mesh: AnyMesh) -> set[Any] | None:
    """The devices of a mesh; None under `jax.jit`, where the devices of an array do not matter."""
    try:
        concrete = jax.sharding.get_mesh()
    except ValueError:  # under jax.jit
        return None
    if isinstance(mesh, Mesh):
        return set(mesh.devices.flat)
    return set(concrete.devices.flat) if concrete.abstract_mesh == mesh else None


def reshard(x: Array, spec: PartitionSpec, *, mesh: AnyMesh) -> Array:
    """Gives x its sharding in the Explicit axes; `jax.shard_map` does so for Auto ones."""
    kept = _of_kind(spec, mesh, AxisType.Explicit)
    return x if kept is None else jax.sharding.reshard(x, kept)


def place(x: Array, spec: PartitionSpec, *, mesh: AnyMesh) -> Array:
    """x, sharded as spec says: moved there, or under `jax.jit` constrained to it."""
    if not isinstance(x, Tracer):
        return jax.device_put(x, NamedSharding(mesh, spec) if isinstance(mesh, Mesh) else spec)
    kept = _of_kind(spec, mesh, AxisType.Auto)
    x = reshard(x, spec, mesh=mesh)
    return x if kept is None else jax.lax.with_sharding_constraint(x, kept)


def _of_kind(spec: PartitionSpec, mesh: AnyMesh, kind: AxisType) -> NamedSharding | None:
    """`spec` restricted to mesh axes of one AxisType; None if there are none."""
    axes = {name for name, its in zip(mesh.axis_names, mesh.axis_types, strict=True) if its == kind}
    if not axes:
        return None
    kept = (tuple(n for n in names(part) if n in axes) or None for part in spec)
    return NamedSharding(mesh, PartitionSpec(*kept))
