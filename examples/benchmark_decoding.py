"""Bytes sent, memory and time of a prefill and a decoding step of one cache, by degree.

    python examples/benchmark_decoding.py
    python examples/benchmark_decoding.py --tokens 65536 --kv-heads 2 --json results.json

In a step one token of each row is appended and attended to; the cache is donated. `along the
tokens` is `jax_seqpar.decoding`. `by heads` is the same cache with its heads shared, which needs as
many KV heads as devices. `left to the compiler` is `jax.nn.dot_product_attention` of a cache that
is sharded along the tokens, and `all-gather` the same of a cache that is gathered first. A prefill
is the causal attention of a prompt by a strategy, whose keys and values fill the cache. Sent: bytes
that a device receives in the compiled program. Held: temporaries, beside the cache. Ratio: medians
of the seconds over those on one device, row by row in turns. The devices are simulated and share
the cores, so a ratio of 1 says that sharing adds no work.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from benchmark_tools import Timer, console, show, timer
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import Progress

from jax_seqpar import AllGatherKV, MeshLayout, Ring, Ulysses, dot_product_attention
from jax_seqpar.decoding import KeyValueCache, attend_to_cache
from jax_seqpar.plan import plan
from jax_seqpar.plan.collective_rows import Collective

COLUMNS = {
    "what": "",
    "degree": "degree",
    "collectives": "collectives",
    "sent": "sent\nkB",
    "held": "held\nkB",
    "ms": "\nms",
    "ratio": "\nratio",
}
DEGREES = (2, 4, 8)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cache and of the queries that attend to it."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int

    def operands(self, tokens: int) -> list[jax.Array]:
        """Query, key and value of so many tokens."""
        return [
            jax.random.normal(jax.random.key(i), (self.batch, tokens, n, self.head_dim))
            for i, n in enumerate((self.heads, self.kv_heads, self.kv_heads))
        ]

    def empty(self, layout: MeshLayout, room: int = 0) -> KeyValueCache:
        sizes = self.batch, self.tokens + room, self.kv_heads, self.head_dim
        return KeyValueCache.empty(*sizes, layout=layout)

    def filled(self, layout: MeshLayout) -> KeyValueCache:
        """A cache that holds `self.tokens` tokens, and has room for those of the steps."""
        key = value = jnp.zeros((self.batch, self.tokens, self.kv_heads, self.head_dim))
        return self.empty(layout, room=128 * max(DEGREES)).fill(key, value)


@dataclass(frozen=True)
class Subject:
    """A program that is measured, `(cache, *operands) -> (output, cache)`, compiled with donation.

    Attributes:
      kind: of those whose times are compared.
    """

    kind: str
    name: str
    mesh: Any
    program: Any
    cache: Any
    operands: tuple[Any, ...]

    @property
    def degree(self) -> int:
        return self.mesh.shape["seq"]

    def row(self) -> dict[str, Any]:
        """Row of the table: collectives, bytes sent and memory, from the compiled program."""
        shapes = jax.tree.map(shape_of, (self.cache, *self.operands))
        on = {"topology": f"cpu:{self.degree}", "mesh": {"seq": self.degree}, "timeout": None}
        made = plan(self.program, *shapes, **on)
        assert made.memory is not None
        sent = [x for x in made.collectives if x.compiled]
        return {
            "what": self.name,
            "degree": self.degree,
            "collectives": ", ".join(_count(x) for x in sent) or "none",
            "sent": sum(x.inside + x.between for x in sent) / 1e3,
            "held": made.memory.temporaries / 1e3,
        }

    def timer(self) -> Timer:
        """Timer of the program, with the cache that the run before returned."""
        state = [self.cache]

        def run() -> None:
            with jax.set_mesh(self.mesh):
                out, state[0] = self.program(state[0], *self.operands)
                jax.block_until_ready(out)

        return timer(run)


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


def prefill(cache: Any, query: Any, key: Any, value: Any, *, strategy: Any) -> Any:
    """The attention of a prompt, whose keys and values fill the cache."""
    options: Any = {"strategy": strategy, "layout": cache.layout}
    out = dot_product_attention(query, key, value, is_causal=True, **options)
    return out, cache.fill(key, value)


def steps(sizes: Sizes) -> Iterator[Subject]:
    """A step against the cache, shared in each way."""
    for degree in (1, *DEGREES):
        on = layout_of(degree)
        ways: dict[str, tuple[Any, Any]] = {"along the tokens": (cached, sizes.filled(on))}
        if sizes.kv_heads % degree == 0 and degree > 1:
            by_heads = replace(on, tokens=None, heads="seq")
            ways["by heads"] = cached, sizes.filled(by_heads)
        if degree > 1:
            for name, gather in (("left to the compiler", False), ("all-gather", True)):
                shape = (sizes.batch, sizes.tokens, sizes.kv_heads, sizes.head_dim)
                lies = NamedSharding(on.mesh, on.partition_spec)
                arrays = [jax.device_put(jnp.zeros(shape), lies) for _ in range(2)]
                ways[name] = partial(plain, gather=gather), arrays
        whole = NamedSharding(on.mesh, PartitionSpec())
        operands = (jnp.int32(sizes.tokens - 1), *sizes.operands(1))  # of a full cache
        operands = tuple(jax.device_put(x, whole) for x in operands)
        for name, (function, cache) in ways.items():
            program = jax.jit(function, donate_argnums=0)
            yield Subject("step", name, on.mesh, program, cache, operands)


def prefills(sizes: Sizes, prompt: int) -> Iterator[Subject]:
    """A prompt, by each strategy."""
    for degree in (1, max(DEGREES)):
        on = layout_of(degree)
        lies = NamedSharding(on.mesh, on.partition_spec)
        operands = tuple(jax.device_put(x, lies) for x in sizes.operands(prompt))
        for strategy in (Ulysses(), Ring(), AllGatherKV()) if degree > 1 else (Ulysses(),):
            program = jax.jit(partial(prefill, strategy=strategy), donate_argnums=0)
            name = f"prefill, {type(strategy).__name__}"
            yield Subject("prefill", name, on.mesh, program, sizes.empty(on), operands)


def layout_of(degree: int) -> Any:
    """Tokens over so many devices."""
    devices, auto = jax.devices()[:degree], (jax.sharding.AxisType.Auto,)
    return MeshLayout(mesh=jax.make_mesh((degree,), ("seq",), auto, devices=devices))


def measured(subjects: list[Subject], repeats: int) -> list[dict[str, Any]]:
    """Rows of the subjects, with times in turns and their ratio to the first of the kind."""
    rows = []
    for subject in subjects:
        with jax.set_mesh(subject.mesh):
            rows.append(subject.row())
    timers = [subject.timer() for subject in subjects]
    seconds: list[list[float]] = [[] for _ in timers]
    with Progress(console=console) as progress:
        for repeat in progress.track(range(repeats + 1), description="turns"):
            for one, found in zip(timers, seconds, strict=True):
                last = one()
                if repeat:  # the first compiles
                    found.append(last)
    first: dict[str, list[float]] = {}
    for subject, row, found in zip(subjects, rows, seconds, strict=True):
        base = first.setdefault(subject.kind, found)
        row["ms"] = 1e3 * statistics.median(found)
        row["ratio"] = statistics.median(x / y for x, y in zip(found, base, strict=True))
    return rows


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=8, help="Slots of a row.")] = 32768,
    prompt: Annotated[int, typer.Option(min=8, help="Tokens of a prefill.")] = 2048,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=100)] = 9,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Prints the table."""
    for name, n in (("tokens", tokens), ("prompt", prompt)):
        if n % max(DEGREES) or prompt > tokens:
            raise typer.BadParameter(
                f"--{name} {n}: give a multiple of {max(DEGREES)}, and a prompt that the "
                f"{tokens} slots hold."
            )
    jax.config.update("jax_num_cpu_devices", max(DEGREES))
    sizes = Sizes(batch, tokens, heads, kv_heads, head_dim)
    rows = measured([*prefills(sizes, prompt), *steps(sizes)], repeats)
    title = f"{batch} rows of {tokens} slots, prompts of {prompt}, {heads} query and {kv_heads} "
    title += f"KV heads of {head_dim}"
    show(title, COLUMNS, rows, section="degree")
    if json_file is not None:
        json_file.write_text(json.dumps({"title": title, "rows": rows}, indent=1))


def _count(x: Collective) -> str:
    return f"{x.compiled} {x.kind.removeprefix('collective-')}"


def shape_of(x: Any) -> Any:
    """`jax.ShapeDtypeStruct` of an array, with its sharding, for compilation."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


if __name__ == "__main__":
    app()
