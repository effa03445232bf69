"""SplitKV: each device attends to the keys that it holds; two collectives merge the parts.

Flash-Decoding (https://pytorch.org/blog/flash-decoding) over devices instead of blocks of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._checks import axis_size
from ..kernels import Kernel
from ..kernels.parts import Part
from ..kernels.softmax_residual import finite
from ..mask import Spec
from ..mesh_layout import AxisName


@dataclass(frozen=True)
class SplitKV:
    """Queries on every device, keys and values where they are.

    A device sends its part of each row, merged by one maximum and one sum over the devices:
    `4 B T N (V + 2)` bytes, whatever the number of keys. `Exact()` has five sums and maxima, of
    integers, and the bits of one device.

    Args:
      scatter_heads: the sum leaves each device its share of the heads instead of all, half of what
        is sent; for an output projection that is sharded by heads over the same mesh axis.
    """

    scatter_heads: bool = False

    def __call__(
        self,
        kernel: Kernel,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B C K H"],
        value: Float[Array, "B C K V"],
        spec: Spec,
        lost: Bool[Array, "B 1"],
        *,
        axis_name: AxisName,
    ) -> Array:
        """`[B, T, N, V]`, or N / P of the heads, of the query's dtype.

        Args:
          query: the same on every device.
          key, value: those that this device holds.
          spec: with the positions of the queries and of these keys.
          lost: the rows that are NaN, as a key that this device should have has no place.
          axis_name: the mesh axis (or axes) of the tokens; () for one device.
        """
        lost = lost[..., None]
        if not axis_name:
            return _nan_where(lost, kernel.attend(query, key, value, spec)[0])
        if kernel.attends_in_turns:
            turns = OneVisit(axis_name, axis_size(axis_name))
            out = kernel.attend_in_turns(turns, query, key, value, spec)
            lost = jax.lax.psum(lost.astype(jnp.int32), axis_name) > 0
            return self._own_heads(_nan_where(lost, out), axis_name)
        local = replace(spec, logits=replace(spec.logits, sinks=None))
        part = kernel.attend_part(query, key, value, local)
        part = Part(part.out, part.residual._replace(total=_nan_where(lost, part.residual.total)))
        return self._merged(part, spec.logits.sinks, axis_name).astype(query.dtype)

    def _merged(self, part: Part, sinks: Array | None, axis_name: AxisName) -> Array:
        """The attention to the keys of all devices, each head's sink counted once."""
        own_top = jnp.where(part.residual.total == 0, -jnp.inf, part.residual.top)
        top = jax.lax.pmax(own_top, axis_name)
        if sinks is not None:
            sinks = jnp.broadcast_to(sinks.astype(top.dtype), top.shape)
            top = jnp.maximum(top, sinks)
        top = finite(top)
        weight = part.residual.total * jnp.exp(own_top - top)
        sums = jnp.concatenate([part.out * weight[..., None], weight[..., None]], axis=-1)
        if self.scatter_heads:
            sums = jax.lax.psum_scatter(sums, axis_name, scatter_dimension=2, tiled=True)
        else:
            sums = jax.lax.psum(sums, axis_name)
        total = sums[..., -1:]
        if sinks is not None:
            total += self._own_heads(jnp.exp(sinks - top)[..., None], axis_name)
        return sums[..., :-1] / jnp.where(total == 0, 1, total)

    def _own_heads(self, x: Array, axis_name: AxisName) -> Array:
        """This device's share of the heads of `[B, T, N, ...]`, or all of them."""
        if not self.scatter_heads:
            return x
        share = x.shape[2] // axis_size(axis_name)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis_name) * share, share, 2)


def _nan_where(rows: Array, x: Array) -> Array:
    rows = rows.reshape(*rows.shape, *(1,) * (x.ndim - rows.ndim))
    return jnp.where(rows, jnp.asarray(jnp.nan, x.dtype), x)


@dataclass(frozen=True)
class OneVisit:
    """`Turns` of devices with the same queries: each visits its keys, and the results are merged.

    See `jax_seqpar.kernels.kernel.Turns`.
    """

    axis_name: AxisName
    degree: int

    def turn(
        self,
        visit: Callable[..., tuple[Any, Any]],
        held: Any,
        spec: Spec,
        nothing: Any,
        meet: Any,
        nothing_added: Any = None,
        join: Callable[[Any, Any], Any] = jnp.add,
    ) -> tuple[Any, Any]:
        if nothing_added is not None:
            raise ValueError(
                f"decoding over mesh axis {self.axis_name!r} has no gradient. Write "
                f"jax_seqpar.dot_product_attention(...) where one is needed."
            )

        def over_devices(function: Any, found: Any) -> Any:
            return jax.tree.map(lambda x: self._over_devices(function, x), found)

        return jax.tree.map(over_devices, meet, visit(held, spec)[0]), None

    def _over_devices(self, function: Any, x: Array) -> Array:
        if function is jnp.add:
            return jax.lax.psum(x, self.axis_name)
        # Gathered, as a `pmax` over CPU devices may lose a NaN.
        parts = jax.lax.all_gather(x, self.axis_name)
        return reduce(function, [parts[i] for i in range(self.degree)])
