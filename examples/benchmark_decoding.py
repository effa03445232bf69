"""A decoding step against one cache, shared in four ways: what it sends, holds and takes.

    python examples/benchmark_decoding.py
    python examples/benchmark_decoding.py --tokens 65536 --kv-heads 2 --json results.json

One token of each row is appended and attended to; the cache is donated. `along the tokens` is
`jax_seqpar.decoding`. `by heads` is the same cache with its heads shared, which needs as many KV
heads as devices. `left to the compiler` is `jax.nn.dot_product_attention` of a cache that is
sharded along the tokens, and `all-gather` the same of a cache that is gathered first. Sent: bytes
that a device receives in the compiled program. Held: temporaries, beside the cache. Ratio: medians
of the seconds over those of one device, row by row in turns. The devices are simulated and share
the cores, so a ratio of 1 says that sharing adds no work.
"""

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from benchmark_tools import console, show, timer
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import Progress

from jax_seqpar import MeshLayout
from jax_seqpar.decoding import KeyValueCache, attend_to_cache
from jax_seqpar.plan import plan

COLUMNS = {
    "what": "cache",
    "degree": "degree",
    "collectives": "collectives",
    "sent": "sent\nkB",
    "held": "held\nkB",
    "ms": "step\nms",
    "ratio": "\nratio",
}
DEGREES = (2, 4, 8)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def cached(cache: KeyValueCache, position: Any, query: Any, key: Any, value: Any) -> Any:
    """A step of `jax_seqpar.decoding`."""
    positions = jnp.broadcast_to(position, query.shape[:2])
    cache = cache.append(key, value, positions)
    return attend_to_cache(query, cache, positions=positions), cache


def plain(cache: Any, position: Any, query: Any, key: Any, value: Any, *, gather: bool) -> Any:
    """A step of `jax.nn` against a cache of arrays."""
    cache = [
        jax.lax.dynamic_update_slice_in_dim(x, new, position, axis=1)
        for x, new in zip(cache, (key, value), strict=True)
    ]
    whole = PartitionSpec() if gather else PartitionSpec(None, "seq")
    seen = [jax.lax.with_sharding_constraint(x, whole) for x in cache]
    lengths = jnp.broadcast_to(position + 1, query.shape[:1])
    return jax.nn.dot_product_attention(query, *seen, key_value_seq_lengths=lengths), cache


def rows_of(tokens: int, batch: int, heads: int, kv_heads: int, head_dim: int) -> list[Any]:
    """Name, degree, mesh, function, and a new cache, of each row."""
    found: list[Any] = []
    sizes = batch, tokens, kv_heads, head_dim
    for degree in (1, *DEGREES):
        mesh = jax.make_mesh(
            (degree,), ("seq",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:degree]
        )
        on = MeshLayout(mesh=mesh)
        found.append(("along the tokens", degree, mesh, cached, partial(filled, sizes, on)))
        if degree == 1:
            continue
        if kv_heads % degree == 0:
            by_heads = MeshLayout(tokens=None, heads="seq", mesh=mesh)
            found.append(("by heads", degree, mesh, cached, partial(filled, sizes, by_heads)))
        arrays = partial(zeros, sizes, NamedSharding(mesh, on.partition_spec))
        for name, gather in (("left to the compiler", False), ("all-gather", True)):
            found.append((name, degree, mesh, partial(plain, gather=gather), arrays))
    return found


def filled(sizes: tuple[int, ...], layout: MeshLayout) -> KeyValueCache:
    """A cache that holds as many tokens, and has room for those of the steps."""
    batch, tokens, kv_heads, head_dim = sizes
    room = 128 * max(DEGREES)
    cache = KeyValueCache.empty(batch, tokens + room, kv_heads, head_dim, layout=layout)
    key, value = (jnp.zeros(sizes) for _ in range(2))
    return cache.fill(key, value)


def zeros(sizes: tuple[int, ...], sharding: Any) -> list[Any]:
    return [jax.device_put(jnp.zeros(sizes), sharding) for _ in range(2)]


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=8, help="Slots of a row.")] = 32768,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=100)] = 9,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Prints the table."""
    jax.config.update("jax_num_cpu_devices", max(DEGREES))
    new = [
        jax.random.normal(jax.random.key(i), (batch, 1, n, head_dim))
        for i, n in enumerate((heads, kv_heads, kv_heads))
    ]
    position = jnp.int32(tokens - 1)  # of a full cache
    rows, runs = [], []
    for name, degree, mesh, function, make in rows_of(tokens, batch, heads, kv_heads, head_dim):
        with jax.set_mesh(mesh):
            step, cache = jax.jit(function, donate_argnums=0), make()
            whole = NamedSharding(mesh, PartitionSpec())
            operands = tuple(jax.device_put(x, whole) for x in (position, *new))
            shapes = jax.tree.map(shape_of, (cache, *operands))
            made = plan(step, *shapes, topology=f"cpu:{degree}", mesh={"seq": degree}, timeout=None)
            assert made.memory is not None
            sent = [x for x in made.collectives if x.compiled]
            kinds = ", ".join(f"{x.compiled} {x.kind}" for x in sent) or "none"
            row = {"what": name, "degree": degree, "collectives": kinds}
            row["sent"] = sum(x.inside + x.between for x in sent) / 1e3
            row["held"] = made.memory.temporaries / 1e3
            rows.append(row)
            runs.append(timer(repeated(mesh, step, cache, operands)))
    seconds: list[list[float]] = [[] for _ in runs]
    with Progress(console=console) as progress:
        for repeat in progress.track(range(repeats + 1), description="steps"):
            for one, found in zip(runs, seconds, strict=True):
                last = one()
                if repeat:
                    found.append(last)
    for row, found in zip(rows, seconds, strict=True):
        row["ms"] = 1e3 * statistics.median(found)
        row["ratio"] = statistics.median(x / y for x, y in zip(found, seconds[0], strict=True))
    title = f"{batch} rows of {tokens} slots, {heads} query and {kv_heads} KV heads of {head_dim}"
    show(title, COLUMNS, rows, section="degree")
    if json_file is not None:
        json_file.write_text(json.dumps({"title": title, "rows": rows}, indent=1))


def shape_of(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def repeated(mesh: Any, step: Any, cache: Any, operands: tuple[Any, ...]) -> Any:
    """Runs a step, whose cache is the one that the step before returned."""
    state = [cache]

    def run() -> None:
        with jax.set_mesh(mesh):
            out, state[0] = step(state[0], *operands)
            jax.block_until_ready(out)

    return run


if __name__ == "__main__":
    app()
