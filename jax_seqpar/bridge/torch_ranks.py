"""Runs a function on PyTorch ranks, one process each, and collects the results."""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from types import FunctionType
from typing import Any

from .._extras import require_torch

# Signals that end a program: they reach its whole process group, and are the parent's to handle.
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class RankError(RuntimeError):
    """A rank failed; the message ends with its traceback, or says how it died."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float | int = 120.0,
    threads: int = 1,
) -> list[Any]:
    """`fn(rank, *args)` on every rank of a gloo process group on this machine.

    Args:
      fn: defined at the top of a module that can be imported, so that it can be pickled. A script
        that calls this needs `if __name__ == "__main__":`, as with any spawned process.
      world_size: number of ranks, each a fresh process with `torch.distributed` initialised.
      args: the same for every rank; anything that can be pickled.
      timeout: seconds for the whole run, after which every rank is killed.
      threads: PyTorch threads of each rank.

    Returns:
      What each rank returned, in rank order. It travels by `pickle`, which PyTorch's float8 and
      wide unsigned tensors do not survive: return those as NumPy arrays. Arguments and values lie
      in a temporary folder meanwhile, below `tempfile.gettempdir()`.

    Raises:
      TypeError: a function, argument or value that cannot be pickled.
      ValueError: an invalid world_size, timeout or threads; or a program read from standard input,
        which the ranks cannot import.
      RankError: a rank raised or died.
      TimeoutError: not done in time; the message names the ranks that had not finished.

    Processes and folder are gone when `run_ranks` returns or raises, but for processes that a rank
    starts in a new session (`start_new_session=True`). Should this process be killed, the
    ranks see it, remove the folder and end.
    """
    with start_ranks(fn, world_size, *args, timeout=timeout, threads=threads) as collect:
        return collect()


@contextlib.contextmanager
def start_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float | int = 120.0,
    threads: int = 1,
) -> Iterator[Callable[[], list[Any]]]:
    """`run_ranks` in two steps, with other work in between: yields a function that waits for the
    ranks and returns their values. Leaving the context kills the ranks.

    Example:
      with start_ranks(fn, 4) as collect:
          other_work()
          values = collect()
    """
    require_torch()
    _check(world_size, timeout, threads)
    deadline = time.monotonic() + timeout
    # By import, as a fork would copy locks that JAX's and PyTorch's threads hold.
    context = multiprocessing.get_context("spawn")
    # Started here, or with the first process, which SIGINT and SIGTERM would then reach: it leaves
    # them unblocked.
    resource_tracker.ensure_running()
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="seqpar-") as name:
        folder = Path(name)
        try:
            # At once: a folder without a rank stays if this process is killed.
            with _ending_signals_blocked():
                for rank in range(world_size):
                    # Few bytes: a start writes them into a pipe, which blocks when it is full.
                    arguments = (rank, world_size, folder, timeout, threads)
                    process = context.Process(target=_rank_main, args=arguments, daemon=True)
                    processes.append(process)
                    process.start()
            what = "the ranks cannot be sent this function and its arguments"
            _write(folder / "task", (fn, args), what, _TaskPickler)
            yield partial(_collect, processes, folder, deadline, timeout)
        finally:
            started = [process for process in processes if process.pid is not None]
            for process in started:
                process.kill()
                # And whatever the rank has started; a rank that has just begun leads no group yet.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            for process in started:
                process.join()
                process.close()


def _check(world_size: Any, timeout: Any, threads: Any) -> None:
    """Raises unless the ranks can be started with these numbers, from this process."""
    for name, count in (("world_size", world_size), ("threads", threads)):
        if type(count) is not int or count < 1:
            raise ValueError(
                f"{name} must be a positive Python integer, got {count!r}. Write {name}=1 or more."
            )
    # Below a billion: PyTorch counts a timeout in nanoseconds, in 64 bits.
    if isinstance(timeout, bool) or not isinstance(timeout, float | int) or not 0 < timeout < 1e9:
        raise ValueError(
            f"timeout must be a number of seconds, like 120.0, got {timeout!r}. Give seconds above "
            f"0 and below 1e9."
        )
    process = multiprocessing.current_process()
    if process.daemon:
        raise RuntimeError(
            f"a daemonic process, such as a rank, may not start ranks. This one is "
            f"{process.name!r}. Call run_ranks in the program that started it."
        )
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if getattr(main, "__spec__", None) is None and file is not None and not Path(file).is_file():
        raise ValueError(
            f"ranks import the program that starts them, and {file!r} is no file. Write the "
            f'program to a file, with the call of run_ranks under `if __name__ == "__main__":`.'
        )


@contextlib.contextmanager
def _ending_signals_blocked() -> Iterator[None]:
    """Processes started by this thread inherit the mask: no signal ends one before its parent.

    The processes would print a traceback for a Ctrl-C while they import, or be gone before the
    parent, which without a signal handler leaves the removal of the folder to them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _TaskPickler(pickle.Pickler):
    """A pickler that raises for what a rank would not find in its own `__main__`."""

    def reducer_override(self, obj: Any) -> Any:
        if (
            isinstance(obj, type | FunctionType)
            and obj.__module__ == "__main__"
            and not _ranks_have_main()
        ):
            raise pickle.PicklingError(
                f"{obj.__qualname__} is of a __main__ that ranks do not import"
            )
        return NotImplemented


