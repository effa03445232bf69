"""Warning if the sequence axis of a mesh crosses slices or hosts more often than it needs to."""

import math
import warnings
from typing import Any

import numpy as np
from jax.sharding import Mesh

from .mesh_layout import MeshLayout, axes_size, names


def place_of(device: Any) -> tuple[str, int]:
    """The slice of a TPU; of any other device the host, which is one for each process of JAX."""
    slice_index = getattr(device, "slice_index", None)
    if slice_index is None and device.platform == "tpu":
        slice_index = 0  # libtpu numbers the slices of a topology only if there are several
    return ("host", device.process_index) if slice_index is None else ("slice", slice_index)


def warn_of_slow_order(layout: MeshLayout, mesh: Any) -> None:
    """Warns where `slow_order` finds something; an abstract mesh has no devices to look at."""
    if isinstance(mesh, Mesh) and (found := slow_order(layout, mesh)) is not None:
        warnings.warn(found, stacklevel=3)


def slow_order(layout: MeshLayout, mesh: Mesh) -> str | None:
    """Why another order of the devices would keep more of the attention on fast links.

    None where the devices that share a sequence lie in as few slices or hosts as can hold them,
    those of each side by side: the exchanges of Ulysses, and all but a few of the hops of a ring,
    then stay within one.
    """
    lines = _lines(layout, mesh)
    places, index = np.unique([place_of(x) for x in lines.flat], axis=0, return_inverse=True)
    if len(places) == 1 or lines.shape[1] == 1:
        return None
    index = index.reshape(lines.shape)
    room = np.bincount(index.ravel()).max()
    fewest = math.ceil(lines.shape[1] / room)
    for line in index:
        held = np.unique(line)
        borders = np.count_nonzero(line[1:] != line[:-1])
        if len(held) > fewest or borders >= len(held):
            labels = [" ".join(places[i]) for i in held]
            return _message(layout, mesh, labels, fewest, int(borders))
    return None


def _lines(layout: MeshLayout, mesh: Mesh) -> np.ndarray:
    """The devices, `[sequences, degree]`: in a row those that share a sequence, in its order."""
    axes = names(layout.tokens)
    last = range(-len(axes), 0)
    devices = np.moveaxis(mesh.devices, [mesh.axis_names.index(name) for name in axes], last)
    return devices.reshape(-1, axes_size(layout.tokens, mesh.shape))


def _message(layout: MeshLayout, mesh: Mesh, labels: list[str], fewest: int, borders: int) -> str:
    axes = names(layout.tokens)
    order = (*(name for name in mesh.axis_names if name not in axes), *axes)
    sizes = tuple(mesh.shape[name] for name in order)
    shown = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
    if len(labels) > fewest:
        problem = f"where {fewest} would hold a whole sequence"
    else:
        problem = f"{borders} times, where {len(labels) - 1} would do"
    return (
        f"mesh axis {'x'.join(axes)!r} of the tokens crosses {len(labels)} slices or hosts "
        f"({shown}), {problem}, so the attention waits for the slower links between them. Write "
        f"jax.make_mesh({sizes}, {order}) with jax.devices() in their order."
    )
