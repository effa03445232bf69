"""Fine-tunes a pretrained encoder in JAX and in PyTorch: every bit is the same.

    python examples/finetune_encoder.py
    python examples/finetune_encoder.py --steps 3 --layers 2

The encoder is all-MiniLM-L6-v2; the task, to tell by its docstring whether a function of Python's
is of text, of files, of statistics or of random numbers. Texts are padded to one length. Weights go
from `transformers` by name into the encoder beside this file, which trains on one device and on
eight, and into that of `torch_ref.exact`, in exact arithmetic; beside it the same in ordinary
float32, whose losses part. Afterwards they go back, and `transformers` itself says what is lost.
Needs the extras "training", "parity" and "real". Exit status: 0 if all bits are equal, 1 if not.
"""

import hashlib
import inspect
import pathlib
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import typer
from capture_activations import model_folder
from encoder import MAPPING, Config, Encoder, Record
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from jax_seqpar import Exact
from jax_seqpar.bridge import Map, from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact.optimizer import adamw
from jax_seqpar.exact.self_test.integer_answers import integers
from jax_seqpar.flax import Arithmetic, ExactArithmetic, SequenceParallel
from jax_seqpar.parity.training.jax_decoder import Model
from jax_seqpar.parity.training.jax_side import LAYOUT, Optimizer, loaded, mesh_of, step_of
from jax_seqpar.parity.training.run import MESHES, TrainingResult
from jax_seqpar.parity.training.steps import KINDS, Step, first_difference, named
from jax_seqpar.parity.training.table import training_summary, training_table
from torch_ref.exact import encoder as torch_encoder
from torch_ref.exact import optimizer as torch_optimizer
from torch_ref.exact.linear import add_bias, linear
from torch_ref.exact.loss import IGNORE_INDEX, cross_entropy

Tensors = dict[str, torch.Tensor]
OnStep = Callable[[], Any]

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
    """What is trained.

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
        """As many of each class in every batch."""
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
            labels = np.full((self.batch, self.tokens), IGNORE_INDEX, np.int32)
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
        """A scan, so that one layer is compiled for all."""
        graph, states = nnx.graphdef(self.layers[0]), [nnx.state(layer) for layer in self.layers]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)

        def run(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, state)(x, mask, record), None

        return jax.lax.scan(run, x, stacked)[0]

    def loss(self, batch: Batch) -> jax.Array:
        """The mean cross entropy of the first tokens."""
        logits = self.arithmetic.dense(self.head, self(batch.tokens, batch.mask))
        return self.arithmetic.cross_entropy(logits, batch.labels, None)


def classifier(config: Config, arithmetic: Arithmetic) -> Classifier:
    """The model on the mesh of `jax.set_mesh`."""
    kernel = Exact() if isinstance(arithmetic, ExactArithmetic) else None
    return Classifier(config, SequenceParallel(LAYOUT, kernel=kernel), arithmetic)


def pretrained(task: Task) -> Any:
    """The model of `transformers`, of whose layers a task may leave out the last."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: Any = {"local_files_only": True, "num_hidden_layers": task.config.layers}
    return AutoModel.from_pretrained(model_folder(), **options)


def start_of(model: Any, task: Task) -> Step:
    """The weights before the first step, by the names of `torch_ref.exact.encoder`."""
    state = {name: x.detach().float() for name, x in model.state_dict().items()}
    head = integers((task.config.features, len(CLASSES)), 10, 0) * 2.0**-14
    state |= {"head": torch.from_numpy(head).float(), "head_bias": torch.zeros(len(CLASSES))}
    weights = _renamed(state, (*MAPPING, *HEAD), NAMES, task)
    arrays = {name: torch_to_numpy(x) for name, x in weights.items()}
    zeros = {name: np.zeros_like(x) for name, x in arrays.items()}
    return Step(0, np.float32(np.nan), named(arrays, zeros, zeros))


def state_of(step: Step, task: Task) -> Tensors:
    """The weights after a step, by the names of `transformers`."""
    weights = {name: numpy_to_torch(x) for name, x in step.of_kind("weight").items()}
    return _renamed(weights, NAMES, (*MAPPING, *HEAD), task)


def _renamed(tensors: Tensors, source: Any, target: Any, task: Task) -> Tensors:
    """Tensors of one naming under another, by way of Flax's."""
    like = nnx.eval_shape(lambda: nnx.state(classifier(task.config, Arithmetic())))
    sizes = {"N": task.config.heads}
    return to_torch_state(from_torch(tensors, source, sizes=sizes, like=like), target, sizes=sizes)


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


def _adamw(exact: bool, task: Any) -> optax.GradientTransformation:
    make = adamw if exact else optax.adamw
    return make(task.learning_rate, weight_decay=task.weight_decay)


EXACT_ADAMW = Optimizer(partial(_adamw, True), "steps", "mean", "square")
OPTAX_ADAMW = Optimizer(partial(_adamw, False), "count", "mu", "nu")


