"""The training example, in which this process is killed or stopped in the middle of something.

`python failing_process.py PHASE SIGNAL OPTIONS...`: the signal comes before it meets the others
("start-up"), when it has met them and asks for the devices ("devices"), before the third step
("step"), or after process 0 has begun to write the checkpoint of that step ("save").
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import orbax.checkpoint as ocp
import train_long_context as example

STEP = 2


def fail() -> None:
    os.kill(os.getpid(), signal.Signals[sys.argv[2]])


def before(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The function, with a failure before those of its calls that are meant."""

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            fail()
        return function(*arguments, **keywords)

    return wrapper


def writing(manager: ocp.CheckpointManager, step: int) -> bool:
    """Waits until process 0 writes this step; False for another than the one meant."""
    while step == STEP and not [*Path(manager.directory).glob(f"{STEP}.*tmp*")]:
        time.sleep(0.01)
    return step == STEP


def main() -> None:
    match sys.argv[1]:
        case "start-up":
            example.start = before(example.start, lambda *_: True)
        case "devices":
            example.jax.devices = before(example.jax.devices, lambda *_: True)
        case "step":
            example.Text.batch = before(example.Text.batch, lambda text, run, step: step == STEP)
        case "save":
            # Without the digests of a save of its own, for which the others would wait first.
            ocp.CheckpointManager.save = before(ocp.CheckpointManager.save, writing)
    example.app(sys.argv[3:])


if __name__ == "__main__":
    main()
