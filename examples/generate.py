"""Trains a small decoder on bytes, saves it, and writes on from prompts of different length.

    python examples/generate.py                                  # half a minute on two cores
    python examples/generate.py --prompt "def " --prompt "import os, " --temperature 0.8
    python examples/generate.py --exact --new 32                 # the trainer's bits, see below
    python examples/generate.py --folder run                     # again: goes on from what is saved

The prompts are one batch. They are read by the strategy of the training, and each device keeps the
keys and values of its tokens (`jax_seqpar.decoding`); then all rows write token by token. With
--exact what a device computes has the same bits on any mesh, so that the log-probabilities of the
tokens that were drawn are those that a training step finds for them: the command compares both.
Needs the extra "training".
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from decoder import Config, Decoder, Placement
from flax import nnx
from jax.sharding import PartitionSpec
from long_context_training import read
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table
from rich.text import Text

from jax_seqpar import MeshLayout
from jax_seqpar.flax import Arithmetic, ExactArithmetic
from jax_seqpar.training import TokenLayout

CONFIG = Config(features=64, hidden=176, layers=2, heads=4, kv_heads=2)
PROMPTS = ["def main(", "import ", 'class Reader:\n    """', "    return "]
PADDING = 0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Sampler:
    """Draws tokens of a decoder for a batch of prompts.

    Args:
      new: tokens that each row is given.
      temperature: 0 takes the most probable token.
    """

    new: int
    temperature: float = 0.0
    seed: int = 0

    def draw(self, logits: jax.Array, position: jax.Array) -> jax.Array:
        """`[B]` from `[B, V]`: a function of the row's logits, its position and the seed."""
        if self.temperature == 0:
            return logits.argmax(-1).astype(jnp.int32)
        rows, fold = jnp.arange(logits.shape[0]), jax.random.fold_in
        key = jax.random.key(self.seed)
        keys = jax.vmap(lambda row, at: fold(fold(key, row), at))(rows, position)
        drawn = jax.vmap(jax.random.categorical)(keys, logits / self.temperature)
        return drawn.astype(jnp.int32)

    def sample(
        self, model: Decoder, prompts: Sequence[bytes], mesh: jax.sharding.Mesh
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The next token of each row `[B]`, and its log-probability, step after step."""
        arithmetic, degree = model.place.arithmetic, mesh.shape["seq"]
        lengths = np.array([len(x) for x in prompts], np.int32)
        size = -(-max(lengths) // degree) * degree
        padded = np.full((len(prompts), size), PADDING, np.int32)
        for row, prompt in zip(padded, prompts, strict=True):
            row[: len(prompt)] = np.frombuffer(prompt, np.uint8)
        for block in model.blocks:
            block.attention.init_cache(len(prompts), size + self.new, shared_by="sequence")
        graph, params, cache = nnx.split(model, nnx.Param, ...)

        def forward(params: Any, cache: Any, tokens: Any, **decoding: Any) -> tuple[Any, Any]:
            model = nnx.merge(graph, params, cache)
            logits = model(tokens, **decoding)
            return logits, nnx.split(model, nnx.Param, ...)[2]

        @jax.jit
        def prefill(params: Any, cache: Any, tokens: Any, lengths: Any) -> Any:
            logits, cache = forward(params, cache, tokens, fill_cache=True, lengths=lengths)
            # The last token of each row; a sum of one number and zeros, as tokens are sharded.
            is_last = jnp.arange(tokens.shape[1])[None] == lengths[:, None] - 1
            return jnp.where(is_last[..., None], logits, 0).sum(1), cache

        @jax.jit
        def draw(logits: Any, position: Any) -> Any:
            token = self.draw(logits, position)
            found = arithmetic.log_probabilities(logits[:, None], token[:, None])
            return token, found[:, 0]

        def step(params: Any, cache: Any, token: Any) -> Any:
            logits, cache = forward(params, cache, token[:, None], decode=True)
            return logits[:, 0], cache

        tokens = jax.device_put(padded, PartitionSpec(None, "seq"))
        logits, cache = prefill(params, cache, tokens, lengths)
        step = jax.jit(step, donate_argnums=1)  # so that the cache is updated in place
        for i in range(self.new):
            token, found = draw(logits, lengths + i)
            yield np.asarray(token), np.asarray(found)
            if i + 1 < self.new:
                logits, cache = step(params, cache, token)


def trained(
    model: Decoder, mesh: jax.sharding.Mesh, files: Sequence[Path], steps: int, folder: Path | None
) -> Decoder:
    """The decoder after so many steps, or as the folder holds it."""
    graph, params = nnx.split(model)
    saved = None if folder is None else folder.absolute() / "weights"
    # optax takes powers of a Python float by an int32, which strict promotion forbids.
    with ocp.StandardCheckpointer() as checkpointer, jax.numpy_dtype_promotion("standard"):
        if saved is not None and saved.exists():
            return nnx.merge(graph, checkpointer.restore(saved, params))
        text = read(files, 256, limit=1 << 20)
        tx = optax.adam(3e-3)
        state, layout = tx.init(params), TokenLayout(model.place.layout.on(mesh))

        @jax.jit
        def update(params: Any, state: Any, batch: Any) -> Any:
            loss, gradient = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(batch))(params)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        order = np.random.default_rng(0)
        for _ in track(range(steps), "training"):
            rows = order.choice(len(text.rows), 8)
            batch = layout.shard(text.rows[rows], segment_ids=text.segments[rows])
            params, state, _ = update(params, state, batch)
        if saved is not None:
            checkpointer.save(saved, params)
    return nnx.merge(graph, params)


def policy(model: Decoder, rows: Sequence[bytes], degree: int) -> list[np.ndarray]:
    """The log-probability of each byte but the first, as a training step finds it."""
    size = -(-max(map(len, rows)) // degree) * degree
    tokens = np.full((len(rows), size), PADDING, np.int32)
    for row, written in zip(tokens, rows, strict=True):
        row[: len(written)] = np.frombuffer(written, np.uint8)
    labels = np.roll(tokens, -1, axis=1)

    @nnx.jit
    def forward(model: Decoder, tokens: Any, labels: Any) -> Any:
        return model.place.arithmetic.log_probabilities(model(tokens), labels)

    sharded = (jax.device_put(x, PartitionSpec(None, "seq")) for x in (tokens, labels))
    found = np.asarray(forward(model, *sharded))
    return [x[: len(row) - 1] for x, row in zip(found, rows, strict=True)]


def _table(prompts: Sequence[bytes], written: Sequence[bytearray]) -> Table:
    """The rows so far, prompts in bold."""
    table = Table(box=box.HORIZONTALS, show_header=False, show_lines=True)
    for start, row in zip(prompts, written, strict=True):
        rest = bytes(row[len(start) :]).decode(errors="replace")
        table.add_row(Text.assemble((start.decode(), "bold"), rest))
    return table


@app.command()
def main(
    files: Annotated[list[Path] | None, typer.Argument(exists=True, dir_okay=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Of a row; may be repeated.")] = None,
    new: Annotated[int, typer.Option(min=1, help="Bytes to write in each row.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: int = 0,
    degree: Annotated[int, typer.Option(min=1, help="Devices that share the tokens.")] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Of training.")] = 200,
    exact: Annotated[bool, typer.Option(help="Arithmetic with the same bits anywhere.")] = False,
    folder: Annotated[Path | None, typer.Option(help="To save the weights, and find them.")] = None,
) -> None:
    """Trains, saves, and writes on from prompts."""
    console = Console()
    prompts = [x.encode() for x in prompt or PROMPTS]
    if not all(prompts):
        raise typer.BadParameter("a prompt has no byte. Write one at least.")
    with suppress(RuntimeError):  # JAX runs already, with the devices it has
        jax.config.update("jax_num_cpu_devices", degree)
    if len(jax.devices()) < degree:
        raise typer.BadParameter(
            f"degree {degree} needs as many devices, here are {len(jax.devices())}."
        )
    mesh = jax.make_mesh((degree,), ("seq",), devices=jax.devices()[:degree])
    place = Placement(
        MeshLayout(), arithmetic=ExactArithmetic() if exact else Arithmetic(), sharding={}
    )
    with jax.set_mesh(mesh):
        model = trained(Decoder(CONFIG, place, rngs=nnx.Rngs(0)), mesh, files or [], steps, folder)
        written, found, times = [bytearray(x) for x in prompts], [], [time.perf_counter()]
        sampler = Sampler(new, temperature, seed)
        steps_of = sampler.sample(model, prompts, mesh)
        with console.status("reading the prompts"):
            first = next(steps_of)
        with Live(_table(prompts, written), console=console, refresh_per_second=20) as live:
            for tokens, probabilities in chain([first], steps_of):
                for row, token in zip(written, tokens, strict=True):
                    row.append(token)
                found.append(probabilities)
                times.append(time.perf_counter())
                live.update(_table(prompts, written))
        console.line()
        console.print(f"prompts read in {times[1] - times[0]:.1f} s, compilation included")
        if new > 2:  # the first step compiles
            speed = len(prompts) * (new - 2) / (times[-1] - times[2])
            console.print(f"then {speed:,.0f} bytes a second in {len(prompts)} rows")
        again = policy(model, [bytes(x) for x in written], degree)
        drawn = np.stack(found, 1)
        pairs = [(a, b[len(b) - new :]) for a, b in zip(drawn, again, strict=True)]
        apart = sum((a.view(np.int32) != b.view(np.int32)).sum() for a, b in pairs)
        worst = max(np.abs(a - b).max() for a, b in pairs)
        console.print(
            f"log-probabilities of the {drawn.size} bytes drawn: the training forward gives "
            f"{apart} other numbers, at most {worst:.1e} away."
        )


if __name__ == "__main__":
    app()
