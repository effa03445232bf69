"""Segment ids that no token has."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer


def unused_id(
    segment_ids: tuple[Integer[Array, "B T"], Integer[Array, "B S"]],
) -> Integer[Array, ""]:
    """A number that no segment of queries or keys has, of their dtype.

    Four bits at a time, from the top: of the 16 ways to go on, the one with the fewest ids. After
    all bits that is at most n / 2^32 of the n ids, so none.
    """
    ids = jnp.concatenate(segment_ids, axis=1)
    bits = 8 * ids.dtype.itemsize
    words = jax.lax.bitcast_convert_type(ids, f"uint{bits}")
    digits = jnp.arange(16, dtype=words.dtype)
    prefix = jnp.zeros((), words.dtype)
    for shift in range(bits - 4, -1, -4):
        ways = (prefix << words.dtype.type(4)) | digits
        counts = ((words >> words.dtype.type(shift))[..., None] == ways[None, None]).sum((0, 1))
        prefix = ways[jnp.argmin(counts)]
    return jax.lax.bitcast_convert_type(prefix, ids.dtype)
