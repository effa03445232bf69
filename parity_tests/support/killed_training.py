"""Trainings that are killed after a step that they saved, importable by another process."""

import os
import signal
from pathlib import Path

import jax

from jax_seqpar.parity.training.jax_side import train_in_jax
from jax_seqpar.parity.training.step_files import save_step
from jax_seqpar.parity.training.steps import Step
from jax_seqpar.parity.training.task import Training


def save_and_die_at(folder: Path, last: int, step: Step) -> None:
    """Saves a step; the process does not outlive the step of this number."""
    save_step(folder, step)
    if step.number == last:
        os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(training: Training, folder: Path, last: int) -> None:
    """A training of JAX on one device, in a separate process."""
    jax.config.update("jax_disable_most_optimizations", True)
    train_in_jax(training, 1, 1, on_step=lambda step: save_and_die_at(folder, last, step))
