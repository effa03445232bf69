"""One training, run by JAX on a mesh and by PyTorch on ranks, with every bit of each step kept.

`bit_equal_training.py` runs both and compares.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx
from jax.sharding import AxisType
from planted_training_bugs import planted

from jax_seqpar import MeshLayout
from jax_seqpar.bridge import Map, from_torch, run_ranks, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact.clip import clip_by_global_norm
from jax_seqpar.exact.optimizer import adamw
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.training import TokenLayout
from torch_ref.exact import optimizer as torch_optimizer
from torch_ref.exact import training_step
from torch_ref.exact.decoder import Decoder as TorchDecoder
from torch_ref.exact.ranks import make_ranks

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

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Training:
    """What is trained: sizes, text, optimizer. Everything that a loss depends on."""

    config: Config = Config(features=64, hidden=176, layers=2, heads=4, kv_heads=2, head_dim=16)
    batch: int = 4
    tokens: int = 64
    steps: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    largest_norm: float = 1.0
    seed: int = 0

    def weights(self) -> Weights:
        """The first weights, by PyTorch's names."""
        rng = np.random.default_rng(self.seed)
        shapes = self.torch_decoder().shapes()
        return {
            name: (
                np.ones(shape, np.float32)
                if len(shape) == 1
                else (rng.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)
            )
            for name, shape in shapes.items()
        }

    def batches(self) -> Iterator[np.ndarray]:
        """Rows of tokens of each step, with a pattern that can be learned."""
        rng = np.random.default_rng(self.seed + 1)
        V = self.config.vocabulary
        for _ in range(self.steps):
            start = rng.integers(0, V, (self.batch, 1))
            stride = rng.integers(1, 8, (self.batch, 1))
            yield ((start + stride * np.arange(self.tokens)) % V).astype(np.int32)

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the axes in the mapping."""
        return {"N": self.config.heads, "K": self.config.kv_heads}

    def torch_decoder(self) -> TorchDecoder:
        """The same decoder in PyTorch."""
        c = self.config
        assert c.head_dim is not None
        return TorchDecoder(
            vocabulary=c.vocabulary,
            width=c.features,
            layers=c.layers,
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            hidden=c.hidden,
            theta=c.theta,
            eps=c.epsilon,
        )


class Step(NamedTuple):
    """A step: its loss, and weights and moments after it, by PyTorch's names."""

    loss: np.float32
    arrays: Weights


def labels_of(tokens: np.ndarray) -> np.ndarray:
    """What each token is to predict: the next one, and nothing after the last."""
    labels = np.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    return labels


def train_in_jax(
    training: Training,
    data: int,
    sequence: int,
    *,
    exact: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> list[Step]:
    """Trains on a mesh `data x seq`, parameters shared over data as in FSDP.

    Args:
      exact: in exact arithmetic; otherwise as XLA computes float32.
    """
    count = data * sequence
    mesh = jax.make_mesh(
        (data, sequence), ("data", "seq"), (AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )
    layout = MeshLayout(tokens="seq", batch="data")
    arithmetic = ExactArithmetic() if exact else Arithmetic()
    place = Placement(layout, sharding=FSDP, arithmetic=arithmetic)
    rate, decay = training.learning_rate, training.weight_decay
    if exact:
        clip, adam, moments = clip_by_global_norm, adamw, ("mean", "square")
    else:
        clip, adam, moments = optax.clip_by_global_norm, optax.adamw, ("mu", "nu")
    tx = optax.chain(clip(training.largest_norm), adam(rate, weight_decay=decay))
    batches = TokenLayout(replace(layout, mesh=mesh))

    # optax takes powers of a Python float by an int32, which strict promotion forbids.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        graph, params = nnx.split(Decoder(training.config, place, rngs=nnx.Rngs(0)))
        first = {name: numpy_to_torch(w) for name, w in training.weights().items()}
        params = from_torch(first, MAPPING, sizes=training.sizes, like=params)
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> Any:
            loss, gradients = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch))(params)
            updates, state = tx.update(gradients, state, params)
            return loss, optax.apply_updates(params, updates), state

        steps = []
        for tokens in training.batches():
            loss, params, state = step(params, state, batches.shard(tokens))
            mean, square = (optax.tree.get(state, name) for name in moments)
            steps.append(Step(np.float32(loss), _arrays(training, params, mean, square)))
            on_step()
    return steps


def _arrays(training: Training, params: Any, mean: Any, square: Any) -> Weights:
    """Weights and moments as PyTorch names them."""
    found = {}
    for prefix, tree in (("weight", params), ("m", mean), ("v", square)):
        tensors = to_torch_state(tree, MAPPING, sizes=training.sizes)
        found |= {f"{prefix} {name}": torch_to_numpy(x) for name, x in tensors.items()}
    return found


def train_on_ranks(
    training: Training, data: int, sequence: int, plant: str | None = None
) -> list[Step]:
    """Trains in PyTorch on `data * sequence` gloo ranks, all of which have to agree.

    Args:
      plant: a bug of `planted_training_bugs.py`, put into every rank.

    Raises:
      ValueError: if two ranks differ.
    """
    first = training.weights()
    args = (training, data, sequence, plant, first)
    (steps, digest), *others = run_ranks(_train_on_rank, data * sequence, *args, timeout=600.0)
    for rank, (_, other) in enumerate(others, 1):
        if other != digest:
            raise ValueError(f"rank {rank} has digest {other}, rank 0 {digest}: they must agree.")
    return steps


def _train_on_rank(
    rank: int, training: Training, data: int, sequence: int, plant: str | None, first: Weights
) -> tuple[list[Step], str]:
    """The steps, of rank 0 alone, and a digest of all numbers."""
    ranks = make_ranks(data, sequence, training.config.kv_heads)
    state = training_step.first_state({name: numpy_to_torch(w) for name, w in first.items()})
    decoder, steps, digest = training.torch_decoder(), [], hashlib.sha256()

    def own(x: np.ndarray) -> torch.Tensor:
        rows = np.split(x, data)[rank // sequence]
        return torch.from_numpy(np.split(rows, sequence, axis=1)[rank % sequence].astype(np.int64))

    with planted(plant) if plant else nullcontext():
        for number, tokens in enumerate(training.batches(), 1):
            batch = (own(tokens), own(labels_of(tokens)))
            numbers = torch_optimizer.adamw_numbers(
                number, training.learning_rate, weight_decay=training.weight_decay
            )
            loss, state = training_step.step(
                decoder,
                state,
                [batch],
                numbers,
                largest_norm=training.largest_norm,
                ranks=ranks,
            )
            arrays = {
                f"{prefix} {name}": torch_to_numpy(x)
                for prefix, tensors in zip(("weight", "m", "v"), state, strict=True)
                for name, x in tensors.items()
            }
            steps.append(Step(np.float32(loss.item()), arrays))
            digest.update(digest_of(steps[-1]).encode())
    return steps if rank == 0 else [], digest.hexdigest()


def digest_of(step: Step) -> str:
    """SHA-256 of the bits of a step, by the order of the names."""
    digest = hashlib.sha256(step.loss.tobytes())
    for name, x in sorted(step.arrays.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
