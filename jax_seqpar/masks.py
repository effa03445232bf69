"""Which query attends to which key, in global token positions.

Under Ulysses a device sees whole sequences, so nothing here knows of devices or offsets.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Window = int | tuple[int, int]


def attends(
    query_tokens: int,
    key_tokens: int,
    *,
    mask: Bool[Array, "..."] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: Window | None = None,
) -> Bool[Array, "..."] | None:
    """True where a query may attend to a key; None where everything may.

    Position t of the queries and position s of the keys both count from 0, so with T != S the
    causal diagonal starts in the top left corner, as in `jax.nn` and PyTorch.

    Args:
      query_tokens: T.
      key_tokens: S.
      mask: True attends; 4-D, each axis of full size or 1.
      is_causal: keys `s <= t`.
      query_seq_lengths: queries `t < length`, per batch entry.
      key_value_seq_lengths: keys `s < length`, per batch entry.
      local_window_size: keys `t - left <= s <= t + right`; one integer means both.

    Returns:
      The conjunction, broadcastable to `[B, N, T, S]`.
    """
    t = jnp.arange(query_tokens)[:, None]
    s = jnp.arange(key_tokens)[None, :]
    conditions = [] if mask is None else [mask]
    if is_causal:
        conditions.append((s <= t)[None, None])
    if local_window_size is not None:
        left, right = window(local_window_size)
        conditions.append(((t - left <= s) & (s <= t + right))[None, None])
    if query_seq_lengths is not None:
        conditions.append(t[None, None] < query_seq_lengths[:, None, None, None])
    if key_value_seq_lengths is not None:
        conditions.append(s[None, None] < key_value_seq_lengths[:, None, None, None])
    if not conditions:
        return None
    allowed, *rest = conditions
    for condition in rest:
        allowed = allowed & condition
    return allowed


def window(local_window_size: Window) -> tuple[int, int]:
    """`(left, right)` of a window given as one integer or two."""
    if isinstance(local_window_size, int):
        return local_window_size, local_window_size
    return local_window_size
