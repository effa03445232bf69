"""A decoder of `jax_seqpar.exact` operations, line by line as `torch_ref.exact.decoder` has it.

Weights are a dict by PyTorch's names, so that nothing has to be mapped. `examples/decoder.py` is
the same function made of Flax layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ...attention import dot_product_attention
from ...exact import linear as exact_linear
from ...exact import norm as exact_norm
from ...exact.activation import swiglu
from ...exact.attention import Exact
from ...exact.embedding import embed
from ...exact.linear import add, linear
from ...exact.loss import cross_entropy
from ...exact.rotary import rotary
from ...mesh_layout import MeshLayout
from ...training import Batch
from ..inputs import Arrays
from .task import Training

Weights = dict[str, Array]
Attend = Callable[[int, Array, Array, Array], Array]

# Pyright takes what a `jax.custom_vjp` returns for an object.
fork: Callable[[Any, int], Any] = exact_linear.fork
rms_norm: Callable[[Array, Array, float], Any] = exact_norm.rms_norm


@dataclass(frozen=True)
class Model:
    """A model that JAX trains.

    Attributes:
      value_and_grad: loss and gradients, of parameters, a batch on the mesh, and the number of the
        step, int32, which randomness may depend on.
      load: NumPy arrays by PyTorch's names to parameters, sharded as they are trained.
      save: parameters, or a tree like them, back to NumPy.
    """

    value_and_grad: Callable[[Any, Batch, Array], tuple[Array, Any]]
    load: Callable[[Arrays], Any]
    save: Callable[[Any], Arrays]


def exact_decoder(training: Training, layout: MeshLayout) -> Model:
    """The decoder in exact arithmetic, its weights shared over the batch's devices (FSDP).

    Args:
      training: the sizes.
      layout: of tokens, on the mesh of `jax.set_mesh`.
    """

    def load(arrays: Arrays) -> Weights:
        mesh: Any = jax.sharding.get_mesh()
        return {
            name: jax.device_put(x, NamedSharding(mesh, _sharding(training, layout, x)))
            for name, x in arrays.items()
        }

    def loss(weights: Weights, batch: Batch) -> Array:
        whole = {
            n: jax.lax.with_sharding_constraint(w, PartitionSpec()) for n, w in weights.items()
        }
        return _loss(training, layout, whole, batch)

    def value_and_grad(weights: Weights, batch: Batch, _: Array) -> tuple[Array, Weights]:
        return jax.value_and_grad(loss)(weights, batch)

    return Model(
        value_and_grad, load, lambda tree: {name: np.asarray(x) for name, x in tree.items()}
    )


def _sharding(training: Training, layout: MeshLayout, x: np.ndarray) -> PartitionSpec:
    """The first axis of the size of the features over the devices that share the batch."""
    axis = x.shape.index(training.features)
    return PartitionSpec(*(layout.batch if i == axis else None for i in range(x.ndim)))


def _loss(training: Training, layout: MeshLayout, weights: Weights, batch: Batch) -> Array:
    def attend(layer: int, query: Array, key: Array, value: Array) -> Array:
        options: Any = {"kernel": Exact(), "layout": layout}
        return dot_product_attention(query, key, value, is_causal=True, **options)

    found = logits(training, weights, batch.tokens, batch.positions, attend)
    return cross_entropy(found, batch.labels, normaliser=batch.normaliser)


def logits(
    training: Training, weights: Weights, tokens: Array, positions: Array, attend: Attend
) -> Array:
    """`[B, S, V]` of tokens `[B, S]`, float32.

    Args:
      weights: whole on every device.
      positions: of the tokens, for the rotary embedding.
      attend: the attention, `(number of the layer, query, key, value)` to its output.
    """
    rows, columns = fork(weights["embedding"], 2)
    x = embed(rows, tokens)
    for i in range(training.layers):
        prefix = f"layers.{i}."
        p = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        x = _attention_block(training, p, x, positions, partial(attend, i))
        x = _mlp_block(training, p, x)
    y = rms_norm(x, weights["final_norm"], training.epsilon)
    return linear("BSD,VD->BSV", y, columns)


def _attention_block(
    training: Training, p: Weights, x: Array, positions: Array, attend: Callable[..., Array]
) -> Array:
    skip, x = fork(x, 2)
    n = fork(rms_norm(x, p["attention_norm"], training.epsilon), 3)
    q, k, v = (
        _heads(linear("BSD,DF->BSF", y, p[w]), training) for y, w in zip(n, "qkv", strict=True)
    )
    q, k = (rotary(y, positions, training.theta) for y in (q, k))
    o = attend(q, k, v)
    return add(skip, linear("BSF,FD->BSD", o.reshape(*o.shape[:2], -1), p["o"]))


def _heads(y: Array, training: Training) -> Array:
    return y.reshape(*y.shape[:2], -1, training.head_dim)


def _mlp_block(training: Training, p: Weights, x: Array) -> Array:
    skip, x = fork(x, 2)
    for_gate, for_up = fork(rms_norm(x, p["mlp_norm"], training.epsilon), 2)
    gate, up = linear("BSD,DF->BSF", for_gate, p["gate"]), linear("BSD,DF->BSF", for_up, p["up"])
    return add(skip, linear("BSF,FD->BSD", swiglu(gate, up), p["down"]))
