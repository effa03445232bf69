"""Programs, turns and tables that the benchmarks of kernels share."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_seqpar.parity.inputs import Case

PASSES = ("forward", "both")
# Columns of the tables: a path into the row, and a heading.
TIMES = {"forward.median": "forward\ns", "forward.ratio": "\nratio"}
TIMES |= {"both.median": "fwd+bwd\ns", "both.ratio": "\nratio"}

Run = Callable[[], Any]
Timer = Callable[[], float]
Step = Callable[[str], None]

console = Console()


def programs(attention: Any, case: Case, sharding: Sharding | None = None) -> list[Any]:
    """Compiles forward, and forward with gradients."""
    sharding = sharding or SingleDeviceSharding(jax.devices("cpu")[0])
    shape = (case.batch, case.tokens, case.heads, case.head_dim)
    one = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    attend = partial(attention, is_causal=True)

    def both(query, key, value, grad):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(grad)

    return [jax.jit(attend).lower(*[one] * 3).compile(), jax.jit(both).lower(*[one] * 4).compile()]


def runs_of(compiled: list[Any], case: Case, sharding: Sharding | None = None) -> list[Run]:
    """Returns calls of compiled programs on inputs that are on their devices already."""
    sharding = sharding or SingleDeviceSharding(jax.devices("cpu")[0])
    inputs = [jax.device_put(x, sharding) for x in case.inputs().values()]
    forward, both = compiled
    return [
        lambda: jax.block_until_ready(forward(*inputs[:3])),
        lambda: jax.block_until_ready(both(*inputs)),
    ]


def planned(program: Any) -> int:
    """Bytes of a compiled program on a device, beside its inputs."""
    sizes = program.memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes


def timer(run: Run) -> Timer:
    """Returns a function that runs once, and returns its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def take_turns(
    rows: dict[str, list[Timer]], baseline: str, repeats: int, step: Step
) -> list[dict[str, Any]]:
    """Seconds of each row, and their ratios to those of the baseline in the same repeat.

    A row without a timer of the second pass has None there.
    """
    seconds: dict[str, list[list[float]]] = {what: [[], []] for what in rows}
    for repeat in range(repeats + 1):
        for what, timers in rows.items():
            step(what)
            for seconds_of, found in zip(timers, seconds[what], strict=False):
                last = seconds_of()
                if repeat > 0:
                    found.append(last)

    def timing(found: list[float], reference: list[float]) -> dict[str, Any] | None:
        if not found:
            return None
        ratio = statistics.median(x / y for x, y in zip(found, reference, strict=True))
        return {"median": statistics.median(found), "ratio": ratio, "seconds": found}

    return [
        {"what": what} | dict(zip(PASSES, map(timing, pair, seconds[baseline]), strict=True))
        for what, pair in seconds.items()
    ]


def show(title: str, columns: dict[str, str], rows: list[Any], section: str | None = None) -> None:
    """A table whose columns are paths into the rows."""
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    for path, heading in columns.items():
        table.add_column(heading, justify="left" if path == "what" else "right", no_wrap=True)
    for before, row in zip([None, *rows], rows, strict=False):
        if section is not None and before is not None and before[section] != row[section]:
            table.add_section()
        table.add_row(*(cell(row, path) for path in columns))
    # Printed as wide as its numbers, also where the terminal is narrower: no number is cut.
    wide = Console(width=1000)
    wide.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    wide.print(table)


def cell(row: Any, path: str) -> str:
    """Text of the number at a path into a row; bytes in MB."""
    for name in path.split("."):
        row = None if row is None else row[int(name)] if name.isdigit() else row[name]
    if row is None or isinstance(row, str):
        return row or "-"
    if "_bytes" in path:
        return f"{row / 1e6:.1f}"
    if isinstance(row, int):
        return str(row)
    return f"{row:.3f}" if path.endswith("median") else f"{row:.2f}"


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """Progress bar of `total` steps, advanced by each call with a description of the next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda description: bar.update(task, description=description, advance=1)


def save(path: Path | None, found: dict[str, Any]) -> None:
    """Writes rows as JSON, if there is a path."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
