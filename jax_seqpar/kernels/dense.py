"""Attention in its plainest form: all the weights at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..masks import Block, Masks, SegmentIds, Window


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
    segment_ids: SegmentIds | None = None,
    logits_soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(query . key * scale + bias) . value`, on one device.

    Query head n reads KV head `n // (N / K)`. Logits and sums are float32 for 16-bit inputs, the
    weights are rounded to the values' dtype; all is float64 for float64 inputs. Holds the
    `[B, N, T, S]` weights in memory. A query that may attend to no key gives 0, where
    `jax.nn.dot_product_attention` gives the mean of the values.

    Args:
      query, key, value: of one floating dtype; K divides N.
      bias: added to the logits, broadcastable to `[B, N, T, S]`.
      mask: True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, segment_ids: as in
        `jax_seqpar.masks.Masks`.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.

    Returns:
      The attention output, of the query's dtype.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    accumulated = jnp.float64 if query.dtype == jnp.float64 else jnp.float32

    grouped = query.reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=accumulated)
    logits = logits.reshape(B, N, T, S) * (H**-0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.astype(accumulated)
    masks = Masks(
        mask=mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
    )
    allowed = masks.attends(Block(0, T), Block(0, S))
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)

    # A row without a key has the maximum -inf; 0 in its place keeps inf - inf out of the row.
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)

    weights = weights.reshape(B, K, N // K, T, S).astype(value.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value, preferred_element_type=accumulated)
    return out.reshape(B, T, N, H).astype(query.dtype)
