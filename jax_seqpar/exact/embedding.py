"""The embedding of tokens, whose gradient is a sum of integers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer

from .arithmetic import SMALLEST_NORMAL, exponent, flush, power_of_two
from .rounding import TOTAL_BITS, nearest
from .sharding import call_with_sharding, explicit_sharding, rows_sharding


@jax.custom_vjp
def embed(table: Float32[Array, "V D"], tokens: Integer[Array, "B S"]) -> Float32[Array, "B S D"]:
    """The rows of the tokens, flushed; NaN for one outside of the vocabulary.

    Gradient: `T = grid(dx, E, 32)`, E of each feature over all tokens, the int64 sum of the rows of
    one token, rounded once.
    """

    def rows(table: Array, tokens: Array) -> Array:
        return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    found = call_with_sharding(rows, rows_sharding(table, tokens), table, tokens)
    return jnp.where(jnp.abs(found) < SMALLEST_NORMAL, jnp.float32(0), found)


def _forward(table: Array, tokens: Array) -> tuple[Array, Any]:
    return embed(table, tokens), (table, tokens)


def _backward(saved: Any, dx: Array) -> tuple[Array, None]:
    table, tokens = saved
    with jax.enable_x64(True):
        dx = flush(dx)
        e = exponent(dx, (0, 1))
        integers = jnp.rint(dx * power_of_two(TOTAL_BITS - e)).astype(jnp.int64)

        def added(integers: Array, tokens: Array) -> Array:
            zeros = jnp.zeros(table.shape, jnp.int64)
            return zeros.at[tokens].add(integers, mode="drop", wrap_negative_indices=False)

        sums = call_with_sharding(added, explicit_sharding(table), integers, tokens)
        return nearest(sums.astype(jnp.float64) * power_of_two(e[0] - TOTAL_BITS)), None


embed.defvjp(_forward, _backward)
