"""A step of decoding, importable by a separate process that compiles it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_seqpar import MeshLayout
from jax_seqpar.decoding import KeyValueCache, attend_to_cache
from jax_seqpar.decoding.slots import Slots


@partial(jax.jit, donate_argnums=0)
def step(cache: KeyValueCache, query: Any, key: Any, value: Any, positions: Any) -> Any:
    """The output, and the cache with one token more in each row."""
    cache = cache.append(key, value, positions)
    return attend_to_cache(query, cache, positions=positions), cache


def shapes(
    tokens: int, devices: int, *, batch: int = 1, heads: int = 32, kv_heads: int = 8, dim: int = 128
) -> tuple[Any, ...]:
    """Shapes of the operands of `step`, with a cache of `tokens` tokens along the devices."""
    layout = MeshLayout()
    mesh = jax.sharding.AbstractMesh((devices,), ("seq",))

    def lying(shape: tuple[int, ...], dtype: Any, spec: Any = jax.sharding.PartitionSpec()) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    held = (batch, tokens, kv_heads, dim)
    slots = Slots(
        lying(held, jnp.bfloat16, layout.partition_spec),
        lying(held, jnp.bfloat16, layout.partition_spec),
        lying(held[:2], jnp.int32, layout.token_spec),
        lying((batch, devices), jnp.int32, layout.token_spec),
        lying((batch, devices), bool, layout.token_spec),
    )
    new = (lying((batch, 1, n, dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads))
    return KeyValueCache(slots, layout), *new, lying((batch, 1), jnp.int32)
