"""Masks of attention: the pairs of a query and a key that attend, and their distances."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Up to here the product with a float32 slope is exact in float64.
FARTHEST = 2**29

Positions = Tensor | tuple[Tensor, Tensor]
Window = int | Sequence[int | None]
Numbers = tuple[Tensor, Tensor]


def attends(
    query_tokens: int,
    key_tokens: int,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    local_window_size: Window | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    query_offset: int = 0,
    positions: Positions | None = None,
    query_seq_lengths: Tensor | None = None,
    key_value_seq_lengths: Tensor | None = None,
    device: torch.device | None = None,
    numbers: Numbers | None = None,
) -> Tensor | None:
    """True where a query may attend to a key, for all that is given; None where every one may.

    Args:
      query_tokens, key_tokens: T and S.
      mask: boolean, True attends, broadcastable to `[B, N, T, S]`.
      is_causal: a query attends to the keys at positions up to its own.
      local_window_size: `(left, right)` or one integer for both: a query at position p attends to
        the keys at positions `p - left` to `p + right`; None or -1 leaves a side open.
      segment_ids: `[B, S]`, or a pair `[B, T]`, `[B, S]`; a query attends to its own segment.
      query_offset, positions: see `places`.
      query_seq_lengths: `[B]`; only the first so many queries attend, in the order of the array.
      key_value_seq_lengths: `[B]`; only the first so many keys are attended to.
      device: of the tensors that are made here.
      numbers: see `places`; the mask is then of these queries and keys alone.

    Returns:
      Boolean, broadcastable to `[B, N, T, S]`.

    Raises:
      ValueError: as `places`, or lengths that are not `[B]`, or a mask that is not boolean.
    """
    if mask is not None and mask.dtype != torch.bool:
        # `&` of integers takes bits: 2 & True is 0.
        raise ValueError(
            f"mask must be boolean, got {mask.dtype}. Write mask.bool() if 1 attends and 0 hides, "
            f"mask == 0 if 0 attends and large negative numbers hide."
        )
    allowed = [] if mask is None else [mask]
    p_query, p_key = places(query_tokens, key_tokens, query_offset, positions, device, numbers)
    if is_causal:
        allowed.append(p_key <= p_query)
    if local_window_size is not None:
        left, right = (None if n is None or n == -1 else n for n in _window(local_window_size))
        if left is not None:
            allowed.append(p_key >= p_query - left)
        if right is not None:
            allowed.append(p_key <= p_query + right)
    if segment_ids is not None:
        of_query, of_key = _across(*_pair(segment_ids), numbers)
        allowed.append(of_query == of_key)
    t, s = places(query_tokens, key_tokens, device=device, numbers=numbers)
    if query_seq_lengths is not None:
        allowed.append(t < _by_sequence("query_seq_lengths", query_seq_lengths))
    if key_value_seq_lengths is not None:
        allowed.append(s < _by_sequence("key_value_seq_lengths", key_value_seq_lengths))
    if not allowed:
        return None
    result = allowed[0]
    for other in allowed[1:]:
        result = result & other
    return result


def places(
    query_tokens: int,
    key_tokens: int,
    query_offset: int = 0,
    positions: Positions | None = None,
    device: torch.device | None = None,
    numbers: Numbers | None = None,
) -> tuple[Tensor, Tensor]:
    """The positions of the queries and of the keys, to be compared with one another.

    Args:
      query_tokens, key_tokens: T and S.
      query_offset: the position of the first query. Keys count from 0, and so do queries by default
        (top left, as in `jax.nn`); S - T aligns the last query with the last key.
      positions: integers `[B, S]`, or a pair `[B, T]`, `[B, S]`, in place of those counts.
      device: of the tensors that are made here.
      numbers: int64, which queries `[t]` and which keys `[s]` of the T and S are asked for, counted
        from 0; all of them if None.

    Returns:
      int64, `[B, 1, T, 1]` and `[B, 1, 1, S]`, B = 1 where all sequences have the same.

    Raises:
      ValueError: positions and an offset, or positions of another shape or dtype than integers.
    """
    if positions is None:
        t = torch.arange(query_offset, query_offset + query_tokens, device=device)
        s = torch.arange(key_tokens, device=device)
        return _across(t[None], s[None], numbers)
    if query_offset != 0:
        raise ValueError(
            f"positions say where the queries are, and so does query_offset = {query_offset}. "
            "Write one of the two."
        )
    of_query, of_key = _pair(positions)
    for name, x, tokens in (("queries", of_query, query_tokens), ("keys", of_key, key_tokens)):
        if x.ndim != 2 or x.shape[1] != tokens or x.is_floating_point():
            raise ValueError(
                f"positions of {tokens} {name} must be integers [B, {tokens}], got {x.dtype} "
                f"{tuple(x.shape)}. Write a pair where queries and keys have different ones."
            )
    return _across(of_query.long(), of_key.long(), numbers)


def distance(p_query: Tensor, p_key: Tensor) -> Tensor:
    """Distance of every query from every key, at most 2^29, of positions that broadcast."""
    return (p_query - p_key).abs().clamp(max=FARTHEST)


def _across(of_query: Tensor, of_key: Tensor, numbers: Numbers | None) -> tuple[Tensor, Tensor]:
    """`[B, T]` as `[B, 1, T, 1]` and `[B, S]` as `[B, 1, 1, S]`, or the numbered tokens of each."""
    if numbers is not None:
        of_query, of_key = of_query[:, numbers[0]], of_key[:, numbers[1]]
    return of_query[:, None, :, None], of_key[:, None, None, :]


def _window(size: Window) -> Sequence[int | None]:
    return size if isinstance(size, tuple | list) else (size, size)  # pyright: ignore


def _pair(x: Any) -> tuple[Any, Any]:
    return x if isinstance(x, tuple) else (x, x)


def _by_sequence(name: str, lengths: Tensor) -> Tensor:
    if lengths.ndim != 1:
        raise ValueError(
            f"{name} must be [B], got {tuple(lengths.shape)}. Give one length for each sequence."
        )
    return lengths.long()[:, None, None, None]
