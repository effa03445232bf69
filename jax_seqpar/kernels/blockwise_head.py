"""Blocks of one query head, for both passes of blockwise attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..mask import Spec, Terms, Tokens, accumulated
from ..mask.token_numbers import for_blocks


@dataclass(frozen=True)
class Plan:
    """Block sizes and precision of both passes, which are static.

    Attributes:
      queries, keys: tokens of a block.
      precision: of matrix products where the attention is called. JAX traces the rules of
        derivatives later, where another precision may be in force.
      parts: whether the results are parts of a sum: in float32, of weights not rounded to 16 bits.
    """

    queries: int
    keys: int
    precision: str | None
    parts: bool = False

    def result_dtype(self, x: Array) -> Any:
        """Dtype of the output that belongs to the operand x, or of the gradient of x."""
        return accumulated(x.dtype) if self.parts else x.dtype


class Head(NamedTuple):
    """One query head of one sequence: `[T, H]`, `[S, H]`, `[S, V]`, and its part of the rest."""

    q: Array
    k: Array
    v: Array
    spec: Spec
    dtype: Any  # of logits and sums

    @classmethod
    def of(cls, b: Any, n: Any, query: Array, key: Array, value: Array, spec: Spec) -> "Head":
        kv = n // (query.shape[2] // key.shape[2])
        own, dtype = spec.take_heads(b, n, 1), accumulated(query.dtype)
        q, k, v = (read_head(x, b, i) for x, i in ((query, n), (key, kv), (value, kv)))
        return cls(q, k, v, own, dtype)

    @property
    def sink(self) -> Array | None:
        sinks = self.spec.logits.sinks
        return None if sinks is None else sinks.astype(self.dtype)[0]

    def dot(self, equation: str, x: Array, y: Array) -> Array:
        return jnp.einsum(equation, x.astype(self.q.dtype), y, preferred_element_type=self.dtype)

    def dot_of_two(self, equation: str, x: tuple[Array, Array | None], y: Array) -> Array:
        """The product with the sum of the two that `split` returns."""
        rounded, rest = x
        product = self.dot(equation, rounded, y)
        return product if rest is None else product + self.dot(equation, rest, y)

    def logits_and_pull(self, queries: Tokens, keys: Tokens) -> tuple[Array, Callable[..., Any]]:
        """`[t, s]`, and its derivative by the dot products, by bias and by slopes."""
        dots = self.dot("th,sh->ts", queries.slice(self.q, 0), keys.slice(self.k, 0))
        terms = self.spec.terms(queries, keys)

        def of(dots: Array, bias: Any, slopes: Any) -> Array:
            own = Terms(bias, slopes, terms.distance, terms.allowed)
            return self.spec.to_logits(dots[None, None], own, self.q.shape[1])[0, 0]

        # In float32, so that sums of their gradients are, too.
        added = (x if x is None else x.astype(self.dtype) for x in terms[:2])
        return jax.vjp(of, dots, *added)

    def kept(self, weights: Array, queries: Tokens, keys: Tokens) -> Array:
        keep = self.spec.keep(queries, keys)
        return self.spec.dropout.apply(weights, None if keep is None else keep[0, 0])

    def for_keys(self, queries: Tokens, size: int, body: Callable[..., Any], carry: Any) -> Any:
        S = self.k.shape[0]
        return for_blocks(S, size, self.spec.keys_of(queries, S), body, carry)


def split(x: Array, dtype: Any) -> tuple[Array, Array | None]:
    """x rounded to dtype, and what the rounding took away, of that dtype, too; None of nothing.

    The gradients of a row's logits add up to 0, which takes a common offset of the keys out of dq.
    Rounded to 16 bits they do not: with keys of mean 8 dq was 4 times less accurate.
    """
    if x.dtype == dtype:
        return x, None
    bits = jnp.finfo(dtype)
    # `reduce_precision`, as XLA elides a conversion and back (xla_allow_excess_precision): the
    # rounding would be lost, and the rest 0.
    rounded = jax.lax.reduce_precision(x, bits.nexp, bits.nmant)
    return rounded.astype(dtype), (x - rounded).astype(dtype)


def _at(*indices: Any) -> tuple[Array, ...]:
    """Start indices of a slice, in one dtype.

    With 64 bits on, loops count in int64 while bounds that segments, positions or lengths set are
    int32, and JAX raises TypeError for a slice at both.
    """
    return tuple(jnp.asarray(i, jnp.int32) for i in indices)


def read_head(x: Array, b: Any, n: Any) -> Array:
    """Head n of sequence b, `[tokens, channels]`, of `[B, tokens, heads, channels]`."""
    part = jax.lax.dynamic_slice(x, _at(b, 0, n, 0), (1, x.shape[1], 1, x.shape[3]))
    return part.reshape(x.shape[1], x.shape[3])


def read_rows(x: Array, b: Any, tokens: Tokens, n: Any) -> Array:
    """A block of tokens of that head, `[t, channels]`."""
    size = (1, tokens.size, 1, x.shape[3])
    return jax.lax.dynamic_slice(x, _at(b, tokens.start, n, 0), size)[0, :, 0]


def write_rows(x: Array, part: Array, b: Any, tokens: Tokens, n: Any) -> Array:
    """x with a block of tokens of a head replaced by `part [t, channels]`, cast to its dtype."""
    part = part.astype(x.dtype)[None, :, None]
    return jax.lax.dynamic_update_slice(x, part, _at(b, tokens.start, n, 0))


def add_slice(x: Array, part: Array, start: tuple[Any, ...]) -> Array:
    """x with `part` added to the slice of its shape that begins at `start`."""
    old = jax.lax.dynamic_slice(x, _at(*start), part.shape)
    return jax.lax.dynamic_update_slice(x, old + part, _at(*start))
