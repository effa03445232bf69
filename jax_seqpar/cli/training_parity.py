"""The training of `seqpar parity --training`, with its progress and its table."""

import jax
from rich.console import Console
from rich.progress import Progress

from ..parity.training.run import MESHES, STEPS, TrainingResult, run_training
from ..parity.training.table import training_summary, training_table
from .console import say


def run(timeout: float) -> TrainingResult:
    """The training on all sides, while standard error shows how far JAX is."""
    jax.config.update("jax_num_cpu_devices", max(data * seq for data, seq in MESHES.values()))
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("training in JAX and PyTorch", total=STEPS * len(MESHES))
        return run_training(timeout=timeout, on_step=lambda step: progress.advance(task))


def show(console: Console, result: TrainingResult) -> None:
    """The steps, and the verdict."""
    console.print(training_table(result))
    for line in training_summary(result):
        say(console, line, style="bold green" if result.passed else "bold red")
