"""Trains a decoder on long rows of packed documents, byte by byte, on a data x seq mesh.

    python examples/train_long_context.py --degree 4 --tokens 4096
    python examples/train_long_context.py --attention exact --folder run   # again: goes on
    python examples/train_long_context.py my_book.txt my_code/*.py

Reads the files named, or Python's own library. On a machine without accelerators it simulates
devices; on GPUs and TPUs it is the same command. On several processes start it once on each, with
`--coordinator HOST:PORT --processes N --process I`. Needs the extra "training".
"""

import hashlib
import itertools
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_seqpar import MeshLayout, blockwise_attention, exact_attention
from jax_seqpar.training import TokenLayout, digest_arrays, pack_documents

ATTENTION = {"auto": None, "blockwise": blockwise_attention, "exact": exact_attention}
LAYOUT = MeshLayout(batch="data", tokens="seq")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
OnStep = Callable[[int, float], None]


@dataclass(frozen=True)
class Run:
    """One training of a text: what its losses depend on, and how it is spread."""

    degree: int = 4
    data: int = 1
    tokens: int = 4096
    batch: int = 2
    steps: int = 100
    learning_rate: float = 1e-3
    attention: str = "auto"
    fsdp: bool = False
    tiles: int = 1
    seed: int = 0
    save_every: int = 20


@dataclass(frozen=True)
class Text:
    """Packed documents: rows of bytes, and which document each byte is of."""

    rows: np.ndarray
    segments: np.ndarray

    def batch(self, run: Run, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a step: a function of seed and step, so a resumed run sees the same."""
        order = np.random.default_rng((run.seed, step)).choice(len(self.rows), run.batch)
        return self.rows[order], self.segments[order]


def read(files: Sequence[Path], tokens: int, limit: int = 8 << 20) -> Text:
    """Files as documents, in rows of `tokens` bytes; of Python's library at most `limit` bytes."""
    if files:
        limit = sum(file.stat().st_size for file in files)
    else:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
    documents, size = [], 0
    for file in files:
        document = np.frombuffer(file.read_bytes()[: limit - size], np.uint8)
        documents.append(document)
        size += len(document)
    rows, segments = pack_documents(documents, tokens)
    if not len(rows):
        raise ValueError(f"no bytes in {len(files)} files: name files with text in them.")
    return Text(rows, segments)


def train(
    run: Run, text: Text, config: Config, folder: Path | None = None, on_step: OnStep | None = None
) -> list[float]:
    """The loss of each step.

    Args:
      folder: of checkpoints, absolute; what is there is resumed, at whatever degree it was written.
      on_step: called after each step with its number and loss.
    """
    devices = jax.devices()[: run.degree * run.data]
    mesh = jax.make_mesh((run.data, run.degree), ("data", "seq"), devices=devices)
    sharding = FSDP if run.fsdp else {}  # letters without an axis stay whole
    place = Placement(LAYOUT, ATTENTION[run.attention], sharding=sharding, tiles=run.tiles)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(run.learning_rate / 10, run.learning_rate, 10)),
    )
    with jax.set_mesh(mesh):
        graph, state = _initial(config, place, optimizer, mesh, run.seed)
        decides = _decides(run, text, config)
        state, losses = _resumed(folder, state, decides)
        if len(losses) > run.steps:
            raise ValueError(
                f"{folder} holds a training of {len(losses)} steps, and {run.steps} were asked "
                f"for. Ask for more, or give another folder."
            )

        @jax.jit
        def update(state: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, moments = state
            loss, grads = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch))(params)
            updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        layout = TokenLayout(mesh, LAYOUT)
        with _checkpoints(folder, run.save_every) as checkpoints:
            for step in range(len(losses), run.steps):
                rows, segments = text.batch(run, step)
                state, loss = update(state, layout.shard(rows, segment_ids=segments))
                losses.append(float(loss))
                if on_step:
                    on_step(step, losses[-1])
                last = step + 1 == run.steps
                if checkpoints is not None and (last or checkpoints.should_save(step)):
                    items = {
                        "state": ocp.args.StandardSave(state),
                        "losses": ocp.args.JsonSave(_record(losses, decides, state)),
                    }
                    checkpoints.save(step, args=ocp.args.Composite(**items), force=last)
    return losses


def _resumed(folder: Path | None, state: Any, of: dict[str, Any]) -> tuple[Any, list[float]]:
    """State and losses of the newest whole checkpoint, sharded as `state`; `state` without one.

    Newer checkpoints that are damaged are moved aside, so that their steps can be saved again.

    Raises:
      ValueError: checkpoints of another training, or of which none is whole.
    """
    if folder is None or not folder.exists():
        return state, []
    damaged: dict[int, str] = {}
    with _reader(folder) as reader:
        for step in sorted(reader.all_steps(), reverse=True):
            try:
                found = _restored(reader, step, state, of)
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


def _restored(
    reader: ocp.CheckpointManager, step: int, state: Any, of: dict[str, Any]
) -> tuple[Any, list[float]]:
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


def _record(losses: list[float], of: dict[str, Any], state: Any) -> dict[str, Any]:
    """What stands beside the state, with digests of the state and of itself."""
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


def _decides(run: Run, text: Text, config: Config) -> dict[str, Any]:
    """What the losses depend on, so that a resumed run has one curve; not how it is spread."""
    names = ("tokens", "batch", "learning_rate", "seed")
    crc = zlib.crc32(text.segments.tobytes(), zlib.crc32(text.rows.tobytes()))
    return {name: getattr(run, name) for name in names} | {"config": str(config), "text": crc}


