"""Sums over blocks of queries that lie on several devices, as `AllGatherKV` may hold them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._checks import axis_size
from ..mask import Tokens
from ..mesh_layout import AxisName
from .arithmetic import LEAST_EXPONENT, exponent, on_unit, slices
from .token_blocks import Blocks, Operand


@dataclass(frozen=True)
class SplitBlocks:
    """Sums over blocks of queries of which each may lie on several devices.

    No device may round before it knows the largest number of the block, nor cut the sum of its part
    into slices: exponents meet first, then sums of integers. That takes two visits more, and memory
    for the sums of every block of the sequence. Devices that each hold a multiple of a block's
    queries have no such block.

    Attributes:
      axis: the mesh axis (or axes) along which devices hold the queries in parts.
      operands: what the sums of dk and of dv multiply.
      weights: `(head, index)` to `ds` and `w` of a block, and its queries.
      full: a constant to start a loop with.
    """

    blocks: Blocks
    axis: AxisName
    keys: Tokens
    operands: list[Operand]
    weights: Callable[[Any, Any], tuple[Array, Array, Tokens]]
    full: Callable[..., Array]

    def slices(self, anchors: list[Array]) -> list[Array]:
        """Of dk `[2, s, H]` and of dv `[2, s, V]`, on the first of the devices; 0 on the others."""
        sums, units = self._sums(self._units())
        is_first = jax.lax.axis_index(self.axis) == 0
        parts = (
            slices(x, unit, anchor[None, None], axis=-1).sum((1, 2))
            for x, unit, anchor in zip(sums, units, anchors, strict=True)
        )
        return [jnp.where(is_first, part, 0.0) for part in parts]

    def _units(self) -> list[Array]:
        """Exponents u of every key in every block, `[G, blocks, s, 1]`."""

        def find(g: Any, index: Any, units: list[Array]) -> list[Array]:
            *weights, queries = self.weights(g, index)
            parts = (
                exponent(d * operand.powers(g, queries), 1)
                for d, operand in zip(weights, self.operands, strict=True)
            )
            return [u.at[g, index].set(part) for u, part in zip(units, parts, strict=True)]

        nothing = self._of_blocks(1, value=LEAST_EXPONENT, dtype=jnp.int32)
        units = self.blocks.for_queries(self.keys, find, [nothing, nothing])
        return [jax.lax.pmax(u, self.axis) for u in units]

    def _sums(self, units: list[Array]) -> tuple[list[Array], list[Array]]:
        """Of integers times digits, `[G, blocks, s, 2H]`, and their units."""

        def add(g: Any, index: Any, sums: list[Array]) -> list[Array]:
            *weights, queries = self.weights(g, index)
            for i, (d, operand) in enumerate(zip(weights, self.operands, strict=True)):
                integers, _ = on_unit(d * operand.powers(g, queries), 1, units[i][g, index])
                products = integers @ queries.slice(operand.digits[g], 0)
                sums[i] = sums[i].at[g, index].set(products)
            return sums

        nothing = [self._of_blocks(operand.digits.shape[-1]) for operand in self.operands]
        sums = self.blocks.for_queries(self.keys, add, nothing)
        return [jax.lax.psum(x, self.axis) for x in sums], units

    def _of_blocks(self, width: int, **options: Any) -> Array:
        """`[G, blocks, s, width]`, for the blocks of the whole sequence."""
        count = -(-self.blocks.queries * axis_size(self.axis) // self.blocks.size)
        return self.full(self.blocks.heads, count, self.keys.size, width, **options)
