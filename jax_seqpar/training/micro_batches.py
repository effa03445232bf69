"""A batch in several parts, whose gradients are added before a step."""

from dataclasses import replace

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .._checks import check_count
from ..mesh import find_mesh, place
from ..mesh_layout import MeshLayout, axes_size
from .batch import Batch


def micro_batches(batch: Batch, count: int, layout: MeshLayout = MeshLayout()) -> Batch:
    """The batch with arrays `[count, B / count, S]`, to be scanned over; `Batch` itself has
    `[B, S]`.

    Part i has the sequences from `i B / count` on, whatever the mesh: no part is that of a device.
    The normaliser, `[count]`, is in each part that of the whole batch, so that the losses of the
    parts add up to the mean over all labels.

    Args:
      batch: of `TokenLayout.shard`.
      count: how many parts.
      layout: of the tokens.

    Raises:
      ValueError: unless parts and mesh divide the sequences.
    """
    mesh = find_mesh(layout.mesh, batch.tokens)
    B = batch.tokens.shape[0]
    check_count_of_parts(B, count, axes_size(layout.batch, mesh.shape))
    whole, tokens = PartitionSpec(None, *layout.token_spec[1:]), layout.token_spec

    def split(x: Array | None) -> Array | None:
        if x is None:
            return None
        # Whole sequences on every device, integers alone: no axis is split on two devices.
        x = place(x, whole, mesh=mesh).reshape(count, B // count, *x.shape[1:])
        return place(x, PartitionSpec(None, *tokens), mesh=mesh)

    return replace(
        batch,
        tokens=split(batch.tokens),
        labels=split(batch.labels),
        positions=split(batch.positions),
        segment_ids=split(batch.segment_ids),
        normaliser=jnp.broadcast_to(batch.normaliser, (count,)),
        size=(batch.size[0] // count, batch.size[1]),
    )


def check_count_of_parts(sequences: int, count: int, devices: int) -> None:
    """Raises ValueError unless so many parts have as many sequences each, on each device."""
    check_count("count", count)
    if sequences % (count * devices):
        raise ValueError(
            f"batch B = {sequences} must be a multiple of {count} micro-batches times {devices} "
            f"devices. Write a count that divides {sequences // devices}."
        )
