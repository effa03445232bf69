"""Seconds to trace and compile one attention, forward and with gradients, by number of tokens.

    python examples/benchmark_compile.py
    python examples/benchmark_compile.py --tokens 131072 --json results.json

Causal attention of 16 query and 4 KV heads of 64 channels over eight simulated devices, from shapes
alone: nothing is run, so a million tokens need no memory. Each row is a kernel with a strategy; the
last column is 32 layers of it in a `jax.lax.scan`, with gradients. Medians of repeats, each traced
and compiled anew. Exact attention is left out where it has no room for so many tokens.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.sharding import NamedSharding
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Exact,
    MeshLayout,
    Ring,
    Ulysses,
    Zigzag,
    dot_product_attention,
)

HEADS, KV_HEADS, CHANNELS, LAYERS = 16, 4, 64, 32
EXACT_QUERIES = 1 << 21  # of one KV head, for which exact attention has no room
ROWS: dict[str, dict[str, Any]] = {
    "blockwise, Ulysses": {"kernel": Blockwise(), "strategy": Ulysses()},
    "blockwise, Ulysses(2)": {"kernel": Blockwise(), "strategy": Ulysses(head_chunks=2)},
    "blockwise, all-gather": {"kernel": Blockwise(), "strategy": AllGatherKV()},
    "blockwise, ring in zigzag": {"kernel": Blockwise(), "strategy": Ring(), "order": Zigzag()},
    "exact, Ulysses": {"kernel": Exact(), "strategy": Ulysses()},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def forward(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the attention itself."""
    return attend


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Returns output and gradients, the output as its own cotangent."""

    def run(query: Any, key: Any, value: Any) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(out)

    return run


def layers(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Returns gradients through `LAYERS` layers, the output of each the next one's query."""

    def loss(query: Any, key: Any, value: Any) -> Any:
        def layer(x: Any, _: None) -> Any:
            return attend(x, key, value), None

        return jax.lax.scan(layer, query, length=LAYERS)[0].sum()

    return jax.grad(loss, argnums=(0, 1, 2))


PROGRAMS = {"forward": forward, "with gradients": with_gradients, "32 layers": layers}


def seconds_to_compile(program: Callable[..., Any], row: str, tokens: int) -> float:
    """Seconds from a function to its compiled program."""
    options = dict(ROWS[row])
    mesh = jax.make_mesh((8,), ("seq",))
    layout = MeshLayout(mesh=mesh, order=options.pop("order", MeshLayout().order))
    attend = partial(dot_product_attention, is_causal=True, layout=layout, **options)
    query, key = (
        jax.ShapeDtypeStruct(
            (1, tokens, heads, CHANNELS),
            jnp.float32,
            sharding=NamedSharding(mesh, layout.partition_spec),
        )
        for heads in (HEADS, KV_HEADS)
    )
    jax.clear_caches()
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        jax.jit(program(attend)).lower(query, key, key).compile()
        return time.perf_counter() - start


@app.command()
def benchmark(
    tokens: Annotated[
        list[int] | None, typer.Option(min=16, help="Repeat. Default: 1024, 131072, 1048576.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.")
    ] = None,
) -> None:
    """Seconds to trace and compile one attention."""
    console = Console()
    table = Table(title="Seconds to trace and compile, eight devices", box=box.SIMPLE)
    for column in ("tokens", "what", *PROGRAMS):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows = []
    asked = [
        (n, row)
        for n in tokens or (1 << 10, 1 << 17, 1 << 20)
        for row, options in ROWS.items()
        if not (options["kernel"] == Exact() and n * HEADS // KV_HEADS >= EXACT_QUERIES)
    ]
    seconds_to_compile(forward, "blockwise, Ulysses", 1024)  # what JAX does once
    for n, row in track(asked, console=console, transient=True):
        found = {
            name: statistics.median(seconds_to_compile(program, row, n) for _ in range(repeats))
            for name, program in PROGRAMS.items()
        }
        table.add_row(f"{n:,}", row, *(f"{x:.2f}" for x in found.values()))
        rows.append({"tokens": n, "what": row} | found)
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    # Before JAX starts.
    jax.config.update("jax_num_cpu_devices", 8)
    app()