def train_in_flax(
    task: Task, mesh: tuple[int, int], start: Step, *, exact: bool = True, on_step: OnStep = bool
) -> list[Step]:
    """The steps on a mesh `data x seq`, in exact arithmetic or as XLA and optax compute float32."""
    optimizer = EXACT_ADAMW if exact else OPTAX_ADAMW
    on_mesh, steps = mesh_of(*mesh), []
    tokens = NamedSharding(on_mesh, PartitionSpec("data", "seq"))
    tx: Any = optimizer.make(task)  # pyright: ignore[reportArgumentType]
    # optax takes powers of a Python float by an int32, which strict promotion forbids.
    with jax.set_mesh(on_mesh), jax.numpy_dtype_promotion("standard"):
        model = flax_model(task, ExactArithmetic() if exact else Arithmetic())
        params, state = loaded(model, tx, optimizer, start)
        make_step = jax.jit(step_of(model, tx), donate_argnums=(0, 1))
        for number, batch in enumerate(task.batches(), 1):
            loss, params, state = make_step(
                params, state, jax.device_put(batch, tokens), jnp.int32(number)
            )
            moments = (optax.tree.get(state, n) for n in (optimizer.mean, optimizer.square))
            step = Step(number, np.float32(loss), named(*map(model.save, (params, *moments))))
            steps.append(_kept(step, task))
            on_step()
    return steps


def train_in_torch(task: Task, start: Step, *, on_step: OnStep = bool) -> list[Step]:
    """The steps of PyTorch in one process."""
    sizes = torch_encoder.Encoder(task.config.layers, task.config.heads, task.config.epsilon)
    weights, m, v = (
        {name: numpy_to_torch(x) for name, x in start.of_kind(kind).items()} for kind in KINDS
    )
    steps = []
    for number, batch in enumerate(task.batches(), 1):
        ids, mask, labels = map(torch.from_numpy, batch)
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        hidden = torch_encoder.hidden(sizes, leaves, ids.long(), mask)
        logits = add_bias(linear(hidden, leaves["head"]), leaves["head_bias"])
        loss = cross_entropy(logits, labels.long())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        numbers = torch_optimizer.adamw_numbers(
            number, task.learning_rate, weight_decay=task.weight_decay
        )
        for name, g in zip(leaves, gradients, strict=True):
            moved = torch_optimizer.adamw(weights[name], m[name], v[name], g, numbers)
            weights[name], m[name], v[name] = moved
        arrays = ({name: torch_to_numpy(x) for name, x in tree.items()} for tree in (weights, m, v))
        steps.append(_kept(Step(number, np.float32(loss.item()), named(*arrays)), task))
        on_step()
    return steps


def _kept(step: Step, task: Task) -> Step:
    """The last step; of those before it the SHA-256 of each array in its place, for the memory."""
    if step.number == task.steps:
        return step
    digests = {n: hashlib.sha256(x.tobytes()).digest() for n, x in step.arrays.items()}
    return step._replace(arrays={n: np.frombuffer(x, np.uint32) for n, x in digests.items()})


def loss_by_transformers(model: Any, step: Step, task: Task, batch: Batch) -> float:
    """The loss of `transformers` in float64, with the weights after a step."""
    state = {name: x.double() for name, x in state_of(step, task).items()}
    model.double().load_state_dict(
        {n: x for n, x in state.items() if "head" not in n}, strict=False
    )
    ids, mask, labels = (torch.from_numpy(x).long() for x in batch)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        logits = first @ state["head"] + state["head_bias"]
        return torch.nn.functional.cross_entropy(logits, labels[:, 0]).item()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 10,
    layers: Annotated[int, typer.Option(min=1, max=6, help="Of the encoder.")] = 6,
) -> None:
    """Fine-tunes on all sides, and compares every bit."""
    jax.config.update("jax_num_cpu_devices", 8)
    task = Task(Config(layers=layers), steps)
    model = pretrained(task)
    start = start_of(model, task)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=(2 * len(MESHES) + 1) * steps)
        on_step = partial(progress.advance, bar)
        runs = {
            name: train_in_flax(task, mesh, start, on_step=on_step) for name, mesh in MESHES.items()
        }
        runs["PyTorch 1"] = train_in_torch(task, start, on_step=on_step)
        ordinary = {
            f"float32, {name}": train_in_flax(task, mesh, start, exact=False, on_step=on_step)
            for name, mesh in MESHES.items()
        }
    result, console = TrainingResult(runs), Console()
    console.print(training_table(result, beside=ordinary))
    for line in training_summary(result):
        console.print(line, highlight=False)
    parted = first_difference(*(run[-1:] for run in ordinary.values()))
    console.print(f"float32 on two meshes: {parted or 'no bit differs'}", highlight=False)
    batch, last = next(task.batches()), result.steps[-1][0]
    losses = [f"{loss_by_transformers(model, step, task, batch):.6f}" for step in (start, last)]
    console.print(f"first batch, by transformers in float64: {', then '.join(losses)}")
    if not result.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
