"""Fine-tunes a pretrained encoder in JAX and in PyTorch: every bit is the same.

    python examples/finetune_encoder.py
    python examples/finetune_encoder.py --layers 6

The encoder is all-MiniLM-L6-v2, by default the first two of its layers; the task, to tell by its
docstring whether a function of Python's is of text, of files, of statistics or of random numbers.
Texts are padded to one length. Weights go from `transformers` by name into the encoder beside this
file, which trains on one device and on eight, and into that of `torch_ref.exact`, in exact
arithmetic; beside it the same in ordinary float32, whose losses part. Afterwards they go back, and
`transformers` itself says what the model lost by the training. Needs the extras "training",
"parity" and "real". Exit status: 0 if all bits are equal, 1 if not.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Event
from typing import Annotated, Any

import jax
import numpy as np
import optax
import torch
import typer
from capture_activations import model_folder
from encoder import MAPPING, Config
from encoder_classifier import CLASSES, HEAD, NAMES, Batch, Task, classifier, flax_model
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModel
from transformers.utils import logging

from jax_seqpar.bridge import from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact.optimizer import adamw
from jax_seqpar.exact.self_test.integer_answers import integers
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.parity.training.jax_side import Optimizer, mesh_of, steps_after
from jax_seqpar.parity.training.run import MESHES, TrainingResult
from jax_seqpar.parity.training.steps import KINDS, Step, first_difference, named
from jax_seqpar.parity.training.table import training_summary, training_table
from torch_ref.exact import encoder as torch_encoder
from torch_ref.exact import optimizer as torch_optimizer
from torch_ref.exact.linear import add_bias, linear
from torch_ref.exact.loss import cross_entropy

Tensors = dict[str, torch.Tensor]
OnStep = Callable[[], Any]


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


def _adamw(exact: bool, task: Any) -> optax.GradientTransformation:
    make = adamw if exact else optax.adamw
    return make(task.learning_rate, weight_decay=task.weight_decay)


EXACT_ADAMW = Optimizer(partial(_adamw, True), "steps", "mean", "square")
OPTAX_ADAMW = Optimizer(partial(_adamw, False), "count", "mu", "nu")


def train_in_flax(
    task: Task,
    mesh: tuple[int, int],
    start: Step,
    *,
    exact: bool = True,
    on_step: OnStep | None = None,
) -> list[Step]:
    """The steps on a mesh `data x seq`, in exact arithmetic or as XLA and optax compute float32."""
    optimizer = EXACT_ADAMW if exact else OPTAX_ADAMW
    on_mesh, steps = mesh_of(*mesh), []
    tokens = NamedSharding(on_mesh, PartitionSpec("data", "seq"))
    with jax.set_mesh(on_mesh):
        batches = (jax.device_put(batch, tokens) for batch in task.batches())
        model = flax_model(task, ExactArithmetic() if exact else Arithmetic())
        for step in steps_after(start, batches, model, optimizer, task):
            steps.append(_kept(step, task))
            if on_step:
                on_step()
    return steps


def train_in_torch(task: Task, start: Step, *, on_step: OnStep | None = None) -> list[Step]:
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
        if on_step:
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
    of_encoder = {n: x for n, x in state.items() if n not in ("head", "head_bias")}
    missing, unexpected = model.double().load_state_dict(of_encoder, strict=False)
    # Training has no part for the pooler: its output is not looked at.
    if unexpected or set(missing) - {"pooler.dense.weight", "pooler.dense.bias"}:
        raise ValueError(
            f"the encoder of transformers lacks {missing} and does not know {unexpected}. Write "
            f"NAMES and MAPPING for all of its weights but the pooler's."
        )
    ids, mask, labels = (torch.from_numpy(x).long() for x in batch)
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        logits = first @ state["head"] + state["head_bias"]
        return torch.nn.functional.cross_entropy(logits, labels[:, 0]).item()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 10,
    layers: Annotated[int, typer.Option(min=1, max=6, help="Of the encoder.")] = 2,
) -> None:
    """Fine-tunes on all sides, and compares every bit."""
    jax.config.update("jax_num_cpu_devices", 8)
    task = Task(Config(layers=layers), steps)
    model = pretrained(task)
    start = start_of(model, task)
    stopped = Event()
    # Small operands wait long for a second thread of PyTorch's where another process is busy.
    torch.set_num_threads(1)
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(1) as beside,
        ExitStack() as at_the_end,
    ):
        at_the_end.callback(stopped.set)
        bar = progress.add_task("", total=(2 * len(MESHES) + 1) * steps)
        on_step = partial(progress.advance, bar)

        def on_step_of_torch() -> None:
            # The executor waits for its thread, which Ctrl-C does not reach.
            if stopped.is_set():
                raise CancelledError
            on_step()

        # PyTorch trains while JAX compiles.
        of_torch = beside.submit(train_in_torch, task, start, on_step=on_step_of_torch)
        runs = {
            name: train_in_flax(task, mesh, start, on_step=on_step) for name, mesh in MESHES.items()
        }
        runs["PyTorch 1"] = of_torch.result()
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
