"""The sharding that a gradient takes from its primal, where types have one."""

from typing import Any

import jax
from jax.sharding import AxisType
from jaxtyping import Array


def explicit_sharding(x: Array) -> Any:
    """The sharding of x on a mesh with Explicit axes, as `out_sharding` takes it; None elsewhere.

    JAX asks for it where an einsum sums over an axis that devices share.
    """
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None
