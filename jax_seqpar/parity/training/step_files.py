"""A step of a training in a file of safetensors: weights, moments and counter, of either side."""

from pathlib import Path

import numpy as np

from ..._extras import require
from .steps import Step

COUNTER, LOSS = "step", "loss"


def save_step(folder: Path, step: Step) -> Path:
    """Writes `step-000012.safetensors`, whole or not at all, and returns its path."""
    file = folder / f"step-{step.number:06d}.safetensors"
    unfinished = file.with_suffix(".unfinished")
    extra = {COUNTER: np.array(step.number, np.int32), LOSS: np.array(step.loss, np.float32)}
    require("safetensors.numpy").save_file({**step.arrays, **extra}, unfinished)
    unfinished.replace(file)
    return file


def load_step(file: Path) -> Step:
    """A step that was saved, its arrays in the order of a run."""
    arrays = require("safetensors.numpy").load_file(file)
    if missing := sorted({COUNTER, LOSS} - arrays.keys()):
        raise ValueError(
            f"{file} has no tensor {missing[0]!r}, so it is no step of a training. Write the path "
            f"of a file that save_step made."
        )
    number, loss = int(arrays.pop(COUNTER)), np.float32(arrays.pop(LOSS))
    return Step(number, loss, arrays)


def newest_step(folder: Path) -> Step:
    """The last step in a folder.

    Raises:
      ValueError: a folder without one.
    """
    files = sorted(folder.glob("step-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no step-*.safetensors. Write a folder of save_step.")
    return load_step(files[-1])
