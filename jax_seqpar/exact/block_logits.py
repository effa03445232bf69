"""The logits of one query head, block by block, keys down and queries across: `[s, t]`.

So the sums over keys of the forward pass and those over queries of the backward pass are products
of matrices in the order in which they lie, and a maximum over keys is one of whole vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..kernels.kernel import Turns
from ..mask import Spec, Tokens
from ..mask.attention_spec import Terms
from ..varying_axes import full_varying
from .arithmetic import flush, left_digits, pinned, right_on_grid, round32
from .elementary import soft_cap, soft_cap_slope
from .kv_replicas import SharedHeads


@dataclass(frozen=True)
class Options:
    """Static options: who shares the KV head, tiling, and the blocks of the gradients.

    Attributes:
      shared_heads: the devices that have the same KV head; None if this one alone has it.
      turns: how the keys of other devices are reached; None where the arrays have them all.
      query_chunk, key_chunk: of the forward pass; no bit depends on them.
      block: of the backward pass. The bits of the gradients depend on it.
    """

    shared_heads: SharedHeads | None
    turns: Turns | None
    query_chunk: int
    key_chunk: int
    block: int


@dataclass(frozen=True)
class Problem:
    """One sequence and one query head; float64, flushed.

    Attributes:
      spec: of one sequence and one head; its scale and soft cap are values of float32.
      scaled_query: `[T, H]`.
      query_digits: `[H, 2, T]`, the same as a left operand.
      key_on_grid: `[S, H]`, a right operand; NaN where key or value has a NaN.
    """

    spec: Spec
    scaled_query: Array
    query_digits: Array
    key_on_grid: Array

    @classmethod
    def of(cls, spec: Spec, query: Array, key_on_grid: Array) -> "Problem":
        scaled = scaled_query(spec, query)
        return cls(spec, scaled, columns(left_digits(scaled)), key_on_grid)

    def logits(self, queries: Tokens, keys: Tokens) -> tuple[Array, Array | None]:
        """`[s, t]` in float32, -inf where a query may not attend, and the slope of a soft cap."""
        z = dots(keys.slice(self.key_on_grid, 0), queries.slice(self.query_digits, 2))
        cap, slope = self.spec.logits.soft_cap, None
        if cap is not None:
            z, slope = soft_cap(z, cap), soft_cap_slope(z, cap)
        terms = self.spec.terms(queries, keys)
        if terms.bias is not None:
            z = pinned(pinned(z) + flush(_keys_down(terms.bias)))
        if terms.alibi_slopes is not None and terms.distance is not None:
            # Exact: a float32 times less than 2^30.
            distance = _keys_down(terms.distance).astype(jnp.float64)
            z = pinned(pinned(z) - flush(terms.alibi_slopes)[0, 0] * distance)
        z = round32(z)
        allowed = _may_attend(terms)
        return z if allowed is None else jnp.where(allowed, z, -jnp.inf), slope

    def kept(self, x: Array, queries: Tokens, keys: Tokens) -> Array:
        """`[s, t]` with 0 where dropout drops the weight."""
        keep = self.spec.keep(queries, keys)
        return x if keep is None else jnp.where(_keys_down(keep), x, 0)

    @property
    def kept_scale(self) -> float:
        """`c`: factor of the weights that dropout keeps."""
        return self.spec.dropout.inverse_keep_probability

    def full(self, *shape: int, value: float | int = 0, dtype: Any = jnp.float64) -> Array:
        """`jnp.full` with the varying mesh axes of the operands: an initial loop carry."""
        return full_varying(shape, value, dtype, (self.scaled_query, self.key_on_grid, self.spec))


def scaled_query(spec: Spec, query: Array) -> Array:
    """query * scale in float64, which holds the 48 bits of the product exactly."""
    return flush(query) * scale_of(spec)


def scale_of(spec: Spec) -> float:
    """Scale of the logits, rounded to float32."""
    scale = spec.logits.scale
    assert scale is not None
    return scale


def key_operand(key: Array, value: Array) -> Array:
    """`[S, H]`: keys as right operands, NaN where the value has a NaN or infinity."""
    return right_on_grid(flush(marked(key, value)))


def marked(key: Array, value: Array) -> Array:
    """The keys with NaN in place of those whose value has a NaN or infinity."""
    is_number = jnp.isfinite(value).all(-1, keepdims=True)
    return jnp.where(is_number, key, jnp.asarray(jnp.nan, key.dtype))


def columns(digits: Array) -> Array:
    """`[2, ..., T, H]` as `[..., H, 2, T]`: a token is a column."""
    return jnp.moveaxis(digits, (-1, 0), (-3, -2))


def dots(keys: Array, queries: Array) -> Array:
    """`[s, H] x [H, 2, t] -> [s, t]`: a right and a left operand.

    Both digits in one product of matrices as they lie. An einsum would compute the transpose, and
    all that reads it would go through memory in strides.
    """
    (s, H), t = keys.shape, queries.shape[2]
    both = (keys @ queries.reshape(H, 2 * t)).reshape(s, 2, t)
    return both[:, 0] + both[:, 1]


def may_attend(spec: Spec, queries: Tokens, keys: Tokens) -> Array | None:
    """`[s, t]`, of one query head; None where every query of every block attends to every key."""
    return _may_attend(spec.terms(queries, keys))


def _may_attend(terms: Terms) -> Array | None:
    """Mask `[s, t]` of one block; a bias of -inf forbids a pair as a mask does."""
    allowed = None if terms.allowed is None else _keys_down(terms.allowed)
    if terms.bias is None:
        return allowed
    has_bias = _keys_down(terms.bias) != -jnp.inf
    return has_bias if allowed is None else allowed & has_bias


def _keys_down(x: Array) -> Array:
    """`[1, 1, t, s]` as `[s, t]`."""
    return x[0, 0].T


def for_range(low: Any, high: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`fori_loop`, unrolled if its one step is known at trace time, which compiles faster."""
    if isinstance(low, int) and isinstance(high, int) and high - low == 1:
        return step(low, carry)
    # int32 whether 64 bits are on or not, as the numbers of tokens are.
    low, high = (jnp.asarray(x, jnp.int32) for x in (low, high))
    return jax.lax.fori_loop(low, high, step, carry)
