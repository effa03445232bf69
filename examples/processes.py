"""Several processes of one training: they start and leave together, and none waits for a dead one.

The engine of a cluster starts them: `examples/launch/README.md` has a file for each.
"""

import itertools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import EX_TEMPFAIL, _exit
from typing import Any, NoReturn

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

# Exit status after SIGTERM: the checkpoint is written, and the same command goes on from it.
PREEMPTED = EX_TEMPFAIL
LOST = 1


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_within: float,
    patience: float,
) -> int:
    """Joins the processes of a training, and returns how many they are.

    Args:
      coordinator, processes, process: as for `jax.distributed.initialize`, which asks the engine
        that started the process for what is None.
      start_within: seconds until all of them have to be there.
      patience: seconds without a sign of life of another process after which this one ends.

    Raises:
      ValueError: where no engine is found.
    """
    # jax.distributed.initialize aborts in C++ at a timeout of its own, without a word of advice.
    late = threading.Timer(start_within, lost, [f"not every process came in {start_within:g} s"])
    late.daemon = True
    late.start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=int(start_within) + 60,
            # One that leaves waits no longer for the others than it would while training.
            shutdown_timeout_seconds=int(patience),
        )
    finally:
        late.cancel()
    _watch(patience)
    return distributed.global_state.num_processes


def _watch(patience: float) -> None:
    """Ends this process, in words, where another one shows no sign of life.

    Collectives wait for ever for a process that is stopped, and JAX ends the others of a killed one
    after 85 seconds, without a word of resuming. Every process counts in the coordinator's store.
    """
    state = distributed.global_state
    client: Any = state.client
    counts: dict[int, str] = {}
    alive = dict.fromkeys(range(state.num_processes), time.monotonic())

    def count() -> None:
        for beat in itertools.count():
            # The store fails and waits where the coordinator does: then nobody's count goes on.
            with suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"alive/{state.process_id}", str(beat), allow_overwrite=True)
                for other in alive:
                    found = client.key_value_try_get(f"alive/{other}")
                    if counts.get(other) != found:
                        counts[other], alive[other] = found, time.monotonic()
            time.sleep(1)

    def watch() -> None:
        while True:
            time.sleep(1)
            silent = [p for p, seen in alive.items() if time.monotonic() - seen > patience]
            # Without the store, which process 0 has, every process seems silent.
            if silent:
                lost(f"process {silent[0]} has shown no sign of life for {patience:g} s")

    for loop in (count, watch):
        threading.Thread(target=loop, daemon=True).start()


def because(error: Exception) -> str:
    """Why a training of several processes cannot go on, for `lost`."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        first = (str(error).splitlines() or [""])[0]
        return f"a collective failed, as when another process dies ({first})"
    # An error of this process alone, of which the others learn by its end.
    traceback.print_exception(error)
    return f"{type(error).__name__} in process {jax.process_index()}"


def lost(why: str) -> NoReturn:
    """Ends this process at once, saying why and what to do."""
    print(
        f"Stopped: {why}. Start every process again with the same --folder: "
        f"training goes on from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    # Not sys.exit: JAX would wait at exit for the process that is lost.
    _exit(LOST)


@contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """A function that every process asks after every step: whether SIGTERM came to any of them.

    All get the same answer for the same step, so that all of them save it.
    """
    if jax.distributed.is_initialized():
        # JAX has a handler of its own, and agrees with the other processes on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
