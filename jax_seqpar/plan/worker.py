"""A separate process for each plan: with the compiler's environment, a limit, and an end.

A compiler may abort, run out of the machine's memory or not come back; then the answer says so. The
process reads a pickled `Request` and writes the plan as JSON, both in a temporary folder.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .answer import Request, answer, first_line
from .report import Plan
from .targets import FromFile, Target
from .topology import compiler_environment

REQUEST, PLAN, LOG = "request.pickle", "plan.json", "log.txt"


def ask(request: Request, timeout: int | float = 600) -> Plan:
    """The plan of a request, made by a separate process; an error becomes its `failure`.

    Args:
      timeout: seconds after which the process is stopped.

    Raises:
      ValueError: for a function that cannot travel to another process.
    """
    try:
        pickled = pickle.dumps(request)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{request.target.name} cannot travel to another process ({error}). Write it at the "
            f"top of a module, or timeout=None, which compiles in this one."
        ) from None
    with tempfile.TemporaryDirectory(prefix="seqpar-plan-") as folder:
        (Path(folder) / REQUEST).write_bytes(pickled)
        ended = _run(folder, timeout)
        if (Path(folder) / PLAN).exists():
            return Plan.from_json((Path(folder) / PLAN).read_text())
        log = (Path(folder) / LOG).read_text(errors="replace").strip().splitlines()
    if ended is None:
        failure = (
            f"{request.target.name} was not compiled in {timeout:g} s: give it a longer timeout"
        )
    else:
        how = signal.Signals(-ended).name if ended < 0 else f"exit status {ended}"
        failure = f"the process of the compiler ended with {how}: {' '.join(log[-1:]) or 'no word'}"
    return replace(request.start, failure=failure)


def _run(folder: str, timeout: int | float) -> int | None:
    """The exit status; None if it had to be stopped for its time."""
    path = os.pathsep.join(x for x in sys.path if x)
    environment = os.environ | compiler_environment() | {"PYTHONPATH": path}
    with (Path(folder) / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jax_seqpar.plan.worker", folder],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that what it starts ends with it
        )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(folder: str) -> None:
    """The process: writes the plan of the request in a folder, or a plan with its failure."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    request: Request = pickle.loads((Path(folder) / REQUEST).read_bytes())
    if request.machine.platform == "cpu":
        import jax

        jax.config.update("jax_num_cpu_devices", request.machine.count)
    try:
        plan = answer(request)
    except Exception as error:
        plan = replace(request.start, failure=_said(error, request.target))
    written = Path(folder) / f"{PLAN}.part"
    written.write_text(plan.to_json())
    written.rename(Path(folder) / PLAN)


def _said(error: Exception, target: Target) -> str:
    """Message of an error in one line, with its class and its place in the target's file.

    A ValueError says in words what is wrong; "'x'", the whole message of a KeyError, does not.
    """
    said = first_line(str(error)) if str(error) else ""
    if not said or not isinstance(error, ValueError):
        said = f"{type(error).__name__}: {said}".removesuffix(": ")
    if isinstance(target, FromFile):
        frames = traceback.extract_tb(error.__traceback__)
        lines = [x.lineno for x in frames if x.filename == target.file]
        said += f" ({Path(target.file).name}, line {lines[-1]})" if lines else ""
    return said


def _end_with_parent(parent: int) -> None:
    """Ends this process once nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
