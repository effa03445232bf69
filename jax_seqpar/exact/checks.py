"""The dtypes and sizes that exact attention is defined for."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import arithmetic


def check_of_one_device(arrays: Mapping[str, Any]) -> None:
    """Raises ValueError for an array, or one of a pair, sharded over Explicit mesh axes, be they of
    one device."""
    for path, x in jax.tree.leaves_with_path(dict(arrays)):
        name = path[0].key
        if any(axis is not None for axis in jax.typeof(x).sharding.spec):
            raise ValueError(
                f"Exact() called directly computes on whole arrays, and {name} {jax.typeof(x)} is "
                f"sharded over Explicit mesh axes. Write jax_seqpar.dot_product_attention(..., "
                f"kernel=Exact()), or jax.sharding.reshard({name}, PartitionSpec())."
            )


def check(
    query: Any,
    key: Any,
    channels: int,
    added: Mapping[str, Any],
    sharing: int,
    degree: int,
) -> None:
    """Raises ValueError for dtypes and sizes that exact attention is not defined for.

    Args:
      channels: V.
      added: bias, slopes and sinks by name, where there are any.
      sharing: devices that have the same KV heads.
      degree: devices whose keys are visited in turns.
    """
    for name, x in added.items():
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name} of exact attention is float32, bfloat16 or float16, got {x.dtype}. "
                f"Write {name}.astype(jnp.float32)."
            )
    if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"exact attention takes float32, bfloat16 and float16, got {query.dtype}. "
            f"Write query.astype(jnp.float32), and key and value alike."
        )
    if max(query.shape[3], channels) > arithmetic.DOT_CHANNELS:
        raise ValueError(
            f"exact attention has room for {arithmetic.DOT_CHANNELS} channels in a dot product, "
            f"got {query.shape[3]} of query and key and {channels} of value. Split the heads."
        )
    G = query.shape[2] // key.shape[2] * sharing
    if G > 1 << 12:
        raise ValueError(
            f"exact attention has room for 4096 query heads of one KV head, got {G} on "
            f"{sharing} devices. Got query {query.shape}, key {key.shape}. Split the query heads."
        )
    S, rows = key.shape[1] * degree, query.shape[1] * degree * G
    if max(S, rows) >= 1 << 21:
        raise ValueError(
            f"exact attention has room for fewer than 2^21 keys, and queries of one KV head, got "
            f"{S} and {rows}. Got query {query.shape}, key {key.shape}. Split the sequence."
        )
