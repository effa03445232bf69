"""Which query attends to which key."""

from typing import Any

import torch
from torch import Tensor


def attends(
    query_tokens: int,
    key_tokens: int,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """True where a query may attend to a key, for all that is given; None where every one may.

    Args:
      query_tokens, key_tokens: T and S, both counted from 0 (top left, as in `jax.nn`).
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      is_causal: query t attends to keys `s <= t`.
      local_window_size: `(left, right)` or one integer for both: keys `t - left <= s <= t + right`.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      device: of the tensors that are made here.

    Returns:
      Boolean, broadcastable to `[B, N, T, S]`.
    """
    allowed = [] if mask is None else [mask]
    t = torch.arange(query_tokens, device=device)[:, None]
    s = torch.arange(key_tokens, device=device)[None, :]
    if is_causal:
        allowed.append(s <= t)
    if local_window_size is not None:
        left, right = _pair(local_window_size)
        allowed.append((s >= t - left) & (s <= t + right))
    if segment_ids is not None:
        of_query, of_key = _pair(segment_ids)
        allowed.append(of_query[:, None, :, None] == of_key[:, None, None, :])
    if not allowed:
        return None
    result = allowed[0]
    for other in allowed[1:]:
        result = result & other
    return result


def _pair(x: Any) -> tuple[Any, Any]:
    return x if isinstance(x, tuple) else (x, x)
