"""The training in JAX, on a mesh of data and sequence parallel devices."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType

from ...exact.clip import clip_by_global_norm
from ...exact.optimizer import adamw
from ...mesh_layout import MeshLayout
from ...training import TokenLayout
from .jax_decoder import Model, exact_decoder
from .steps import Step, named
from .task import Training

LAYOUT = MeshLayout(tokens="seq", batch="data")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of a training, and how its state names the counter and the two moments."""

    make: Callable[[Any], optax.GradientTransformation]
    steps: str
    mean: str
    square: str


def _exact_adamw(training: Training) -> optax.GradientTransformation:
    rate, decay = training.learning_rate, training.weight_decay
    return optax.chain(clip_by_global_norm(training.largest_norm), adamw(rate, weight_decay=decay))


EXACT_ADAMW = Optimizer(_exact_adamw, "steps", "mean", "square")


def train_in_jax(
    training: Training,
    data: int,
    sequence: int,
    *,
    model: Callable[[Training, MeshLayout], Model] = exact_decoder,
    optimizer: Optimizer = EXACT_ADAMW,
    start: Step | None = None,
    on_step: Callable[[Step], Any] = lambda step: None,
) -> list[Step]:
    """Trains on a mesh `data x seq` of the first devices.

    Args:
      model: called under the mesh, with the layout of the tokens.
      start: the step after which to go on, of any side; the first weights if None.
      on_step: called with each step, to save it or to show how far the run is.
    """
    mesh = mesh_of(data, sequence)
    batches = TokenLayout(replace(LAYOUT, mesh=mesh))
    start, steps = start or training.start(), []
    with jax.set_mesh(mesh):
        sharded = map(batches.shard, training.batches(start.number))
        for step in steps_after(start, sharded, model(training, LAYOUT), optimizer, training):
            steps.append(step)
            on_step(step)
    return steps


def steps_after(
    start: Step, batches: Iterable[Any], model: Model, optimizer: Optimizer, training: Any
) -> Iterator[Step]:
    """Steps of a model, one for each batch, computed as they are asked for.

    Under `jax.set_mesh`, for the batches too, which are sharded on that mesh.
    """
    tx = optimizer.make(training)
    params, state = loaded(model, tx, optimizer, start)
    # Without donation: a step that is kept may be a view of the weights it was made of.
    make_step = jax.jit(step_of(model, tx))
    for number, batch in enumerate(batches, start.number + 1):
        # optax takes powers of a Python float by an int32, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            loss, params, state = make_step(params, state, batch, jnp.int32(number))
        moments = (optax.tree.get(state, n) for n in (optimizer.mean, optimizer.square))
        arrays = named(*map(model.save, (params, *moments)))
        yield Step(number, np.float32(loss), arrays)


def step_of(model: Model, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A step: of parameters, the optimizer's state, a batch and the step's number to loss,
    parameters and state."""

    def make_step(params: Any, state: Any, batch: Any, number: Array) -> tuple[Array, Any, Any]:
        loss, gradients = model.value_and_grad(params, batch, number)
        updates, state = tx.update(gradients, state, params)
        return loss, optax.apply_updates(params, updates), state

    return make_step


def mesh_of(data: int, sequence: int) -> jax.sharding.Mesh:
    """A mesh `data x seq` of the first devices, with Auto axes."""
    devices = jax.devices()
    if len(devices) < data * sequence:
        raise ValueError(
            f"a mesh of {data} x {sequence} needs {data * sequence} devices, there are "
            f"{len(devices)}. Before JAX is first used, write jax.config.update("
            f'"jax_num_cpu_devices", {data * sequence}).'
        )
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh(
        (data, sequence), ("data", "seq"), auto, devices=devices[: data * sequence]
    )


def loaded(
    model: Model, tx: optax.GradientTransformation, optimizer: Optimizer, start: Step
) -> tuple[Any, Any]:
    """Parameters and state of the optimizer after a step."""
    params, mean, square = (model.load(start.of_kind(kind)) for kind in ("weight", "m", "v"))
    moments = {optimizer.mean: mean, optimizer.square: square}
    state = optax.tree.set(tx.init(params), **{optimizer.steps: jnp.int32(start.number)}, **moments)
    return params, state
