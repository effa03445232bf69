"""The anchors of the gradients: for each row an exponent above its sum, known before any sum is.

Anchors are maxima of exponents: over the keys that a query may attend to, over the queries that may
attend to a key.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ..mask import Tokens
from ..mask.token_numbers import write
from ..varying_axes import full_varying
from .arithmetic import LEAST_EXPONENT, NOT_A_NUMBER, exponent, norm
from .block_logits import may_attend
from .token_blocks import Blocks, in_both, write_head

# The maxima over nothing: the least that their terms can be, whose powers of two are normal.
LEAST_OF_ROWS = (2 * LEAST_EXPONENT, LEAST_EXPONENT)
LEAST_OF_KEYS = (2 * LEAST_EXPONENT, 3 * LEAST_EXPONENT, LEAST_EXPONENT)


class Anchors(NamedTuple):
    """A of dq, `[G, T]`, and of dk and dv, `[S]`; int32."""

    query: Array
    key: Array
    value: Array


class Exponents(NamedTuple):
    """Exponents whose maxima are the anchors of one KV head; int32.

    Attributes:
      of_keys: N(v) and E(k), `[2, S]`.
      of_out, of_grad: N, `[G, T]`.
      of_query: E, `[G, T]`.
      largest_grad: E of the gradient, not a number where r is NaN, `[G, T]`.
    """

    of_keys: Array
    of_out: Array
    of_grad: Array
    of_query: Array
    largest_grad: Array

    @classmethod
    def of(
        cls, query: Array, of_keys: Array, out: Array, normaliser: Array, grad: Array
    ) -> "Exponents":
        """Exponents of arrays whose subnormals are flushed.

        Args:
          query: `[G, T, H]`, scaled.
          of_keys: the result of `exponents_of_keys`.
          out, grad: `[G, T, V]`.
          normaliser: r, `[G, T]`.
        """
        largest_grad = jnp.where(jnp.isnan(normaliser), NOT_A_NUMBER, _exponent(grad))
        sizes = (_norm(out), _norm(grad), _exponent(query))
        return cls(of_keys, *sizes, largest_grad)

    def maxima(self, blocks: Blocks) -> tuple[Array, Array]:
        """Maxima over the keys of each row, `[2, G, T]`, and over the rows of a key, `[3, S]`."""
        # Terms that are maximised over keys, for each row, and over rows, for each key.
        of_value, of_key = self.of_keys
        of_grad_query = self.of_grad + self.of_query
        over_keys = jnp.stack([of_value + of_key, of_key])
        over_rows = jnp.stack([of_grad_query, self.of_out + of_grad_query, self.largest_grad])
        return _largest(blocks, over_keys, over_rows)

    def anchors(self, of_rows: Array, of_keys: Array, dropout_bits: int) -> Anchors:
        """A of all sums.

        Args:
          of_rows, of_keys: `maxima` over all the keys and all the rows.
          dropout_bits: added to each anchor for dropout.
        """
        value_key, just_key = of_rows
        grad_query, out_grad_query, just_grad = of_keys
        # A value that no row attends to may be NaN.
        is_seen = grad_query > LEAST_OF_KEYS[0]
        of_value = jnp.where(is_seen, self.of_keys[0], LEAST_EXPONENT)
        return Anchors(
            1 + dropout_bits + self.of_grad + jnp.maximum(value_key, self.of_out + just_key),
            1 + dropout_bits + jnp.maximum(of_value + grad_query, out_grad_query),
            dropout_bits + just_grad,
        )


def exponents_of_keys(key: Array, value: Array) -> Array:
    """N(v) and E(k), `[2, S]`, of keys and values that are flushed."""
    return jnp.stack([_norm(value), _exponent(key)])


def nothing_of_rows(full: Callable[..., Array], *shape: int) -> Array:
    """`[2, *shape]`: the maxima of rows that attend to nothing."""
    return jnp.stack([full(*shape, value=least, dtype=jnp.int32) for least in LEAST_OF_ROWS])


def nothing_of_keys(full: Callable[..., Array], *shape: int) -> Array:
    """`[3, *shape]`: the maxima of keys that nothing attends to."""
    return jnp.stack([full(*shape, value=least, dtype=jnp.int32) for least in LEAST_OF_KEYS])


def _largest(blocks: Blocks, over_keys: Array, over_rows: Array) -> tuple[Array, Array]:
    """Maxima over the keys of each row, `[2, G, T]`, and over the rows of a key, `[3, S]`.

    Args:
      over_keys, over_rows: `[2, S]` and `[3, G, T]`.
    """
    _, G, T = over_rows.shape
    S = over_keys.shape[1]

    def full(*shape: int, value: int, dtype: Any) -> Array:
        return full_varying(shape, value, dtype, (over_keys, over_rows, blocks.spec))

    def may_attend_to(g: Any, queries: Tokens, keys: Tokens) -> Array | None:
        return may_attend(blocks.spec.take_heads(0, g, 1), queries, keys)

    rows, keys_ = nothing_of_rows(full, G, T), nothing_of_keys(full, S)
    if may_attend_to(0, Tokens(0, min(T, 1)), Tokens(0, min(S, 1))) is None:
        return (
            jnp.maximum(rows, over_keys.max(1)[:, None, None]),
            jnp.maximum(keys_, over_rows.max((1, 2))[:, None]),
        )
    least_of_rows, least_of_keys = (
        jnp.asarray(least, jnp.int32)[:, None, None] for least in (LEAST_OF_ROWS, LEAST_OF_KEYS)
    )

    def block_of_keys(keys: Tokens, of_keys: Array | None, carry: tuple[Array, Array]):
        rows, keys_ = carry

        def block(g: Any, index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            rows, largest = carry
            queries, belongs = blocks.of_queries(index)
            allowed = may_attend_to(g, queries, keys)
            assert allowed is not None
            belongs = in_both(of_keys, belongs)
            allowed = allowed if belongs is None else allowed & belongs
            own = keys.slice(over_keys, 1)[:, :, None]
            part = jnp.where(allowed, own, least_of_rows).max(1)  # [2, t]
            part = jnp.maximum(queries.slice(rows[:, g], 1), part)
            rows = write_head(rows, part, g, queries)
            own = queries.slice(over_rows[:, g], 1)[:, None]
            part = jnp.where(allowed, own, least_of_keys).max(2)  # [3, s]
            return rows, jnp.maximum(largest, part)

        rows, part = blocks.for_queries(keys, block, (rows, keys.slice(keys_, 1)))
        return rows, write(keys_, part, keys, 1)

    return blocks.for_keys(block_of_keys, (rows, keys_))


def _exponent(x: Array) -> Array:
    """E along the channels, without that axis."""
    return exponent(x, -1)[..., 0]


def _norm(x: Array) -> Array:
    """N of the channels, without their axis."""
    return norm(x)[..., 0]
