"""How the axes of an attention's arrays lie on a mesh."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import PartitionSpec

AxisName = str | tuple[str, ...]
MeshAxes = AxisName | None


@dataclass(frozen=True)
class MeshLayout:
    """Names the mesh axes that shard the batch, the tokens and the heads of `[B, S, N, H]`.

    Each field is the name of a mesh axis, a tuple of names (major to minor), or None where that
    array axis is not sharded. Hashable, so it can be a static argument of `jax.jit`.

        MeshLayout()                                          [B, S@seq, N, H]
        MeshLayout(batch="data")                              [B@data, S@seq, N, H]
        MeshLayout(batch=("data", "fsdp"), heads="tensor")    [B@(data,fsdp), S@seq, N@tensor, H]
        MeshLayout(tokens=None, heads="tensor")               [B, S, N@tensor, H]

    Args:
      tokens: axis or axes of the sequence-parallel group; its size is the degree.
      batch: axis or axes of data parallelism.
      heads: axis or axes of tensor parallelism.
    """

    tokens: MeshAxes = "seq"
    batch: MeshAxes = None
    heads: MeshAxes = None

    def __post_init__(self) -> None:
        for field in ("tokens", "batch", "heads"):
            mesh_axes = getattr(self, field)
            if not (mesh_axes is None or isinstance(mesh_axes, str)):
                # A list would make the layout unhashable.
                object.__setattr__(self, field, tuple(mesh_axes))

    @property
    def spec(self) -> PartitionSpec:
        """PartitionSpec of query, key, value and output: `[B@batch, S@tokens, N@heads, H]`."""
        return PartitionSpec(self.batch, self.tokens, self.heads, None)

    @property
    def token_spec(self) -> PartitionSpec:
        """PartitionSpec of per-token arrays: `[B@batch, S@tokens, ...]`."""
        return PartitionSpec(self.batch, self.tokens)

    @property
    def axis_names(self) -> tuple[str, ...]:
        """Every mesh axis named, in the order batch, tokens, heads."""
        return (*names(self.batch), *names(self.tokens), *names(self.heads))

    def __str__(self) -> str:
        def label(axis: str, mesh_axes: MeshAxes) -> str:
            sharded = names(mesh_axes)
            if not sharded:
                return axis
            return f"{axis}@{sharded[0] if len(sharded) == 1 else '(' + ','.join(sharded) + ')'}"

        return f"[{label('B', self.batch)}, {label('S', self.tokens)}, {label('N', self.heads)}, H]"


def names(mesh_axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes as a tuple: `None -> ()`, `"seq" -> ("seq",)`."""
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def axes_size(mesh_axes: MeshAxes, mesh_shape: Mapping[str, int]) -> int:
    """How many devices share an array axis: the product of its mesh axes, 1 for None."""
    return math.prod(mesh_shape[name] for name in names(mesh_axes))
