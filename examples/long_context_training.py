"""Training of a decoder on packed documents, on a data x seq mesh, resumed where it was left."""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from checkpoints import checkpoints_in, record_of, resumed
from decoder import FSDP, Config, Decoder, Placement
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

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
