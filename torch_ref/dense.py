"""The oracle: attention in float64, all the weights at once, gradients by autograd."""

import math

import torch
from torch import Tensor

from .dropout import gain, given_keys, keep
from .masks import Positions, Window, attends, distance, places


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    query_offset: int = 0,
    positions: Positions | None = None,
    query_seq_lengths: Tensor | None = None,
    key_value_seq_lengths: Tensor | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Tensor | None = None,
) -> Tensor:
    """`softmax(query . key * scale + bias) . value` in float64; 0 for a query without a key.

    Args:
      query: `[B, T, N, H]`, any floating dtype.
      key: `[B, S, K, H]`; K divides N and query head n reads KV head `n // (N / K)`.
      value: `[B, S, K, V]`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`.
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: a query attends to the keys at positions up to its own.
      local_window_size: `(left, right)` or one integer for both: a query at position p attends to
        the keys at positions `p - left` to `p + right`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      query_offset: the position of the first query. Keys count from 0, and so do queries by default
        (top left, as in `jax.nn`); S - T aligns the last query with the last key.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of those counts.
      query_seq_lengths: `[B]`; only the first so many queries attend, in the order of the array.
      key_value_seq_lengths: `[B]`; only the first so many keys are attended to.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.
      alibi_slopes: `[N]`; the slope times the distance of their positions, at most 2^29, is taken
        from the logits, after the bias (ALiBi, Press et al. 2021).
      sinks: `[N]`, one more logit for every query of a head, which has no value (as in GPT-OSS);
        -inf has no effect.
      dropout_rate: the share of the weights that is dropped, after the softmax.
      dropout_rng: `(2,)`, the words of a threefry key, or keys of heads; see `dropout.head_keys`.

    Returns:
      `[B, T, N, V]`, float64, differentiable, also in bias, slopes and sinks.

    Raises:
      ValueError: as `masks.attends` and `dropout.given_keys`, or for two batches.
    """
    (B, T, N, H), S = query.shape, key.shape[1]
    groups = N // key.shape[2]
    if not B == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"query, key and value must have one batch, got {B}, {key.shape[0]} and "
            f"{value.shape[0]}. Write key.expand({B}, -1, -1, -1) for one of all."
        )
    q = query.double()
    k, v = (x.double().repeat_interleave(groups, dim=2) for x in (key, value))

    logits = torch.einsum("btnh,bsnh->bnts", q, k)
    logits = logits * (1 / math.sqrt(H) if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.double()
    if alibi_slopes is not None:
        apart = distance(*places(T, S, query_offset, positions, query.device))
        logits = logits - alibi_slopes.double()[:, None, None] * apart

    allowed = attends(
        T,
        S,
        mask=mask,
        is_causal=is_causal,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        query_offset=query_offset,
        positions=positions,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        device=query.device,
    )
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if logits.shape != (B, N, T, S):
        raise ValueError(
            f"bias, mask, lengths, positions or segments are of another batch or other heads than "
            f"the query {tuple(query.shape)}: logits {tuple(logits.shape)}. Give those of B = {B} "
            f"and N = {N}."
        )
    no_key = (logits == -math.inf).all(-1, keepdim=True)
    # The softmax of a row of -inf is NaN, forward and backward: such a row is replaced before it.
    logits = logits.masked_fill(no_key, 0.0)
    if sinks is not None:
        logits = torch.cat((logits, sinks.double()[:, None, None].expand(B, N, T, 1)), dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., :S].masked_fill(no_key, 0.0)
    rng = given_keys(dropout_rate, dropout_rng, B, N, query.device)
    if rng is not None:
        # weights * keep first: (keep * gain), a boolean times a number, would be float32.
        weights = weights * keep(rng, dropout_rate, B, N, T, S) * gain(dropout_rate)
    return torch.einsum("bnts,bsnh->btnh", weights, v)
