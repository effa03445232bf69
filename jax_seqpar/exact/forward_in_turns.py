"""The output where the keys lie on several devices: the four visits, as turns of a ring.

The largest logit; the sum of the weights, with the largest of them times its value; the sum that
says how fine their unit may be; the weighted values. Each waits for the one before it, of all keys.
What meets over the devices are maxima and sums of integers, so no bit depends on the order of the
visits. Logits are computed anew in each turn: to keep them would take memory for every query of a
device times every key.

Of each key of a KV head, with H and V channels of e bytes, H e + 4 bytes travel in each of the
first three turns (the key, and the exponent of its value), and (H + V) e in the fourth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..mask import Spec, Tokens
from ..mask.token_numbers import for_blocks, write
from ..varying_axes import full_varying
from .arithmetic import LEAST_EXPONENT, exponent, finite, flush, halves, right_on_grid, row_bits
from .block_logits import Options, Problem, marked
from .forward import ChunkOfRows, Rows, Values, rounded_output, with_sink
from .heads import first_head, map_heads


def outputs_in_turns(
    options: Options, spec: Spec, kv_heads: int, query: Array, key: Array, value: Array
) -> tuple[Array, Rows]:
    """Results of `outputs_of_all_keys`, from this device's queries and its part of the keys."""
    T, V, queries = query.shape[2], value.shape[2], _Queries(options, spec, kv_heads, query)
    key = marked(key, value)
    # The first three visits read only the exponents of the values, so only those are sent.
    sizes = key, finite(exponent(flush(value), -1))
    of_sizes = Values.without_digits

    def full(*shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        return full_varying(shape, value, dtype, (query, key, sizes, spec))

    def weights(rows: ChunkOfRows, m: Array) -> tuple[Array, Array, Array]:
        return rows.weights(rows.logits()[0], m)

    def largest_logit(rows: ChunkOfRows) -> Array:
        return rows.logits()[1]

    def total_and_largest(rows: ChunkOfRows, m: Array) -> tuple[Array, Array]:
        return weights(rows, m)[1:]

    def weight_count(rows: ChunkOfRows, m: Array, largest: Array) -> Array:
        return rows.weight_count(weights(rows, m)[0], largest)

    def weighted_values(rows: ChunkOfRows, m: Array, bits: Array) -> Array:
        return rows.weighted_values(weights(rows, m)[0], bits)

    nothing = full(T, value=-jnp.inf, dtype=jnp.float32)
    top = queries.turn(largest_logit, sizes, of_sizes, nothing, jnp.maximum)
    m, sink = queries.each(with_sink, top)
    nothing = full(2, T), full(T, value=LEAST_EXPONENT, dtype=jnp.int32)
    sum_and_max = jnp.add, jnp.maximum
    total, largest = queries.turn(total_and_largest, sizes, of_sizes, nothing, sum_and_max, m)
    count = queries.turn(weight_count, sizes, of_sizes, full(T), jnp.add, m, largest)
    bits = row_bits(largest, 1.0 + count)
    nothing = full(2, 2 * V, T)
    held = key, value
    sums = queries.turn(weighted_values, held, Values.on_grids, nothing, jnp.add, m, bits)
    total = total + jnp.moveaxis(halves(sink), 0, 2)
    return queries.each(rounded_output, top, m, total, bits, sums)


@dataclass(frozen=True)
class _Queries:
    """The queries of this device with all their heads, and the visits of their rows to the keys.

    Attributes:
      query: `[B K, G, T, H]`.
    """

    options: Options
    spec: Spec
    kv_heads: int
    query: Array

    def turn(
        self,
        visit: Callable[..., Any],
        held: tuple[Array, Array],
        values: Callable[[Array, int], Values],
        nothing: Any,
        meet: Any,
        *rows: Array,
    ) -> Any:
        """Result of a visit to the keys of all devices, for each row: `[B K, G, ..., T]`.

        Args:
          visit: `(chunk of rows, *rows of the chunk)` to arrays `[..., t]`.
          held: keys, and the part of the values that is sent, `[B K, S, ...]`.
          values: makes `Values` of that part and the size of a tile.
          nothing: the result without a key, `[..., T]`.
          meet: merges the results for different keys, as in `Turns.turn`.
          rows: results of earlier visits, `[B K, G, ..., T]`.
        """

        def one_part(held: tuple[Array, Array], spec: Spec) -> tuple[Any, None]:
            return self._visit(visit, held, values, spec, nothing, rows), None

        turns, heads = self.options.turns, self.query.shape[:2]
        assert turns is not None
        start = jax.tree.map(lambda x: jnp.broadcast_to(x, (*heads, *x.shape)), nothing)
        return turns.turn(one_part, held, self.spec, start, meet)[0]

    def each(self, function: Callable[..., Any], *rows: Array) -> Any:
        """`function(spec of the head, *rows of it)` for each query head."""

        def one_kv_head(index: Array, *rows: Array) -> Any:
            sequence, first = first_head(index, self.kv_heads, self.query.shape[1])

            def one_head(g: Array, *rows: Array) -> Any:
                return function(self.spec.take_heads(sequence, first + g, 1), *rows)

            return map_heads(one_head, *rows)

        return map_heads(one_kv_head, *rows)

    def _visit(
        self,
        visit: Callable[..., Any],
        held: tuple[Array, Array],
        values: Callable[[Array, int], Values],
        spec: Spec,
        nothing: Any,
        rows: tuple[Array, ...],
    ) -> Any:
        """Result of a visit to the keys of one device; arguments as for `turn`."""
        T, S = self.query.shape[2], held[0].shape[1]
        tile = self.options.key_chunk

        def one_kv_head(index: Array, q: Array, k: Array, v: Array, *rows: Array) -> Any:
            own_values, keys = values(v, tile), right_on_grid(flush(k))
            sequence, first = first_head(index, self.kv_heads, q.shape[0])

            def one_head(g: Array, q: Array, *rows: Array) -> Any:
                problem = Problem.of(spec.take_heads(sequence, first + g, 1), q, keys)

                def chunk(queries: Tokens, _: Any, found: Any) -> Any:
                    known = (queries.slice(x, x.ndim - 1) for x in rows)
                    own = visit(ChunkOfRows(problem, own_values, queries, S, tile), *known)
                    return jax.tree.map(lambda x, y: write(x, y, queries, x.ndim - 1), found, own)

                return for_blocks(T, self.options.query_chunk, (0, T), chunk, nothing)

            return map_heads(one_head, q, *rows)

        return map_heads(one_kv_head, self.query, *held, *rows)
