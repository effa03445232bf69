"""Trains a decoder on long rows of packed documents, byte by byte, on a data x seq mesh.

    python examples/train_long_context.py --degree 4 --tokens 4096
    python examples/train_long_context.py --exact --folder run   # again: goes on, to the same bits
    python examples/train_long_context.py my_book.txt my_code/*.py

The default 100 steps take over five minutes on two cores; try --steps 10 --tokens 1024 --batch 1.
Reads the files named, or Python's own library. On a machine without accelerators it simulates
devices; on GPUs and TPUs it is the same command. Several processes, started as
`examples/launch/README.md` says, need `--distributed`, or else `--coordinator HOST:PORT
--processes N --process I`. SIGTERM to any of them saves and leaves, with exit status 75.
Needs the extra "training".
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from decoder import Config
from long_context_training import ATTENTION, ORDER, STRATEGY, OnStep, Run, read, train
from loss_plot import plot
from processes import PREEMPTED, because, lost, preemption, start
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    files: Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False)] = None,
    degree: Annotated[int, typer.Option(min=1, help="Devices that share the tokens.")] = 4,
    data: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Of each row.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    learning_rate: float = 1e-3,
    attention: Annotated[str, typer.Option(help=", ".join(ATTENTION))] = "auto",
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGY))] = "ulysses",
    order: Annotated[str, typer.Option(help="Of the tokens: " + ", ".join(ORDER))] = "contiguous",
    fsdp: Annotated[bool, typer.Option(help="Share the parameters, too.")] = False,
    exact: Annotated[bool, typer.Option(help="The same bits on any mesh and processes.")] = False,
    tiles: Annotated[int, typer.Option(min=1, help="In MLP and loss, to save memory.")] = 1,
    offload: Annotated[bool, typer.Option(help="Inputs of layers to the host's memory.")] = False,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    features: Annotated[int, typer.Option(min=8)] = 128,
    folder: Annotated[Path | None, typer.Option(help="Of checkpoints and the plot.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0.")] = None,
    processes: int = 1,
    process: int = 0,
    distributed: Annotated[bool, typer.Option(help="Ask SLURM, GKE, a TPU or Open MPI.")] = False,
    start_within: Annotated[float, typer.Option(help="Seconds for all processes to come.")] = 50,
    patience: Annotated[float, typer.Option(help="Seconds without a sign of life of one.")] = 30,
) -> None:
    """Trains a decoder on bytes; resumes what the folder holds."""
    _check_names(attention=attention, strategy=strategy, order=order)
    _check_features(features, data if fsdp else 1)
    if not 0 <= learning_rate < 2.0**127:
        raise typer.BadParameter(
            f"--learning-rate must be finite and at least 0, got {learning_rate}. Write 1e-3."
        )
    processes = _started(
        coordinator, processes, process, distributed, start_within=start_within, patience=patience
    )
    _find_devices(degree, data, processes)
    run = Run(
        *(degree, data, tokens, batch, steps, learning_rate),
        attention=attention,
        strategy=strategy,
        order=order,
        fsdp=fsdp,
        tiles=tiles,
        offload=offload,
        save_every=save_every,
        exact=exact,
    )
    config = Config(features=features, hidden=4 * features, layers=layers)
    first = jax.process_index() == 0
    try:
        text = read(files or [], tokens)
        with preemption() as leave, _progress(steps, batch * tokens, shown=first) as on_step:
            kept = folder and folder.absolute() / "steps"
            losses = train(run, text, config, kept, on_step, leave)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except Exception as error:
        if processes == 1:
            raise
        lost(because(error))
    if len(losses) < steps:
        saved = (
            "saved: start again with the same --folder" if folder else "not saved without --folder"
        )
        print(f"SIGTERM after step {len(losses)} of {steps}, {saved}.", file=sys.stderr)
        raise typer.Exit(PREEMPTED)
    if first:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
        if folder is not None:
            (folder / "losses.json").write_text(json.dumps(losses))
            plot({f"degree {degree}, {attention}": losses}, folder / "loss.png")


def _check_names(**chosen: str) -> None:
    """Raises BadParameter for an attention, strategy or order that is not in its table."""
    known = {"attention": ATTENTION, "strategy": STRATEGY, "order": ORDER}
    for option, name in chosen.items():
        if name not in known[option]:
            names = ", ".join(known[option])
            raise typer.BadParameter(f"{option} must be one of {names}, got {name!r}.")


def _check_features(features: int, sharing: int) -> None:
    """Raises BadParameter for features that heads, or the devices that share them, cannot share."""
    unit = math.lcm(2 * Config.heads, sharing)
    if features % unit:
        shared = f", which the {sharing} devices of --data share" if sharing > 1 else ""
        raise typer.BadParameter(
            f"--features {features} is not a multiple of {unit}: {Config.heads} heads with an even "
            f"number of channels each{shared}. Write --features {-(-features // unit) * unit}."
        )


def _started(
    coordinator: str | None, processes: int, process: int, distributed: bool, **limits: float
) -> int:
    """Joins the other processes, if there are any, and returns the number of all."""
    if (processes > 1 or process) and coordinator is None:
        raise typer.BadParameter("several processes need --coordinator HOST:PORT of process 0.")
    if not 0 <= process < processes:
        raise typer.BadParameter(f"--process is from 0 to {processes - 1}, got {process}.")
    if distributed and coordinator is not None:
        raise typer.BadParameter(f"--distributed finds the coordinator: leave out {coordinator!r}.")
    if not distributed and coordinator is None:
        return processes
    told: Any = () if distributed else (coordinator, processes, process)
    try:
        return start(*told, **limits)
    except ValueError as error:
        raise typer.BadParameter(
            f"--distributed finds no engine ({error}) Give --coordinator, --processes and "
            f"--process instead."
        ) from None


def _find_devices(degree: int, data: int, processes: int) -> None:
    """Makes the devices, simulated ones of a CPU, or raises BadParameter."""
    with suppress(RuntimeError):  # JAX runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", -(-degree * data // processes))
    if len(jax.devices()) < degree * data:
        raise typer.BadParameter(
            f"degree {degree} x data {data} needs {degree * data} devices, here are "
            f"{len(jax.devices())}."
        )


@contextmanager
def _progress(steps: int, tokens: int, *, shown: bool) -> Iterator[OnStep]:
    """A bar of steps with loss and speed, moved by a function that is called after each step."""
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    fields = (TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),)
    with Progress(*columns, *fields, disable=not shown) as progress:
        bar = progress.add_task("", total=steps, loss=float("nan"), speed=0.0)
        last = time.perf_counter()

        def on_step(step: int, loss: float) -> None:
            nonlocal last
            now = time.perf_counter()
            speed = tokens / (now - last)
            last = now
            progress.update(bar, completed=step + 1, loss=loss, speed=speed)
            # Where nobody sees a bar, in a pipe or a file, a line each few steps.
            if shown and not progress.console.is_terminal and step % 5 == 0:
                print(f"step {step + 1} of {steps}: loss {loss:.4f}", flush=True)

        yield on_step


if __name__ == "__main__":
    app()
