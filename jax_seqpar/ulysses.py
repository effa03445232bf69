"""Ulysses attention as one device sees it: reshard, attend, reshard back."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from . import refusals
from .reshard import AxisName, heads_to_sequence, sequence_to_heads
from .shared_heads import tell_shared_heads

# (query [B, T, n, H], key [B, S, k, H], value [B, S, k, H]) -> [B, T, n, H], k dividing n.
LocalAttention = Callable[[Array, Array, Array], Array]


def ulysses_attention(
    query: Shaped[Array, "B localT N H"],
    key: Shaped[Array, "B localS K H"],
    value: Shaped[Array, "B localS K H"],
    *,
    axis_name: AxisName,
    attention: LocalAttention,
) -> Shaped[Array, "B localT N H"]:
    """Attention over tokens that are sharded along a mesh axis; for use inside `jax.shard_map`.

    `[B, S@seq, N, H]` becomes `[B, S, N@seq, H]` by one all-to-all each for query, key and value;
    `attention` sees all the tokens of its heads, so masks stay in global positions; one all-to-all
    takes the output back. Jacobs et al. 2023, https://arxiv.org/abs/2309.14509.

    Args:
      query, key, value: this device's tokens with all heads.
      axis_name: the mesh axis (or axes) that the tokens are sharded over, P devices. P divides N,
        and K divides P or P divides K: with fewer KV heads than devices each is sent to P/K of
        them.
      attention: any attention of one device, called as `attention(query, key, value)` with N/P
        query heads. Bind masks and options beforehand, with `functools.partial`. If it has a
        parameter `shared_heads`, it is told which devices have the same KV head; a `lambda` around
        it hides the parameter.

    Returns:
      This device's tokens of the output, all heads.

    Raises:
      ValueError: sizes or dtypes that do not fit, or an `attention` that returns another shape.
    """
    q, k, v = gather_tokens(query, key, value, axis_name=axis_name)
    copies = refusals.axis_size(axis_name) // key.shape[2]
    out = tell_shared_heads(attention, ((axis_name, copies),))(q, k, v)
    refusals.check_local_output(out, q)
    return heads_to_sequence(out, axis_name)


def gather_tokens(
    query: Shaped[Array, "B localT N H"],
    key: Shaped[Array, "B localS K H"],
    value: Shaped[Array, "B localS K H"],
    *,
    axis_name: AxisName,
) -> tuple[Array, Array, Array]:
    """The way in: query, key and value as the local attention gets them, `[B, S, N@seq, H]`."""
    refusals.check_arrays(query, key, value)
    degree = refusals.axis_size(axis_name)
    refusals.check_heads(query.shape, key.shape, axis_name, degree)
    key, value = (repeat_heads(x, degree) for x in (key, value))
    q, k, v = (sequence_to_heads(x, axis_name) for x in (query, key, value))
    return q, k, v


def repeat_heads(x: Shaped[Array, "B S K H"], parts: int) -> Shaped[Array, "B S K2 H"]:
    """Each KV head as often as it takes to give every one of `parts` devices a head.

    The copies are stacked, so that the derivative adds their gradients one by one, in order, in the
    dtype of x.
    """
    B, S, K, H = x.shape
    if parts <= K:
        return x
    copies = parts // K
    return jnp.stack([x] * copies, axis=3).reshape(B, S, parts, H)
