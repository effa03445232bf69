"""One array from every device of a mesh axis to the device so many places on."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._checks import axis_size
from ..mesh_layout import AxisName, names


def send(x: Array, distance: int, axis_name: AxisName) -> Array:
    """One permute of a ring; an array of 16 bits travels as integers where XLA would widen it."""
    axes, devices = _in_mesh_order(axis_name)
    pairs = list(zip(devices, np.roll(devices, -distance).tolist(), strict=True))
    permute = partial(jax.lax.ppermute, axis_name=axes, perm=pairs)
    if x.dtype.itemsize > 2:
        return permute(x)

    def as_integers(x: Array) -> Array:
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = permute(jax.lax.bitcast_convert_type(x, unsigned))
        return jax.lax.bitcast_convert_type(bits, x.dtype)

    return jax.lax.platform_dependent(x, cpu=as_integers, default=permute)


def _in_mesh_order(axis_name: AxisName) -> tuple[tuple[str, ...], list[int]]:
    """The axes as the mesh has them, and what `ppermute` calls each device of the ring.

    `ppermute` of several axes counts devices in the order of the mesh, whatever the order of their
    names; `axis_index` and all other collectives go by the names (JAX 0.10.2).
    """
    axes = names(axis_name)
    in_mesh = [name for name in jax.sharding.get_abstract_mesh().axis_names if name in axes]
    sizes = [axis_size(name) for name in in_mesh]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    numbers = numbers.transpose([in_mesh.index(name) for name in axes])
    return tuple(in_mesh), numbers.ravel().tolist()
