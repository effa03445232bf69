"""Reductions over the devices that hold a replica of the same KV head."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from ..mesh_layout import AxisName


# Static, so that it passes through a kernel that is compiled or rematerialised by itself.
@jax.tree_util.register_static
@dataclass(frozen=True)
class SharedHeads:
    """The devices that have the same KV heads, each with some of their query heads.

    They are the product, over mesh axes, of a number of consecutive devices along each. For use
    inside `jax.shard_map`.

    Attributes:
      axes: mesh axis (or axes) and how many consecutive devices along it share; the number divides
        the size of the axis.
    """

    axes: tuple[tuple[AxisName, int], ...]

    @property
    def devices(self) -> int:
        return math.prod(count for _, count in self.axes)

    def max(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Maximum over the devices that share the KV head, on each of them."""
        for axis_name, count in self.axes:
            x = jax.lax.pmax(x, axis_name, axis_index_groups=_groups(axis_name, count))
        return x

    def sum(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Sum over the devices that share the KV head, on each of them."""
        for axis_name, count in self.axes:
            groups = _groups(axis_name, count)
            if groups is None:
                x = jax.lax.psum(x, axis_name)
            else:
                # JAX has no psum of groups where it checks how values vary over the mesh.
                x = jax.lax.all_gather(x, axis_name, axis_index_groups=groups).sum(0)
        return x

    def is_first(self) -> Bool[Array, ""]:
        """True on the first of the devices that share the KV head."""
        first = jnp.bool_(True)
        for axis_name, count in self.axes:
            first = first & (jax.lax.axis_index(axis_name) % count == 0)
        return first


def _groups(axis_name: AxisName, count: int) -> list[list[int]] | None:
    """Runs of consecutive devices; None if one run is the whole axis."""
    size = jax.lax.axis_size(axis_name)
    if count == size:
        return None
    return [list(range(start, start + count)) for start in range(0, size, count)]
