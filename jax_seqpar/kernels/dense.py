"""Attention in its plainest form: all the weights at once."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..mask import Spec, Tokens, accumulated
from .kernel import Kernel
from .softmax_residual import Residual, finite


@dataclass(frozen=True)
class Dense(Kernel):
    """`softmax(query . key * scale + bias) . value`, all the weights at once.

    Query head n reads KV head `n // (N / K)`. Logits and sums are float32 for 16-bit inputs, the
    weights are rounded to the values' dtype; all is float64 for float64 inputs. Holds the
    `[B, N, T, S]` weights in memory. A query without an allowed key gives 0, where
    `jax.nn.dot_product_attention` gives the mean of the values. Derivatives of any order, in
    forward and reverse mode.
    """

    gives_residual = True

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K V"],
        spec: Spec,
    ) -> tuple[Array, Residual]:
        return _attend(query, key, value, spec)


dense_attention = Dense()


# One program in an eager call, too, so that the -inf of masked logits, which exp makes 0, is no
# result of an operation that `jax.debug_infs` would object to.
@jax.jit
def _attend(query: Array, key: Array, value: Array, spec: Spec) -> tuple[Array, Residual]:
    return dense_rows(query, key, value, spec, Tokens(0, query.shape[1]))


def dense_rows(
    query: Array, key: Array, value: Array, spec: Spec, queries: Tokens
) -> tuple[Array, Residual]:
    """The output `[B, t, N, V]` and the residual `[B, t, N]` of a block of queries.

    Args:
      query: `[B, t, N, H]`, the queries of the block.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    keys = Tokens(0, S)
    dtype = accumulated(query.dtype)

    grouped = query.reshape(B, T, K, N // K, H)
    dots = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=dtype)
    z = spec.to_logits(dots.reshape(B, N, T, S), spec.terms(queries, keys), H)
    weights, residual = softmax(z, spec.logits.sinks)
    weights = spec.dropout.apply(weights, spec.keep(queries, keys))

    weights = weights.reshape(B, K, N // K, T, S).astype(value.dtype)
    out = jnp.einsum("BKGTS,BSKV->BTKGV", weights, value, preferred_element_type=dtype)
    out = out.reshape(B, T, N, value.shape[3]).astype(query.dtype)
    return out, Residual(*(x[..., 0].swapaxes(1, 2) for x in residual))


def softmax(logits: Array, sinks: Array | None) -> tuple[Array, Residual]:
    """The weights, 0 in a row of -inf, and what they were divided by, `[B, N, t, 1]`.

    Args:
      logits: `[B, N, t, s]`.
      sinks: `[N]`.
    """
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(logits.dtype)[None, :, None, None]
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(finite(top))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    residual = Residual(top, total)
    return weights / residual.divisor, residual
