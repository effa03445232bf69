"""Trains a decoder in JAX on two meshes and in PyTorch on four ranks: every bit is the same.

    python examples/bit_equal_training.py
    python examples/bit_equal_training.py --plant "rotary off by one"
    python examples/bit_equal_training.py --steps 100 --png losses.png

Of each step: the loss with its 32 bits, a hash of all weights and moments, and whether the three
agree. Beside it the same training in ordinary float32 on the same two meshes, whose losses part.
With `--plant` a bug is put into PyTorch's side, and the first number that differs is named. Needs
the extras "training" and "parity". Exit status: 0 if all bits are equal, 1 if not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from loss_plot import plot
from planted_training_bugs import BUGS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from training_in_both import Step, Training, digest_of, train_in_jax, train_on_ranks


def first_difference(a: Sequence[Step], b: Sequence[Step]) -> str | None:
    """The first step, tensor and element whose bits differ, in words; None if there is none."""
    for number, (one, other) in enumerate(zip(a, b, strict=True), 1):
        for name, x in one.arrays.items():
            differs = np.argwhere(x.view(np.int32) != other.arrays[name].view(np.int32))
            if len(differs):
                at = tuple(map(int, differs[0]))
                return (
                    f"step {number}, {name}{list(at)}: {x[at]!r} and {other.arrays[name][at]!r}; "
                    f"{len(differs)} of its {x.size} numbers differ"
                )
        if bits(one.loss) != bits(other.loss):
            return f"step {number}, the loss: {one.loss!r} and {other.loss!r}"
    return None


def bits(loss: np.float32) -> str:
    """The 32 bits of a loss in hexadecimal."""
    return f"{int(loss.view(np.uint32)):08x}"


def table_of(exact: dict[str, list[Step]], ordinary: dict[str, list[Step]], rows: int) -> Table:
    """The first steps and the last ones, side by side."""
    table = Table("step", "loss", *exact, "equal", *(f"float32, {name}" for name in ordinary))
    runs = list(exact.values())
    steps = len(runs[0])
    shown = [n for n in range(steps) if n < rows // 2 or n >= steps - rows // 2]
    for n in shown:
        digests = [digest_of(run[n])[:8] for run in runs]
        same = len(set(digests)) == 1
        table.add_row(
            str(n + 1),
            f"{runs[0][n].loss:.6f}",
            *(f"{bits(run[n].loss)} {d}" for run, d in zip(runs, digests, strict=True)),
            "[green]yes" if same else "[red]no",
            *(bits(run[n].loss) for run in ordinary.values()),
        )
    return table


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 20,
    plant: Annotated[str | None, typer.Option(help=f"A bug in PyTorch: {', '.join(BUGS)}.")] = None,
    png: Annotated[Path | None, typer.Option(help="A picture of the losses.")] = None,
) -> None:
    """Trains on all sides, and compares every bit."""
    if plant is not None and plant not in BUGS:
        raise typer.BadParameter(f"--plant {plant!r}: write one of {', '.join(BUGS)}.")
    jax.config.update("jax_num_cpu_devices", 8)
    training = Training(steps=steps)
    meshes = {"JAX 1": (1, 1), "JAX 2x4": (2, 4)}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("exact", total=4 * steps + 1)

        def done() -> None:
            progress.advance(task)

        exact = {name: train_in_jax(training, *mesh, on_step=done) for name, mesh in meshes.items()}
        progress.update(task, description="PyTorch, 2x2 ranks")
        exact["PyTorch 2x2"] = train_on_ranks(training, 2, 2, plant)
        progress.update(task, description="float32", advance=1)
        ordinary = {
            name: train_in_jax(training, *mesh, exact=False, on_step=done)
            for name, mesh in meshes.items()
        }
    console = Console()
    console.print(table_of(exact, ordinary, 20))
    first, *others = exact
    found = {name: first_difference(exact[first], exact[name]) for name in others}
    for name, difference in found.items():
        console.print(f"{first} and {name}: {difference or 'no bit differs'}", highlight=False)
    parted = first_difference(*ordinary.values())
    console.print(f"float32 on two meshes: {parted or 'no bit differs'}", highlight=False)
    if png is not None:
        curves = {**exact, **{f"float32, {name}": run for name, run in ordinary.items()}}
        plot({name: [float(s.loss) for s in run] for name, run in curves.items()}, png)
    if any(found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