def _initial(
    config: Config, place: Placement, optimizer: Any, mesh: jax.sharding.Mesh, seed: int
) -> tuple[Any, Any]:
    """The graph of the model, and parameters and moments as they lie on the mesh."""

    def parameters() -> tuple[Any, Any]:
        return nnx.split(Decoder(config, place, rngs=nnx.Rngs(seed)))

    graph, shapes = nnx.eval_shape(parameters)

    def lies(spec: Any) -> NamedSharding:
        return NamedSharding(mesh, spec or PartitionSpec())

    specs = jax.tree.map(
        lies,
        nnx.get_partition_spec(shapes),
        is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
    )
    params = jax.jit(lambda: parameters()[1], out_shardings=specs)()
    return graph, (params, jax.jit(optimizer.init)(params))


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Reads without waiting for other processes, as a file may be damaged for one of them only."""
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(folder, options=options)


@contextmanager
def _checkpoints(folder: Path | None, every: int) -> Iterator[Any]:
    if folder is None:
        yield None
        return
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        yield manager


def plot(curves: dict[str, list[float]], file: Path) -> None:
    """Losses by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    first = next(iter(curves.values()))
    for i, (label, losses) in enumerate(curves.items()):
        # Every step has another text: its own loss is faint, the mean of the last ten is the line.
        axes.plot(losses, color=f"C{i}", alpha=0.15, linewidth=0.8)
        means = [
            sum(last) / len(last)
            for last in (losses[max(0, j - 9) : j + 1] for j in range(len(losses)))
        ]
        # Curves that coincide with the first show as dashes on it.
        coincides = i > 0 and np.allclose(losses, first, atol=1e-2)
        dashes: Any = (4 * i, (4, 4 * len(curves))) if coincides else "-"
        axes.plot(means, color=f"C{i}", label=label, linestyle=dashes)
    axes.set(xlabel="step", ylabel="loss in nats per byte")
    axes.legend(frameon=False, handlelength=7)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


PATIENCE = 30.0  # seconds without a sign of life, well beyond a pause of the coordinator


def _watch(process: int, processes: int) -> None:
    """Ends this process, in words, where another one shows no sign of life.

    Collectives wait for ever for a process that is stopped, and JAX ends the others of a killed one
    after 85 seconds, without a word of resuming. Every process counts in the coordinator's store.
    """
    client: Any = distributed.global_state.client
    counts: dict[int, str] = {}
    alive = dict.fromkeys(range(processes), time.monotonic())

    def count() -> None:
        for beat in itertools.count():
            # The store fails and waits where the coordinator does: then nobody's count goes on.
            with suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(f"alive/{process}", str(beat), allow_overwrite=True)
                for other in alive:
                    found = client.key_value_try_get(f"alive/{other}")
                    if counts.get(other) != found:
                        counts[other], alive[other] = found, time.monotonic()
            time.sleep(1)

    def watch() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - min(alive.values()) > PATIENCE:
                _lost(f"another process has shown no sign of life for {PATIENCE:g} s")

    for loop in (count, watch):
        threading.Thread(target=loop, daemon=True).start()


def _lost(why: str) -> NoReturn:
    print(
        f"Stopped: {why}. Start every process again with the same --folder: "
        f"training goes on from its last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    # Not sys.exit: JAX would wait at exit for the process that is lost.
    os._exit(1)


@app.command()
def main(
    files: Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False)] = None,
    degree: Annotated[int, typer.Option(min=1, help="Devices that share the tokens.")] = 4,
    data: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Of each row.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 2,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    learning_rate: float = 1e-3,
    attention: Annotated[str, typer.Option(help=", ".join(ATTENTION))] = "auto",
    fsdp: Annotated[bool, typer.Option(help="Share the parameters, too.")] = False,
    tiles: Annotated[int, typer.Option(min=1, help="In MLP and loss, to save memory.")] = 1,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    features: Annotated[int, typer.Option(min=8)] = 128,
    folder: Annotated[Path | None, typer.Option(help="Of checkpoints and the plot.")] = None,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0.")] = None,
    processes: int = 1,
    process: int = 0,
) -> None:
    """Trains a decoder on bytes; resumes what the folder holds."""
    if attention not in ATTENTION:
        raise typer.BadParameter(f"attention must be one of {', '.join(ATTENTION)}.")
    with suppress(RuntimeError):  # JAX runs already, with the devices it has
        # Of the CPU only, if that is all there is.
        jax.config.update("jax_num_cpu_devices", -(-degree * data // processes))
    if coordinator is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, processes, process)
        _watch(process, processes)
    if len(jax.devices()) < degree * data:
        raise typer.BadParameter(
            f"degree {degree} x data {data} needs {degree * data} devices, here are "
            f"{len(jax.devices())}."
        )
    run = Run(degree, data, tokens, batch, steps, learning_rate, attention, fsdp, tiles)
    config = Config(features=features, hidden=4 * features, layers=layers)
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    fields = (TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),)
    first = process == 0
    try:
        text = read(files or [], tokens)
        with Progress(*columns, *fields, disable=not first) as progress:
            bar = progress.add_task("", total=steps, loss=float("nan"), speed=0.0)
            last = time.perf_counter()

            def on_step(step: int, loss: float) -> None:
                nonlocal last
                now = time.perf_counter()
                speed = batch * tokens / (now - last)
                last = now
                progress.update(bar, completed=step + 1, loss=loss, speed=speed)

            losses = train(run, text, config, folder and folder.absolute() / "steps", on_step)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except jax.errors.JaxRuntimeError as error:
        if processes == 1:
            raise
        _lost(f"a collective failed, as when another process dies ({str(error).splitlines()[0]})")
    if first:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
        if folder is not None:
            (folder / "losses.json").write_text(json.dumps(losses))
            plot({f"degree {degree}, {attention}": losses}, folder / "loss.png")


if __name__ == "__main__":
    app()
