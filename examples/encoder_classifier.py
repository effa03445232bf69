"""The encoder beside this file as a classifier of texts in Flax, and the texts.

`finetune_encoder.py` trains it beside PyTorch's.
"""

import inspect
import pathlib
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from capture_activations import model_folder
from encoder import Config, Encoder, Record
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from transformers import AutoTokenizer

from jax_seqpar import Exact
from jax_seqpar.bridge import Map, from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact.sharding import explicit_sharding
from jax_seqpar.flax import Arithmetic, ExactArithmetic, SequenceParallel
from jax_seqpar.parity.training.jax_decoder import Model
from jax_seqpar.parity.training.jax_side import LAYOUT

IGNORE = -100

# What a docstring can be of, and where its names are.
CLASSES = {
    "text": (str, dir(str)),
    "files": (pathlib.Path, dir(pathlib.Path)),
    "statistics": (statistics, statistics.__all__),
    "random numbers": (random.Random, dir(random.Random)),
}
HEAD = (Map("head", "head.kernel"), Map("head_bias", "head.bias"))
AT = "layers.{i}"
# A weight of PyTorch's encoder, [in, out], and its path in the Flax tree.
NAMES = (
    Map("words", "words.embedding"),
    Map("positions", "positions.embedding"),
    Map("types", "types.embedding"),
    Map("norm_scale", "norm.scale"),
    Map("norm_bias", "norm.bias"),
    Map(f"{AT}.q", f"{AT}.attention.query.kernel", "D (N H) -> D N H"),
    Map(f"{AT}.k", f"{AT}.attention.key.kernel", "D (N H) -> D N H"),
    Map(f"{AT}.v", f"{AT}.attention.value.kernel", "D (N H) -> D N H"),
    Map(f"{AT}.q_bias", f"{AT}.attention.query.bias", "(N H) -> N H"),
    Map(f"{AT}.k_bias", f"{AT}.attention.key.bias", "(N H) -> N H"),
    Map(f"{AT}.v_bias", f"{AT}.attention.value.bias", "(N H) -> N H"),
    Map(f"{AT}.o", f"{AT}.attention.out.kernel", "(N H) D -> N H D"),
    Map(f"{AT}.o_bias", f"{AT}.attention.out.bias"),
    Map(f"{AT}.attention_scale", f"{AT}.attention_norm.scale"),
    Map(f"{AT}.attention_bias", f"{AT}.attention_norm.bias"),
    Map(f"{AT}.up", f"{AT}.up.kernel"),
    Map(f"{AT}.up_bias", f"{AT}.up.bias"),
    Map(f"{AT}.down", f"{AT}.down.kernel"),
    Map(f"{AT}.down_bias", f"{AT}.down.bias"),
    Map(f"{AT}.mlp_scale", f"{AT}.mlp_norm.scale"),
    Map(f"{AT}.mlp_bias", f"{AT}.mlp_norm.bias"),
    *HEAD,
)


class Batch(NamedTuple):
    """`[B, S]` each: tokens, which of them are text, and the class, at the first of them alone."""

    tokens: Any
    mask: Any
    labels: Any


