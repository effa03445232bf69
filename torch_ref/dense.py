"""The oracle: attention in float64, all the weights at once, gradients by autograd."""

import math

import torch
from torch import Tensor

from .masks import attends


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    logits_soft_cap: float | None = None,
) -> Tensor:
    """`softmax(query . key * scale + bias) . value` in float64; 0 for a query without a key.

    Args:
      query: `[B, T, N, H]`, any floating dtype.
      key, value: `[B, S, K, H]`; K divides N and query head n reads KV head `n // (N / K)`.
      bias: added to the logits, broadcastable to `[B, N, T, S]`.
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      scale: of the logits; `1 / sqrt(H)` if None.
      is_causal: query t attends to keys `s <= t`, both counted from 0 (top left, as in `jax.nn`).
      local_window_size: `(left, right)` or one integer for both: keys `t - left <= s <= t + right`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      logits_soft_cap: logits become `cap * tanh(logits / cap)` before the bias is added.

    Returns:
      `[B, T, N, H]`, float64, differentiable.
    """
    groups = query.shape[2] // key.shape[2]
    q = query.double()
    k, v = (x.double().repeat_interleave(groups, dim=2) for x in (key, value))

    logits = torch.einsum("btnh,bsnh->bnts", q, k)
    logits = logits * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias.double()

    allowed = attends(
        query.shape[1],
        key.shape[1],
        mask=mask,
        is_causal=is_causal,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        device=query.device,
    )
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    no_key = (logits == -math.inf).all(-1, keepdim=True)
    # The softmax of a row of -inf is NaN, forward and backward: such a row is replaced before it.
    weights = torch.softmax(logits.masked_fill(no_key, 0.0), dim=-1).masked_fill(no_key, 0.0)
    return torch.einsum("bnts,bsnh->btnh", weights, v)
