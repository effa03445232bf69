"""The training example, whose process is killed or stopped at its start, in a step or a save.

`python failing_process.py PHASE SIGNAL OPTIONS...`: the signal comes before it meets the others
("start-up"), when it has met them and asks for the devices ("devices"), before the third step
("step"), or when it has written its part of the third checkpoint, and before it says so to process
0, which makes a checkpoint of what all have written ("save").
"""

import itertools
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import long_context_training as training
import train_long_context as example

THIRD = 2


def fail() -> None:
    """Kills or stops the process, before this thread goes on.

    By `os.kill` another thread may be the one that takes SIGSTOP, and until it is scheduled this
    one goes on: on a busy machine as far as the end of the save.
    """
    signal.pthread_kill(threading.get_ident(), signal.Signals[sys.argv[2]])


def before(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The function, with a failure before those of its calls that are meant."""

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments):
            fail()
        return function(*arguments, **keywords)

    return wrapper


def fail_in_save() -> None:
    """Fails in a save, at the event by which Orbax tells how long the save took."""
    saves = itertools.count()

    def on_event(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/checkpoint/write/async/commit_duration_sec" and next(saves) == THIRD:
            fail()

    jax.monitoring.register_event_duration_secs_listener(on_event)


def main() -> None:
    match sys.argv[1]:
        case "start-up":
            example.start = before(example.start, lambda *_: True)
        case "devices":
            jax.devices = before(jax.devices, lambda *_: True)
        case "step":
            training.Text.batch = before(training.Text.batch, lambda text, run, step: step == THIRD)
        case "save":
            fail_in_save()
    example.app(sys.argv[3:])


if __name__ == "__main__":
    main()
