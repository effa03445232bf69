"""Runs a function on PyTorch ranks, each a process of its own, and brings everything back."""

import contextlib
import datetime
import pickle
import queue as queues
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .extras import require_torch


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
      wide unsigned tensors do not survive: return those as NumPy arrays.

    Raises:
      RankError: a rank raised or died.
      TimeoutError: not done in time; the message names the ranks that had not finished.

    No process is left when it returns or raises.
    """
    require_torch()
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    answers = context.Queue()
    # Pickled by hand: tensors then travel as bytes, not as memory shared with a process that ends.
    task = pickle.dumps((fn, args))
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="seqpar-") as folder:
        store = (Path(folder) / "store").as_uri()
        try:
            for rank in range(world_size):
                arguments = (rank, world_size, store, timeout, threads, task, answers)
                process = context.Process(target=_rank_main, args=arguments, daemon=True)
                process.start()
                processes.append(process)
            values = _collect(processes, answers, timeout)
            return [values[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()
            answers.close()
            answers.join_thread()


def _collect(processes: list[Any], answers: Any, timeout: float) -> dict[int, Any]:
    deadline = time.monotonic() + timeout
    values: dict[int, Any] = {}
    while len(values) < len(processes):
        missing = [rank for rank in range(len(processes)) if rank not in values]
        # Looked at before the queue: a rank that is gone may have left its answer there.
        dead = [rank for rank in missing if processes[rank].exitcode is not None]
        try:
            rank, payload, error = answers.get(timeout=0.2)
        except queues.Empty:
            if dead:
                raise RankError(_death(processes, dead)) from None
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"ranks {missing} of {len(processes)} had not finished after {timeout:g} s; "
                    f"all were stopped. Give more time with timeout=."
                ) from None
            continue
        if error is not None:
            raise RankError(_cause(processes, answers, values, rank, error))
        values[rank] = pickle.loads(payload)
    return values


def _cause(
    processes: list[Any], answers: Any, values: dict[int, Any], rank: int, error: str
) -> str:
    """The error, after any death: a rank that dies makes its peers fail, so it is the cause."""
    time.sleep(0.2)
    # Looked at before the queue: a rank that is gone may have left its answer there.
    gone = [r for r, process in enumerate(processes) if process.exitcode is not None]
    answered = {rank, *values}
    with contextlib.suppress(queues.Empty):
        while True:
            answered.add(answers.get(timeout=0.5)[0])
    dead = [r for r in gone if r not in answered]
    cause = _death(processes, dead) + "\n" if dead else ""
    return f"{cause}rank {rank} of {len(processes)} failed:\n{error}"


def _death(processes: list[Any], dead: list[int]) -> str:
    codes = ", ".join(f"rank {rank} with exit code {processes[rank].exitcode}" for rank in dead)
    return f"died without an answer: {codes} (negative: the number of a signal)."


def _rank_main(
    rank: int, world_size: int, store: str, timeout: float, threads: int, task: bytes, answers: Any
) -> None:
    import torch
    import torch.distributed as dist

    try:
        torch.set_num_threads(threads)
        dist.init_process_group(
            "gloo",
            init_method=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        fn, args = pickle.loads(task)
        answer = rank, pickle.dumps(fn(rank, *args)), None
        # Nobody leaves while a peer may still be talking to it.
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        answer = rank, None, traceback.format_exc()
    answers.put(answer)
    answers.close()
    answers.join_thread()
