"""Shared by both checks: sharding specs, and splitting and joining per-rank arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from ...compare.numpy_conversion import numpy_to_torch

# By column of the table, `forward`, `dq`, `dk`, `dv`: an array, or a dictionary of arrays.
Outputs = dict[str, Any]

TOKENS, HEADS = 1, 2
SPECS = {TOKENS: PartitionSpec(None, "seq"), HEADS: PartitionSpec(None, None, "seq")}


def join(parts: Sequence[Outputs], name: str, axis: int) -> Any:
    """One output of all the ranks, in rank order along the axis that they share."""
    return jax.tree.map(lambda *x: np.concatenate(x, axis), *(part[name] for part in parts))


def local_part(x: np.ndarray, axis: int, degree: int, rank: int) -> Any:
    """A rank's part of a global array, as a tensor."""
    return numpy_to_torch(np.ascontiguousarray(np.split(x, degree, axis)[rank]))