def _ranks_have_main() -> bool:
    """Whether a spawned process runs this program's `__main__`, as `multiprocessing` decides."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is None:
        return getattr(main, "__file__", None) is not None
    return spec.name.rpartition(".")[2] != "__main__"


def _write(path: Path, value: Any, what: str, pickler: type = pickle.Pickler) -> None:
    """Pickles a value under another name and renames the file: `path` is whole or absent.

    By no pickler of PyTorch's: those share the memory of tensors, which ends with this process.
    """
    unfinished = path.with_name(f"unfinished-{path.name}")
    try:
        with unfinished.open("wb") as file, _pickling(what):
            pickler(file).dump(value)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)  # of a full disk: the error needs room, too


@contextlib.contextmanager
def _pickling(what: str) -> Iterator[None]:
    """Raises a TypeError of `what` and of what to write instead, where pickle raises anything."""
    try:
        yield
    except (OSError, MemoryError):  # no space
        raise
    except Exception as error:
        raise TypeError(
            f"{what}: {type(error).__name__}: {error}. Define functions and classes at the top of "
            f"a module in a file: not in a notebook, `python -c` or another function. Pass and "
            f"return arrays, tensors and what else pickle copies."
        ) from error


def _collect(processes: list[Any], folder: Path, deadline: float, timeout: float) -> list[Any]:
    """The ranks' values. It waits for nothing but the time and the ends of processes."""
    values: dict[int, Any] = {}
    while missing := [rank for rank in range(len(processes)) if rank not in values]:
        connection.wait([processes[rank].sentinel for rank in missing], timeout=0.05)
        # Looked at before the files: what is gone, or late, may have written its answer.
        late = time.monotonic() > deadline
        dead = [rank for rank in missing if processes[rank].exitcode is not None]
        for rank in missing:
            if (folder / f"error-{rank}").exists():
                raise RankError(_cause(processes, folder, rank))
            if (answer := folder / f"answer-{rank}").exists():
                what = f"what rank {rank} returned cannot be unpickled here"
                values[rank] = _read(answer, what)
        if dead := [rank for rank in dead if rank not in values]:
            raise RankError(_death(processes, folder, dead))
        missing = [rank for rank in missing if rank not in values]
        if late and missing:
            raise TimeoutError(
                f"ranks {missing} of {len(processes)} had not finished after {timeout:g} s; "
                f"all were stopped. Give more time with timeout=."
            )
    return [values[rank] for rank in range(len(processes))]


def _read(path: Path, what: str) -> Any:
    with path.open("rb") as file, _pickling(what):
        return pickle.load(file)


def _cause(processes: list[Any], folder: Path, rank: int) -> str:
    """The error, after any death: a rank that dies makes its peers fail, so it is the cause."""
    # The connections of a process close just before its end can be seen.
    time.sleep(0.2)
    # Looked at before the files: a rank that is gone may have left its answer there.
    gone = [r for r, process in enumerate(processes) if process.exitcode is not None]
    told = {r for r in gone for x in ("answer", "error") if (folder / f"{x}-{r}").exists()}
    dead = [r for r in gone if r not in told]
    cause = _death(processes, folder, dead) + "\n" if dead else ""
    error = _read(folder / f"error-{rank}", "")
    return f"{cause}rank {rank} of {len(processes)} failed:\n{error}"


def _death(processes: list[Any], folder: Path, dead: list[int]) -> str:
    codes = ", ".join(f"rank {rank} with exit code {processes[rank].exitcode}" for rank in dead)
    message = f"died without an answer: {codes} (negative: the number of a signal)."
    if not any((folder / f"begun-{rank}").exists() for rank in dead):
        message += (
            " The function was not reached; what was printed before says why. A script that calls "
            'run_ranks needs `if __name__ == "__main__":` around the call, as ranks import it.'
        )
    return message


def _rank_main(rank: int, world_size: int, folder: Path, timeout: float, threads: int) -> None:
    """A rank's process. It ends when the parent kills it, or has ended.

    The process leads a new process group, so that its children can be ended with it.
    """
    os.setpgid(0, 0)
    for number in _ENDING:
        signal.signal(number, _leave_to_the_parent)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    parent = multiprocessing.parent_process()
    assert parent is not None
    if not parent.is_alive():  # killed while this rank started
        _end_without(parent, folder)
    threading.Thread(target=_end_without, args=(parent, folder), daemon=True).start()
    (folder / f"begun-{rank}").touch()
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        dist.init_process_group(
            "gloo",
            # Not as a URL: PyTorch does not decode the %20 of a folder's name (2.13, Linux).
            store=dist.FileStore(  # pyright: ignore[reportPrivateImportUsage]
                str(folder / "store"), world_size
            ),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        while not (folder / "task").exists():
            time.sleep(0.01)
        fn, args = _read(folder / "task", "a rank cannot load the function and its arguments")
        _answer(folder / f"answer-{rank}", fn(rank, *args))
    except Exception:
        _answer(folder / f"error-{rank}", traceback.format_exc())
    # A rank that leaves breaks the connections of its peers, which may still need them.
    threading.Event().wait()


def _leave_to_the_parent(number: int, frame: Any) -> None:
    """A signal handler and not SIG_IGN, which programs that a rank starts would inherit."""


def _end_without(parent: Any, folder: Path) -> None:
    """Waits for the end of the parent, removes the folder that it left behind, and ends."""
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def _answer(path: Path, value: Any) -> None:
    for stream in (sys.stdout, sys.stderr):  # no exit will do it
        with contextlib.suppress(Exception):
            stream.flush()
    _write(path, value, "what it returned cannot be pickled")
