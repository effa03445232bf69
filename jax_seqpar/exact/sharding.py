"""The sharding that a gradient takes from its primal, where types have one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array


def explicit_sharding(x: Array) -> Any:
    """The sharding of x on a mesh with Explicit axes, as `out_sharding` takes it; None elsewhere.

    JAX asks for it where an einsum sums over an axis that devices share.
    """
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


@jax.tree_util.register_static
@dataclass(frozen=True)
class PrimalSharding:
    """The sharding of a primal, which can be a residual of a `jax.custom_vjp`.

    The gradient of a primal needs its type. Where two operands are sharded over different Explicit
    axes the result, and so what is computed from its gradient, has the axes of both.
    """

    sharding: Any

    @classmethod
    def of(cls, x: Array) -> "PrimalSharding":
        return cls(explicit_sharding(x))

    def reshard(self, gradient: Array) -> Array:
        """Reshards the gradient to the sharding of the primal; a mesh without Explicit axes, or
        none, leaves it as it is."""
        return gradient if self.sharding is None else reshard(gradient, self.sharding)


def rows_sharding(table: Array, tokens: Array) -> Any:
    """The sharding of the rows `[*tokens, D]` of a table `[V, D]`; None without Explicit axes."""
    of_table, of_tokens = explicit_sharding(table), explicit_sharding(tokens)
    if of_table is None or of_tokens is None:
        return None
    return NamedSharding(of_table.mesh, PartitionSpec(*of_tokens.spec, of_table.spec[1]))


def call_with_sharding(function: Callable[..., Array], sharding: Any, *arrays: Array) -> Array:
    """Calls `function(*arrays)`, whose result is sharded so; Explicit axes are Auto inside of it.

    For indexing, which JAX does not shard by its types (0.10.2).
    """
    if sharding is None:
        return function(*arrays)
    on_auto_axes: Any = jax.sharding.auto_axes(function, out_sharding=sharding)
    return on_auto_axes(*arrays)
