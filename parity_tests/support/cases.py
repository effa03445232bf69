"""The table that drives the tests.

All sizes of a case differ, and batch, local tokens and local heads are at least 2 wherever they can
be: with equal or unit sizes a swapped axis does not show.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jax_seqpar import MeshLayout
from jax_seqpar.mesh_layout import axes_size
from jax_seqpar.parity.inputs import Case

DEGREES = (1, 2, 4, 8)

CASES = {
    "multi-head": Case(batch=2, tokens=24, heads=16, kv_heads=16, head_dim=5),
    "grouped": Case(batch=3, tokens=40, heads=32, kv_heads=16, head_dim=6),
    "fewer KV heads than devices": Case(batch=2, tokens=24, heads=16, kv_heads=2, head_dim=7),
    "multi-query": Case(batch=3, tokens=16, heads=8, kv_heads=1, head_dim=5),
    "not causal": Case(batch=2, tokens=56, heads=16, kv_heads=4, head_dim=3, is_causal=False),
    "bfloat16": Case(batch=3, tokens=32, heads=16, kv_heads=8, head_dim=6, dtype="bfloat16"),
    "float16": Case(batch=2, tokens=40, heads=16, kv_heads=8, head_dim=3, dtype="float16"),
}


@dataclass(frozen=True)
class MeshCase:
    """A mesh, and how the arrays lie on it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    layout: MeshLayout

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout}"

    def mesh(self, kind: AxisType = AxisType.Auto) -> Mesh:
        return jax.make_mesh(self.shape, self.axes, axis_types=(kind,) * len(self.axes))

    def on(self, kind: AxisType = AxisType.Auto) -> MeshLayout:
        """The layout, with the mesh."""
        return self.layout.on(self.mesh(kind))

    @property
    def degree(self) -> int:
        return axes_size(self.layout.tokens, dict(zip(self.axes, self.shape, strict=True)))


ONE_AXIS = {d: MeshCase((d,), ("seq",), MeshLayout()) for d in DEGREES}
# Not symmetric: a 2x2 mesh cannot show swapped axes.
MESHES = [
    ONE_AXIS[4],
    ONE_AXIS[8],
    MeshCase((2, 4), ("data", "seq"), MeshLayout(batch="data")),
    MeshCase((4, 2), ("data", "seq"), MeshLayout(batch="data")),
    MeshCase((2, 2, 2), ("data", "seq", "tensor"), MeshLayout(batch="data", heads="tensor")),
    MeshCase((4, 2), ("seq", "tensor"), MeshLayout(heads="tensor")),
    MeshCase((2, 4), ("pod", "seq"), MeshLayout(tokens=("pod", "seq"))),
    MeshCase((2, 4), ("data", "seq"), MeshLayout(batch=("data", "seq"), tokens=None)),
]
# Divisible by every mesh above; batch 8 for those that shard it.
MESH_CASES = {
    "grouped": Case(batch=8, tokens=24, heads=16, kv_heads=8, head_dim=6),
    "multi-query": Case(batch=8, tokens=40, heads=16, kv_heads=1, head_dim=5),
}


def slow(*values: Any) -> Any:
    """A case like others, for `make test-slow`."""
    return pytest.param(*values, marks=pytest.mark.slow)


KINDS = (AxisType.Auto, AxisType.Explicit)
# Every mesh with both cases and both kinds of axes, and both cases with both kinds.
ON_MESHES = [
    (case, where, KINDS[(i + j) % 2])
    for i, where in enumerate(MESHES)
    for j, case in enumerate(MESH_CASES.values())
]

# Every mesh, with one case and one kind of axes; each case with each kind.
FEWER_ON_MESHES = [
    where if (i // 2 + 1) // 2 % 2 == i % 2 else slow(*where) for i, where in enumerate(ON_MESHES)
]


def is_array(x: Any) -> bool:
    """Whether an option is an array, or a pair of them."""
    return isinstance(x, np.ndarray) or (isinstance(x, tuple) and isinstance(x[0], np.ndarray))
