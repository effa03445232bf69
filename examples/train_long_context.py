"""Trains a decoder on long rows of packed documents, byte by byte, on a data x seq mesh.

    python examples/train_long_context.py --degree 4 --tokens 4096
    python examples/train_long_context.py --exact --folder run   # again: goes on, to the same bits
    python examples/train_long_context.py my_book.txt my_code/*.py

The default 100 steps take over five minutes on two cores; try --steps 10 --tokens 1024 --batch 1.
Reads the files named, or Python's own library. On a machine without accelerators it simulates
devices; on GPUs and TPUs it is the same command. Several processes, started as
`examples/launch/README.md` says, need `--distributed`, or else `--coordinator HOST:PORT
--processes N --process I`. SIGTERM to any of them saves and leaves, with exit status 75.
Needs the extra "training".
"""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from checkpoints import checkpoints_in, record_of, resumed
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from loss_plot import plot
from processes import PREEMPTED, because, lost, preemption, start
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_seqpar import (
    AllGatherKV,
    Contiguous,
    MeshLayout,
    Ring,
    Striped,
    Ulysses,
    Zigzag,
    blockwise_attention,
    exact_attention,
)
from jax_seqpar.exact.clip import clip_by_global_norm
from jax_seqpar.exact.optimizer import adamw
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.training import TokenLayout, pack_documents

ATTENTION = {"auto": None, "blockwise": blockwise_attention, "exact": exact_attention}
STRATEGY: dict[str, Any] = {
    "ulysses": Ulysses(),
    "ring": Ring(),
    "ring-bidirectional": Ring(bidirectional=True),
    "all-gather": AllGatherKV(),
    "auto": "auto",
}
ORDER = {"contiguous": Contiguous(), "zigzag": Zigzag(), "striped": Striped()}

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
    strategy: str = "ulysses"
    order: str = "contiguous"
    fsdp: bool = False
    tiles: int = 1
    offload: bool = False
    seed: int = 0
    save_every: int = 20
    exact: bool = False


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
    run: Run,
    text: Text,
    config: Config,
    folder: Path | None = None,
    on_step: OnStep | None = None,
    leave: Callable[[int], bool] = lambda step: False,
) -> list[float]:
    """Trains, and returns the loss of each step that was made.

    Args:
      folder: of checkpoints, absolute; the newest is resumed, at whatever degree it was written.
      on_step: called after each step with its number and loss.
      leave: called after each step with its number: whether to save it and make no other.
    """
    devices = jax.devices()[: run.degree * run.data]
    mesh = jax.make_mesh((run.data, run.degree), ("data", "seq"), devices=devices)
    sharding = FSDP if run.fsdp else {}  # letters without an axis stay whole
    layout = MeshLayout(batch="data", tokens="seq", order=ORDER[run.order])
    place = Placement(
        layout,
        ATTENTION[run.attention],
        strategy=STRATEGY[run.strategy],
        sharding=sharding,
        tiles=run.tiles,
        remat=run.offload,
        offload=run.offload,
        arithmetic=ExactArithmetic() if run.exact else Arithmetic(),
    )
    optimizer = _optimizer(run)
    with jax.set_mesh(mesh):
        graph, state = _initial(config, place, optimizer, mesh, run.seed)
        decides = _decides(run, text, config)
        state, losses = resumed(folder, state, decides)
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

        on_mesh = TokenLayout(layout.on(mesh))
        with checkpoints_in(folder, run.save_every) as checkpoints:
            for step in range(len(losses), run.steps):
                rows, segments = text.batch(run, step)
                state, loss = update(state, on_mesh.shard(rows, segment_ids=segments))
                losses.append(float(loss))
                if on_step:
                    on_step(step, losses[-1])
                last = leave(step) or step + 1 == run.steps
                if checkpoints is not None and (last or checkpoints.should_save(step)):
                    items = {
                        "state": ocp.args.StandardSave(state),
                        "losses": ocp.args.JsonSave(record_of(losses, decides, state)),
                    }
                    checkpoints.save(step, args=ocp.args.Composite(**items), force=last)
                if last:
                    break
    return losses


def _optimizer(run: Run) -> optax.GradientTransformation:
    """AdamW of clipped gradients, with ten steps of warming up."""
    first, rate = run.learning_rate / 10, run.learning_rate
    if not run.exact:
        adam = optax.adamw(optax.linear_schedule(first, rate, 10))
        return optax.chain(optax.clip_by_global_norm(1.0), adam)
    # Rates of the host: XLA rounds the schedule of Optax in one way or another, by its flags.
    rates = np.linspace(first, rate, 11).astype(np.float32)
    adam = adamw(lambda step: jax.numpy.asarray(rates)[step.clip(max=10)], weight_decay=1e-4)
    return optax.chain(clip_by_global_norm(1.0), adam)


