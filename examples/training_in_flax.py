"""The decoder beside this file as a model of `jax_seqpar.parity.training`, exact or ordinary.

`bit_equal_training.py` trains it beside PyTorch's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx
from jax import Array

from jax_seqpar import MeshLayout
from jax_seqpar.bridge import Map, from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact.accumulation import accumulated_value_and_grad
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.parity.training.jax_decoder import Model
from jax_seqpar.parity.training.jax_side import EXACT_ADAMW, Optimizer, train_in_jax
from jax_seqpar.parity.training.recipe import Recipe
from jax_seqpar.parity.training.steps import Step
from jax_seqpar.parity.training.task import Training
from jax_seqpar.training import Batch, micro_batches

# A weight of PyTorch's decoder, [in, out], and its path in the Flax tree.
MAPPING = [
    Map("embedding", "embedding"),
    Map("final_norm", "norm.scale"),
    Map("layers.{i}.attention_norm", "blocks.{i}.attention_norm.scale"),
    Map("layers.{i}.q", "blocks.{i}.attention.query.kernel", "D (N H) -> D N H"),
    Map("layers.{i}.k", "blocks.{i}.attention.key.kernel", "D (K H) -> D K H"),
    Map("layers.{i}.v", "blocks.{i}.attention.value.kernel", "D (K H) -> D K H"),
    Map("layers.{i}.o", "blocks.{i}.attention.out.kernel", "(N H) D -> N H D"),
    Map("layers.{i}.mlp_norm", "blocks.{i}.mlp_norm.scale"),
    Map("layers.{i}.gate", "blocks.{i}.mlp.gate.kernel"),
    Map("layers.{i}.up", "blocks.{i}.mlp.up.kernel"),
    Map("layers.{i}.down", "blocks.{i}.mlp.down.kernel"),
]


def flax_decoder(
    arithmetic: Arithmetic,
    training: Training,
    layout: MeshLayout,
    *,
    recipe: Recipe = Recipe(),
    tiles: int = 1,
) -> Model:
    """The decoder of a training in Flax, its parameters shared over the batch's devices (FSDP)."""
    dtype = jnp.bfloat16 if recipe.bfloat16 else jnp.float32
    place = Placement(layout, sharding=FSDP, arithmetic=arithmetic, tiles=tiles, dtype=dtype)
    config = replace(
        config_of(training),
        dropout=recipe.dropout,
        label_smoothing=recipe.label_smoothing,
        z_loss=recipe.z_loss,
    )
    graph, like = nnx.split(Decoder(config, place, rngs=nnx.Rngs(0)))
    sizes = {"N": training.heads, "K": training.kv_heads}

    def load(arrays: dict[str, np.ndarray]) -> Any:
        tensors = {name: numpy_to_torch(x) for name, x in arrays.items()}
        return from_torch(tensors, MAPPING, sizes=sizes, like=like)

    def save(tree: Any) -> dict[str, np.ndarray]:
        tensors = to_torch_state(tree, MAPPING, sizes=sizes)
        return {name: torch_to_numpy(x) for name, x in tensors.items()}

    def loss(params: Any, part: tuple[Batch, Array | None]) -> Array:
        batch, rng = part
        return nnx.merge(graph, params).loss(batch, dropout_rng=rng)

    def value_and_grad(params: Any, batch: Batch, number: Array) -> tuple[Array, Any]:
        k, rng = recipe.micro_batches, None
        if recipe.dropout:
            of_step = jax.random.fold_in(jax.random.key(training.seed), number)
            rng = jax.vmap(jax.random.fold_in, (None, 0))(of_step, jnp.arange(k))
        if k > 1:
            parts = micro_batches(batch, k, layout), rng
            return accumulated_value_and_grad(loss)(params, parts)
        return jax.value_and_grad(loss)(params, (batch, None if rng is None else rng[0]))

    return Model(value_and_grad, load, save)


def config_of(training: Training) -> Config:
    """The sizes as the decoder takes them."""
    return Config(
        training.vocabulary,
        training.features,
        training.hidden,
        training.layers,
        training.heads,
        training.kv_heads,
        training.head_dim,
        training.theta,
        training.epsilon,
    )


def _optax_adamw(training: Training) -> optax.GradientTransformation:
    rate, decay = training.learning_rate, training.weight_decay
    clip = optax.clip_by_global_norm(training.largest_norm)
    return optax.chain(clip, optax.adamw(rate, weight_decay=decay))


ORDINARY_ADAMW = Optimizer(_optax_adamw, "count", "mu", "nu")


def train_in_flax(
    training: Training,
    data: int,
    sequence: int,
    *,
    exact: bool = True,
    recipe: Recipe = Recipe(),
    tiles: int = 1,
    start: Step | None = None,
    on_step: Callable[[Step], Any] = lambda step: None,
) -> list[Step]:
    """`train_in_jax` of this decoder, in exact arithmetic or as XLA and optax compute float32.

    Args:
      recipe: how a step finds loss and gradients. Ordinary training takes one micro-batch.
      tiles: of the loss, which change no bit of exact arithmetic.
    """
    if recipe.micro_batches > 1 and not exact:
        raise ValueError(
            f"micro_batches = {recipe.micro_batches} are added by exact arithmetic alone. Write "
            f"exact=True."
        )
    arithmetic = ExactArithmetic() if exact else Arithmetic()
    return train_in_jax(
        training,
        data,
        sequence,
        model=partial(flax_decoder, arithmetic, recipe=recipe, tiles=tiles),
        optimizer=EXACT_ADAMW if exact else ORDINARY_ADAMW,
        start=start,
        on_step=on_step,
    )
