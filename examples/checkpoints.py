"""Checkpoints of a training: verified bit by bit, the newest whole one is resumed.

What is saved beside the state is its losses, the options that they depend on, and a digest of each
array. A checkpoint that cannot be read, or whose bits are others, is moved aside.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jax_seqpar.training import digest_arrays


def resumed(folder: Path | None, state: Any, of: dict[str, Any]) -> tuple[Any, list[float]]:
    """State and losses of the newest whole checkpoint, sharded as `state`; `state` without one.

    Newer checkpoints that are damaged are moved aside, so that their steps can be saved again.

    Raises:
      ValueError: checkpoints of another training, or of which none is whole.
    """
    if folder is None or not folder.exists():
        return state, []
    damaged: dict[int, str] = {}
    with reader_of(folder) as reader:
        for step in sorted(reader.all_steps(), reverse=True):
            try:
                found = restored(reader, step, state, of)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            _move_aside(folder, damaged, f"Resuming after step {step}")
            return found
    if damaged:
        raise ValueError(
            f"No checkpoint in {folder} is whole: "
            + "; ".join(f"step {step} is damaged ({cause})" for step, cause in damaged.items())
            + ". Give another folder to start anew."
        )
    return state, []


class DamagedError(Exception):
    """A checkpoint that cannot be read, or that differs from what was saved."""


def restored(
    reader: ocp.CheckpointManager, step: int, state: Any, of: dict[str, Any]
) -> tuple[Any, list[float]]:
    """State and losses of one checkpoint.

    Raises:
      DamagedError: for one that cannot be read, or has other bits than were saved.
      ValueError: for one of another training.
    """
    # Before the state, whose shapes another model does not have.
    record = _read(reader, step, losses=ocp.args.JsonRestore())
    _agree(_record_problem(record, step))
    if record["of"] != of:
        raise ValueError(
            f"{reader.directory} holds a training of {record['of']}, not of {of}. "
            f"Give another folder."
        )
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    state = _read(reader, step, state=ocp.args.StandardRestore(shapes))
    digests = digest_arrays(state)
    if differing := [path for path, x in record["digests"].items() if digests.get(path) != x]:
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise DamagedError(f"other bits than were saved in array {differing[0]}{more}")
    return state, record["losses"]


def _read(reader: ocp.CheckpointManager, step: int, **item: Any) -> Any:
    """One item of a checkpoint."""
    (name,) = item
    found, problem = None, None
    # Files that are damaged raise whatever they meet in Orbax, TensorStore and JSON.
    try:
        found = reader.restore(step, args=ocp.args.Composite(**item))[name]
    except Exception as error:
        reason = (str(error).strip() or "no reason").splitlines()[0]
        problem = f"{name} cannot be read, {type(error).__name__}: {reason[:200]}"
    _agree(problem)
    return found


def _agree(problem: str | None) -> None:
    """Raises DamagedError on every process if any of them has a problem."""
    if multihost_utils.process_allgather(np.array(problem is not None)).any():
        raise DamagedError(problem or "another process could not read it")


def record_of(losses: list[float], of: dict[str, Any], state: Any) -> dict[str, Any]:
    """The record that stands beside the state, with digests of the state and of itself."""
    record = {"losses": losses[:], "of": of, "digests": digest_arrays(state)}
    return record | {"digest": _digest(record)}


def _record_problem(record: Any, step: int) -> str | None:
    if not isinstance(record, dict) or "digest" not in record:
        return "its losses have no digest"
    if record["digest"] != _digest({k: x for k, x in record.items() if k != "digest"}):
        return "losses other than were saved"
    if len(record["losses"]) != step + 1:
        return f"it holds {len(record['losses'])} losses, so it is of another step"
    return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _move_aside(folder: Path, damaged: dict[int, str], then: str) -> None:
    if jax.process_index() == 0:
        for step, cause in damaged.items():
            aside = folder / f"damaged-{step}-{time.time_ns()}"
            (folder / str(step)).rename(aside)
            print(f"Step {step} is damaged ({cause}), moved to {aside}. {then}.", file=sys.stderr)
    # Before any process lists the folder again.
    multihost_utils.sync_global_devices("damaged checkpoints are moved aside")


def reader_of(folder: Path) -> ocp.CheckpointManager:
    """A checkpointer that does not wait for others: a file may be damaged for one process only."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options)


@contextmanager
def checkpoints_in(folder: Path | None, every: int) -> Iterator[Any]:
    """A manager that saves every so many steps into the folder; None without a folder."""
    if folder is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield manager
