"""The decoder beside this file as a model of `jax_seqpar.parity.training`, exact or ordinary.

`bit_equal_training.py` trains it beside PyTorch's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import optax
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx

from jax_seqpar import MeshLayout
from jax_seqpar.bridge import Map, from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.parity.training.jax_decoder import Model
from jax_seqpar.parity.training.jax_side import EXACT_ADAMW, Optimizer, train_in_jax
from jax_seqpar.parity.training.steps import Step
from jax_seqpar.parity.training.task import Training

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


def flax_decoder(arithmetic: Arithmetic, training: Training, layout: MeshLayout) -> Model:
    """The decoder of a training in Flax, its parameters shared over the batch's devices (FSDP)."""
    place = Placement(layout, sharding=FSDP, arithmetic=arithmetic)
    graph, like = nnx.split(Decoder(config_of(training), place, rngs=nnx.Rngs(0)))
    sizes = {"N": training.heads, "K": training.kv_heads}

    def load(arrays: dict[str, np.ndarray]) -> Any:
        tensors = {name: numpy_to_torch(x) for name, x in arrays.items()}
        return from_torch(tensors, MAPPING, sizes=sizes, like=like)

    def save(tree: Any) -> dict[str, np.ndarray]:
        tensors = to_torch_state(tree, MAPPING, sizes=sizes)
        return {name: torch_to_numpy(x) for name, x in tensors.items()}

    return Model(lambda params, batch: nnx.merge(graph, params).loss(batch), load, save)


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
    start: Step | None = None,
    on_step: Callable[[Step], Any] = lambda step: None,
) -> list[Step]:
    """`train_in_jax` of this decoder, in exact arithmetic or as XLA and optax compute float32."""
    return train_in_jax(
        training,
        data,
        sequence,
        model=partial(flax_decoder, ExactArithmetic() if exact else Arithmetic()),
        optimizer=EXACT_ADAMW if exact else ORDINARY_ADAMW,
        start=start,
        on_step=on_step,
    )