def _decides(run: Run, text: Text, config: Config) -> dict[str, Any]:
    """The options that the losses depend on, which a resumed run must share; not its mesh."""
    names = ("tokens", "batch", "learning_rate", "seed", "exact")
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
    strategy: Annotated[str, typer.Option(help=", ".join(STRATEGY))] = "ulysses",
    order: Annotated[str, typer.Option(help="Of the tokens: " + ", ".join(ORDER))] = "contiguous",
    fsdp: Annotated[bool, typer.Option(help="Share the parameters, too.")] = False,
    exact: Annotated[bool, typer.Option(help="The same bits on any mesh and processes.")] = False,
    tiles: Annotated[int, typer.Option(min=1, help="In MLP and loss, to save memory.")] = 1,
    offload: Annotated[bool, typer.Option(help="Inputs of layers to the host's memory.")] = False,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    features: Annotated[int, typer.Option(min=8)] = 128,
    folder: Annotated[Path | None, typer.Option(help="Of checkpoints and the plot.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0.")] = None,
    processes: int = 1,
    process: int = 0,
    distributed: Annotated[bool, typer.Option(help="Ask SLURM, GKE, a TPU or Open MPI.")] = False,
    start_within: Annotated[float, typer.Option(help="Seconds for all processes to come.")] = 50,
    patience: Annotated[float, typer.Option(help="Seconds without a sign of life of one.")] = 30,
) -> None:
    """Trains a decoder on bytes; resumes what the folder holds."""
    for name, chosen, known in (
        ("attention", attention, ATTENTION),
        ("strategy", strategy, STRATEGY),
        ("order", order, ORDER),
    ):
        if chosen not in known:
            raise typer.BadParameter(f"{name} must be one of {', '.join(known)}, got {chosen!r}.")
    unit = math.lcm(2 * Config.heads, data if fsdp else 1)
    if features % unit:
        shared = f", which the {data} devices of --data share" if fsdp else ""
        raise typer.BadParameter(
            f"--features {features} is not a multiple of {unit}: {Config.heads} heads with an even "
            f"number of channels each{shared}. Write --features {-(-features // unit) * unit}."
        )
    if (processes > 1 or process) and coordinator is None:
        raise typer.BadParameter("several processes need --coordinator HOST:PORT of process 0.")
    if not 0 <= process < processes:
        raise typer.BadParameter(f"--process is from 0 to {processes - 1}, got {process}.")
    if distributed and coordinator is not None:
        raise typer.BadParameter(f"--distributed finds the coordinator: leave out {coordinator!r}.")
    if distributed or coordinator is not None:
        told: Any = () if distributed else (coordinator, processes, process)
        try:
            processes = start(*told, start_within=start_within, patience=patience)
        except ValueError as error:
            raise typer.BadParameter(
                f"--distributed finds no engine ({error}) Give --coordinator, --processes and "
                f"--process instead."
            ) from None
    with suppress(RuntimeError):  # JAX runs already, with the devices it has
        # Simulated devices, which JAX makes of a CPU only.
        jax.config.update("jax_num_cpu_devices", -(-degree * data // processes))
    if len(jax.devices()) < degree * data:
        raise typer.BadParameter(
            f"degree {degree} x data {data} needs {degree * data} devices, here are "
            f"{len(jax.devices())}."
        )
    run = Run(
        *(degree, data, tokens, batch, steps, learning_rate),
        attention=attention,
        strategy=strategy,
        order=order,
        fsdp=fsdp,
        tiles=tiles,
        offload=offload,
        save_every=save_every,
        exact=exact,
    )
    config = Config(features=features, hidden=4 * features, layers=layers)
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    fields = (TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),)
    first = jax.process_index() == 0
    try:
        text = read(files or [], tokens)
        bars = Progress(*columns, *fields, disable=not first)
        with preemption() as leave, bars as progress:
            bar = progress.add_task("", total=steps, loss=float("nan"), speed=0.0)
            last = time.perf_counter()

            def on_step(step: int, loss: float) -> None:
                nonlocal last
                now = time.perf_counter()
                speed = batch * tokens / (now - last)
                last = now
                progress.update(bar, completed=step + 1, loss=loss, speed=speed)
                # Where nobody sees a bar, in a pipe or a file, a line each few steps.
                if first and not progress.console.is_terminal and step % 5 == 0:
                    print(f"step {step + 1} of {steps}: loss {loss:.4f}", flush=True)

            kept = folder and folder.absolute() / "steps"
            losses = train(run, text, config, kept, on_step, leave)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except Exception as error:
        if processes == 1:
            raise
        lost(because(error))
    if len(losses) < steps:
        saved = (
            "saved: start again with the same --folder" if folder else "not saved without --folder"
        )
        print(f"SIGTERM after step {len(losses)} of {steps}, {saved}.", file=sys.stderr)
        raise typer.Exit(PREEMPTED)
    if first:
        print(f"loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
        if folder is not None:
            (folder / "losses.json").write_text(json.dumps(losses))
            plot({f"degree {degree}, {attention}": losses}, folder / "loss.png")


if __name__ == "__main__":
    app()
