"""A train step of the decoder beside this file, for the planner: nothing is made but shapes.

seqpar plan examples/plan_decoder.py:train_step --topology v5e:4x4 --tokens 128K
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from decoder import Config, Decoder, Placement
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_seqpar.training import Batch

# One layer of the shape of Llama 3 8B, its features over all devices.
CONFIG = Config(128256, 4096, 14336, layers=1, heads=32, kv_heads=8, head_dim=128, tied=False)
PLACE = Placement(sharding={"D": "seq"}, tiles=16, remat=True, dtype=jnp.bfloat16)


def train_step(tokens: int, config: Config = CONFIG, place: Placement = PLACE) -> Any:
    """The step and the shapes of its arguments: the state, which is donated, and a batch."""
    optimizer = optax.adamw(3e-4)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, place, rngs=nnx.Rngs(0))))
    specs = nnx.get_partition_spec(state)
    weights = jax.tree.map(lambda x, spec: shaped(x.shape, x.dtype, spec), state, specs)
    spec_of = {x.shape: x.sharding.spec for x in jax.tree.leaves(weights)}
    moments = jax.tree.map(
        lambda x: shaped(x.shape, x.dtype, spec_of.get(x.shape)),
        jax.eval_shape(optimizer.init, weights),  # as the weights lie, and a count
    )
    of_tokens = shaped((1, tokens), jnp.int32, place.layout.token_spec)
    batch = Batch(of_tokens, of_tokens, of_tokens, None, shaped((), jnp.int32), (1, tokens))

    def step(state: Any, batch: Batch) -> Any:
        weights, moments = state
        loss, grads = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch))(weights)
        updates, moments = optimizer.update(grads, moments, weights)
        return (optax.apply_updates(weights, updates), moments), loss

    return jax.jit(step, donate_argnums=0), ((weights, moments), batch)


def shaped(shape: Any, dtype: Any, spec: Any = None) -> jax.ShapeDtypeStruct:
    """An array of the planner's mesh; whole without a spec."""
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), spec or PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
