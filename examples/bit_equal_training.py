"""Trains a decoder in JAX on two meshes and in PyTorch on four ranks: every bit is the same.

    python examples/bit_equal_training.py
    python examples/bit_equal_training.py --plant "rotary off by one"
    python examples/bit_equal_training.py --steps 100 --png losses.png
    python examples/bit_equal_training.py --steps 10 --folder steps
    python examples/bit_equal_training.py --steps 20 --folder steps
    python examples/bit_equal_training.py --bfloat16 --dropout 0.1 --micro-batches 2

Of each step: the loss with its 32 bits, a hash of all weights and moments, and whether the three
agree. Beside it the same training in ordinary float32 on the same two meshes, whose losses part.
With `--plant` a bug is put into PyTorch's side, and the first number that differs is named. With
`--folder` each step of JAX on one device is saved there, and every side, PyTorch too, goes on after
the newest one that it finds. Needs the extras "training" and "parity". Exit status: 0 if all bits
are equal, 1 if not. `seqpar parity --training` is the same without Flax, in four steps.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from loss_plot import plot
from planted_training_bugs import BUGS, planted
from rich.console import Console
from rich.progress import Progress
from training_in_flax import train_in_flax

from jax_seqpar.parity.training.recipe import Recipe
from jax_seqpar.parity.training.run import MESHES, RANKS, TrainingResult
from jax_seqpar.parity.training.step_files import newest_step, save_step
from jax_seqpar.parity.training.steps import Step, first_difference
from jax_seqpar.parity.training.table import training_summary, training_table
from jax_seqpar.parity.training.task import Training
from jax_seqpar.parity.training.torch_side import Ranks, train_on_ranks

Runs = dict[str, list[Step]]


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 20,
    plant: Annotated[str | None, typer.Option(help=f"A bug in PyTorch: {', '.join(BUGS)}.")] = None,
    png: Annotated[Path | None, typer.Option(help="A picture of the losses.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Save steps here, and go on after the newest one.")
    ] = None,
    bfloat16: Annotated[bool, typer.Option(help="Activations of 16 bits.")] = False,
    dropout: Annotated[float, typer.Option(help="The rate, of weights and activations.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(help="Of the cross entropy.")] = 0.0,
    z_loss: Annotated[float, typer.Option(help="Of the cross entropy.")] = 0.0,
    micro_batches: Annotated[int, typer.Option(help="Of a step, whose gradients are added.")] = 1,
) -> None:
    """Trains on all sides, and compares every bit."""
    recipe = Recipe(bfloat16, dropout, label_smoothing, z_loss, micro_batches)
    if plant is not None and plant not in BUGS:
        raise typer.BadParameter(f"--plant {plant!r}: write one of {', '.join(BUGS)}.")
    start = _start(folder)
    if start is not None and start.number >= steps:
        raise typer.BadParameter(f"--steps {steps}: {folder} has {start.number}. Write more.")
    jax.config.update("jax_num_cpu_devices", 8)
    result, ordinary = _runs(Training(steps=steps), recipe, plant, folder, start)
    console = Console()
    dtype = "bfloat16" if bfloat16 else "float32"
    beside = {f"{dtype}, {name}": run for name, run in ordinary.items()}
    console.print(training_table(result, beside=beside))
    for line in training_summary(result):
        console.print(line, highlight=False)
    parted = first_difference(*ordinary.values())
    console.print(f"{dtype} on two meshes: {parted or 'no bit differs'}", highlight=False)
    if png is not None:
        curves = {**result.runs, **beside}
        plot({name: [float(s.loss) for s in run] for name, run in curves.items()}, png)
    if not result.passed:
        raise typer.Exit(1)


def _start(folder: Path | None) -> Step | None:
    """The newest step in the folder, which is made; None without one."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return newest_step(folder) if any(folder.glob("step-*.safetensors")) else None


def _runs(
    training: Training,
    recipe: Recipe,
    plant: str | None,
    folder: Path | None,
    start: Step | None,
) -> tuple[TrainingResult, Runs]:
    """The exact runs of all sides, and those of ordinary arithmetic in JAX, of whole batches."""
    left = training.steps - (start.number if start else 0)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("exact", total=2 * left * len(MESHES) + 1)

        def in_jax(mesh: tuple[int, int], keep: Path | None = None, *, exact: bool) -> list[Step]:
            def on_step(step: Step) -> None:
                progress.advance(task)
                if keep is not None:
                    save_step(keep, step)

            its = recipe if exact else replace(recipe, micro_batches=1)
            options: Any = {"recipe": its, "start": start, "on_step": on_step}
            return train_in_flax(training, *mesh, exact=exact, **options)

        (first, alone), *others = MESHES.items()
        runs = {first: in_jax(alone, folder, exact=True)}
        runs |= {name: in_jax(mesh, exact=True) for name, mesh in others}
        progress.update(task, description=RANKS)
        ranks = Ranks(2, 2, partial(planted, plant) if plant else nullcontext)
        runs[RANKS] = train_on_ranks(training, ranks, recipe=recipe, start=start)
        progress.update(task, description="float32", advance=1)
        ordinary = {name: in_jax(mesh, exact=False) for name, mesh in MESHES.items()}
    return TrainingResult(runs), ordinary


if __name__ == "__main__":
    typer.run(main)