@dataclass(frozen=True)
class Task:
    """Sizes, texts and optimizer of a training.

    Attributes:
      config: the sizes of the encoder, of whose layers the last may be left out.
      batch, tokens: texts of a step, and tokens of each.
    """

    config: Config = Config()
    steps: int = 10
    batch: int = 4
    tokens: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    def batches(self) -> Iterator[Batch]:
        """Docstrings, as many of each class in every batch."""
        tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
        texts = [_docstrings(thing, names) for thing, names in CLASSES.values()]
        options = {"padding": "max_length", "truncation": True, "max_length": self.tokens}
        for step in range(self.steps):
            numbers = range(step * self.batch, (step + 1) * self.batch)
            classes = np.array(numbers) % len(texts)
            chosen = [
                texts[n % len(texts)][n // len(texts) % len(texts[n % len(texts)])] for n in numbers
            ]
            inputs = tokenizer(chosen, return_tensors="np", **options)
            labels = np.full((self.batch, self.tokens), IGNORE, np.int32)
            labels[:, 0] = classes
            mask = inputs["attention_mask"].astype(bool)
            yield Batch(inputs["input_ids"].astype(np.int32), mask, labels)


def _docstrings(thing: Any, names: list[str]) -> list[str]:
    public = (getattr(thing, name) for name in sorted(names) if not name.startswith("_"))
    return [text for text in map(inspect.getdoc, public) if text]


class Classifier(Encoder):
    """The encoder with a linear layer after it."""

    def __init__(self, config: Config, attend: Any, arithmetic: Arithmetic) -> None:
        super().__init__(config, attend, arithmetic=arithmetic, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(config.features, len(CLASSES), rngs=nnx.Rngs(0))

    def through_layers(self, x: jax.Array, mask: jax.Array, record: Record | None) -> jax.Array:
        """A scan, so that one layer is compiled for all; a loop where tensors are recorded, which
        cannot leave a scan."""
        if record:
            return super().through_layers(x, mask, record)
        graph, states = nnx.graphdef(self.layers[0]), [nnx.state(layer) for layer in self.layers]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)

        if explicit_sharding(x) is not None:
            # The carry of a scan keeps one type: x is sharded as attention returns it.
            x = jax.sharding.reshard(x, PartitionSpec(LAYOUT.batch, LAYOUT.tokens))

        def run(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x, mask[:, None, None, :], None), None

        return jax.lax.scan(run, x, stacked)[0]

    def loss(self, batch: Batch) -> jax.Array:
        """The mean cross entropy of the first tokens."""
        logits = self.arithmetic.dense(self.head, self(batch.tokens, batch.mask))
        return self.arithmetic.cross_entropy(logits, batch.labels, None)


def classifier(config: Config, arithmetic: Arithmetic) -> Classifier:
    """The model on the mesh of `jax.set_mesh`."""
    kernel = Exact() if isinstance(arithmetic, ExactArithmetic) else None
    return Classifier(config, SequenceParallel(LAYOUT, kernel=kernel), arithmetic)


def flax_model(task: Task, arithmetic: Arithmetic) -> Model:
    """The classifier, its weights and moments shared over all devices."""
    graph, like = nnx.split(classifier(task.config, arithmetic))
    sizes = {"N": task.config.heads}

    def shared(x: jax.Array) -> PartitionSpec:
        axis = next((i for i, size in enumerate(x.shape) if size % jax.device_count() == 0), None)
        return PartitionSpec(*(("data", "seq") if i == axis else None for i in range(x.ndim)))

    def load(arrays: dict[str, np.ndarray]) -> Any:
        tensors = {name: numpy_to_torch(x) for name, x in arrays.items()}
        mesh: Any = jax.sharding.get_mesh()
        tree = _stacked(from_torch(tensors, NAMES, sizes=sizes, like=like))
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, shared(x))), tree)

    def save(tree: Any) -> dict[str, np.ndarray]:
        tensors = to_torch_state(_unstacked(tree), NAMES, sizes=sizes)
        return {name: torch_to_numpy(x) for name, x in tensors.items()}

    def placed(tree: Any, spec: Callable[[jax.Array], PartitionSpec]) -> Any:
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec(x)), tree)

    def value_and_grad(params: Any, batch: Any, _: jax.Array) -> tuple[jax.Array, Any]:
        def loss(params: Any) -> jax.Array:
            whole = placed(params, lambda _: PartitionSpec())
            return nnx.merge(graph, _unstacked(whole)).loss(batch)

        value, gradients = jax.value_and_grad(loss)(params)
        return value, placed(gradients, shared)

    return Model(value_and_grad, load, save)


def _stacked(tree: Any) -> Any:
    """The parameters, each of all layers as one array: AdamW is compiled once for all of them."""
    rest = {name: x for name, x in tree.items() if name != "layers"}
    return rest, jax.tree.map(lambda *arrays: jnp.stack(arrays), *tree["layers"].values())


def _unstacked(params: Any) -> Any:
    rest, stacked = params
    layers = range(len(jax.tree.leaves(stacked)[0]))
    of_layers = {i: jax.tree.map(lambda x, i=i: x[i], stacked) for i in layers}
    return nnx.State({**rest, "layers": of_layers})
