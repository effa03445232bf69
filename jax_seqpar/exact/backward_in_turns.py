"""The gradients where the keys lie on several devices: two turns of a ring.

The first finds the anchors, the second adds up. Anchors of keys meet by maximum, slices of dk and
dv by sum; both belong to their keys and travel with them. Every device holds whole blocks, so each
block of queries and keys is summed up by one device.

Of each key of a KV head, with H and V channels of e bytes, 8 bytes travel in the first turn
(exponents) with 12 that are added to them, and (H + V) e + 8 in the second (with the anchors), with
16 (H + V) of slices.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from ..mask import Spec
from ..varying_axes import full_varying, match_varying_axes
from .arithmetic import flush
from .backward import Head, block_sums, dropout_bits, rounded_gradients, shared_anchors
from .block_logits import Options, scaled_query
from .forward import Rows
from .gradient_exponents import (
    Anchors,
    Exponents,
    exponents_of_keys,
    nothing_of_keys,
    nothing_of_rows,
)
from .heads import first_head, map_heads
from .token_blocks import Blocks


def gradients_in_turns(
    options: Options,
    spec: Spec,
    kv_heads: int,
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    rows: Rows,
    grad: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of `gradients_of_all_keys`, from this device's queries and its part of the keys."""
    (BK, G, T, H), (S, V), turns = query.shape, value.shape[1:], options.turns
    assert turns is not None

    def own_heads(spec: Spec, index: Array) -> Spec:
        return spec.take_heads(*first_head(index, kv_heads, G), G)

    operands = query, key, value, out, rows, grad, spec

    def full(*shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        return full_varying(shape, value, dtype, operands)

    exponents = _exponents(spec, query, key, value, out, rows, grad)

    def find_maxima(of_keys: Array, spec: Spec) -> tuple[Array, Array]:
        def one(index: Array, own: Exponents) -> tuple[Array, Array]:
            return own.maxima(Blocks(own_heads(spec, index), G, T, S, options.block))

        return map_heads(one, exponents._replace(of_keys=of_keys))

    of_rows = jnp.moveaxis(nothing_of_rows(full, BK, G, T), 0, 1)
    of_keys = jnp.moveaxis(nothing_of_keys(full, BK, S), 0, 1)
    nothing = of_rows, jnp.maximum, of_keys, jnp.maximum
    maxima = turns.turn(find_maxima, exponents.of_keys, spec, *nothing)

    def find_anchors(_: Array, own: Exponents, of_rows: Array, of_keys: Array) -> Anchors:
        return shared_anchors(options, own.anchors(of_rows, of_keys, dropout_bits(spec)))

    anchors = map_heads(find_anchors, exponents, *maxima)

    def add(held: Any, spec: Spec) -> tuple[Array, tuple[Array, Array]]:
        def one(index: Array, held: Any, of_query: Array, q: Array, *rest: Any) -> Any:
            k, v, of_key, of_value = held
            head = Head.of(own_heads(spec, index), q, k, v, *rest)
            _, *sums = block_sums(head, head.blocks(options), Anchors(of_query, of_key, of_value))
            return tuple(sums)

        dq, *of_these_keys = map_heads(one, held, anchors.query, query, out, rows, grad)
        return dq, tuple(of_these_keys)

    # Anchors that all devices of an axis share vary less than the keys, and a loop has one type.
    held = match_varying_axes((key, value, anchors.key, anchors.value))
    nothing = full(BK, 2, G, H, T), jnp.add, (full(BK, 2, S, H), full(BK, 2, S, V))
    dq, of_keys = turns.turn(add, held, spec, *nothing)

    def rounded(index: Array, *of_head: Any) -> tuple[Array, Array, Array]:
        return rounded_gradients(options, own_heads(spec, index), *of_head)

    return map_heads(rounded, rows, anchors, (dq, *of_keys))


def _exponents(
    spec: Spec, query: Array, key: Array, value: Array, out: Array, rows: Rows, grad: Array
) -> Exponents:
    """Exponents of every KV head, stacked along axis 0."""

    def one(_: Array, q: Array, k: Array, v: Array, o: Array, r: Array, g: Array) -> Exponents:
        of_keys = exponents_of_keys(flush(k), flush(v))
        return Exponents.of(scaled_query(spec, q), of_keys, flush(o), r, flush(g))

    return map_heads(one, query, key, value, out, rows.normaliser, grad)
