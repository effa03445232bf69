"""The anchors of the gradients: for each row an exponent above its sum, known before any sum is.

They are maxima of exponents: over the keys that a query may attend to, over the queries that may
attend to a key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..mask import Tokens
from ..mask.token_numbers import write
from .arithmetic import LEAST_EXPONENT, NOT_A_NUMBER, exponent, norm
from .block_logits import Problem
from .token_blocks import Blocks, in_both, write_head


class Anchors(NamedTuple):
    """A of dq, `[G, T]`, and of dk and dv, `[S]`; int32."""

    query: Array
    key: Array
    value: Array


def find_anchors(
    blocks: Blocks,
    problem: Callable[[Any], Problem],
    query: Array,
    key: Array,
    value: Array,
    out: Array,
    normaliser: Array,
    grad: Array,
    dropout_bits: int,
) -> Anchors:
    """The anchors of one KV head, from arrays that are flushed.

    Args:
      problem: of a query head, by its number.
      query, key, value: `[G, T, H]` scaled, `[S, H]`, `[S, V]`.
      out, grad: `[G, T, V]`.
      normaliser: r, `[G, T]`.
      dropout_bits: what dropout adds to each.
    """
    of_key, of_value = _exponents(exponent(key, -1)), _exponents(norm(value))
    of_out, of_grad, of_query = (
        _exponents(x) for x in (norm(out), norm(grad), exponent(query, -1))
    )
    largest_grad = jnp.where(jnp.isnan(normaliser), NOT_A_NUMBER, _exponents(exponent(grad, -1)))
    # Terms that are maximised over keys, for each row, and over rows, for each key. A maximum over
    # nothing is the least that they can be, whose powers of two are normal.
    over_keys = jnp.stack([of_value + of_key, of_key])
    over_rows = jnp.stack([of_grad + of_query, of_out + of_grad + of_query, largest_grad])
    least_of_rows = jnp.asarray([2, 1], jnp.int32) * LEAST_EXPONENT
    least_of_keys = jnp.asarray([2, 3, 1], jnp.int32) * LEAST_EXPONENT
    largest = _largest(blocks, problem, over_keys, over_rows, least_of_rows, least_of_keys)
    (value_key, just_key), (grad_query, out_grad_query, just_grad) = largest
    # A value that no row attends to may be NaN.
    of_value = jnp.where(grad_query > 2 * LEAST_EXPONENT, of_value, LEAST_EXPONENT)
    return Anchors(
        1 + dropout_bits + of_grad + jnp.maximum(value_key, of_out + just_key),
        1 + dropout_bits + jnp.maximum(of_value + grad_query, out_grad_query),
        dropout_bits + just_grad,
    )


def _largest(
    blocks: Blocks,
    problem: Callable[[Any], Problem],
    over_keys: Array,
    over_rows: Array,
    least_of_rows: Array,
    least_of_keys: Array,
) -> tuple[Array, Array]:
    """The largest that each row and each key attends to: `[2, G, T]` and `[3, S]`.

    Args:
      over_keys, over_rows: `[2, S]` and `[3, G, T]`.
      least_of_rows, least_of_keys: where there is none, `[2]` and `[3]`.
    """
    _, G, T = over_rows.shape
    S = over_keys.shape[1]
    some = problem(0)
    rows = some.full(2, G, T, dtype=jnp.int32) + least_of_rows[:, None, None]
    keys_ = some.full(3, S, dtype=jnp.int32) + least_of_keys[:, None]
    if some.may_attend(Tokens(0, min(T, 1)), Tokens(0, min(S, 1))) is None:
        return (
            jnp.maximum(rows, over_keys.max(1)[:, None, None]),
            jnp.maximum(keys_, over_rows.max((1, 2))[:, None]),
        )

    def block_of_keys(keys: Tokens, of_keys: Array | None, carry: tuple[Array, Array]):
        rows, keys_ = carry

        def block(g: Any, index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            rows, largest = carry
            queries, belongs = blocks.of_queries(index)
            allowed = problem(g).may_attend(queries, keys)
            assert allowed is not None
            belongs = in_both(of_keys, belongs)
            allowed = allowed if belongs is None else allowed & belongs
            own = keys.slice(over_keys, 1)[:, :, None]
            part = jnp.where(allowed, own, least_of_rows[:, None, None]).max(1)  # [2, t]
            part = jnp.maximum(queries.slice(rows[:, g], 1), part)
            rows = write_head(rows, part, g, queries)
            own = queries.slice(over_rows[:, g], 1)[:, None]
            part = jnp.where(allowed, own, least_of_keys[:, None, None]).max(2)  # [3, s]
            return rows, jnp.maximum(largest, part)

        rows, part = blocks.for_queries(keys, block, (rows, keys.slice(keys_, 1)))
        return rows, write(keys_, part, keys, 1)

    return blocks.for_keys(block_of_keys, (rows, keys_))


def _exponents(x: Array) -> Array:
    """`[..., 1]` without that axis."""
    return x[..., 0]
