"""Seconds and memory of one causal attention by degree, on JAX devices and on PyTorch ranks.

    python examples/benchmark_ulysses.py
    python examples/benchmark_ulysses.py --degree 2 --degree 4 --tokens 4096 --json results.json

Seconds: medians of repeats after a warm-up, float32, one batch of random numbers. The JAX rows
take turns, repeat by repeat, so that a machine that slows down slows them all; the PyTorch rows
follow one by one. The ranks of a degree start each repeat together and the slowest one counts.
Every ratio is to `dense_attention` on one device, the local kernel of the `jax_seqpar` rows, in the
same run. The JSON has the shortest and the longest time as well.

The devices are simulated: they share the cores of one machine, as the ranks do, so no speed-up is
to be expected. A ratio of 1 says that sharding adds no work. It can be below 1, because one device
does not keep every core busy all the time. JAX and `torch sdpa, one process` use all the cores,
each rank of `torch_ref` one thread. PyTorch's kernel is fused and never holds all the weights; the
dense one does.

Memory: `peak MB` is by how much the resident memory of the process grows during its first forward
and backward pass, inputs and results included: all devices together, and for ranks the sum of
their peaks. Linux only; it varies from run to run with what XLA has in flight at the same time.
`planned MB per device` is what the compiled forward and backward program reserves on each device
for arguments, results and temporaries: what falls with the degree, and what a real device would
have to hold. The CPU kernels' own scratch memory is in the first number alone.
"""

import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import torch
import torch.distributed as dist
import typer
from jax.sharding import NamedSharding, SingleDeviceSharding
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from jax_seqpar import MeshLayout, dense_attention, dot_product_attention
from jax_seqpar._checks import check_arrays
from jax_seqpar.bridge.torch_ranks import run_ranks
from jax_seqpar.mesh_layout import check_division
from jax_seqpar.parity.inputs import Case
from jax_seqpar.parity.plan import check_ranks
from torch_ref.ulysses import DistributedAttention

ONE_DEVICE = {
    "jax.nn, one device": jax.nn.dot_product_attention,
    "dense, one device": dense_attention,
}
BASELINE = "dense, one device"
ONE_PROCESS = "torch sdpa, one process"
TIMEOUT = 1800.0

Step = Callable[[str], None]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Row:
    """One line of the table: seconds of each repeat, and bytes."""

    what: str
    degree: int = 1
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    peak: int | None = None
    planned: int | None = None


def measure_jax(degrees: list[int], case: Case, repeats: int, step: Step) -> list[Row]:
    """The rows of one device and of `jax_seqpar`."""
    rows = [Row(what) for what in ONE_DEVICE]
    rows += [Row(f"jax_seqpar, {_count(d, 'device')}", d) for d in degrees]
    runs = []
    for row in rows:
        step(row.what)
        runs.append(_warm_jax_row(row, case))
    for _ in range(repeats):
        for row, (forward, both, inputs) in zip(rows, runs, strict=True):
            step(row.what)
            row.forward.append(_seconds(forward, *inputs[:3]))
            row.both.append(_seconds(both, *inputs))
    return rows


def _warm_jax_row(row: Row, case: Case) -> tuple[Any, Any, list[jax.Array]]:
    """Compiles a row's forward and backward, with their inputs, and fills in its memory."""
    devices = jax.devices("cpu")[: row.degree]
    if row.what in ONE_DEVICE:
        sharding = SingleDeviceSharding(devices[0])
        attention = partial(ONE_DEVICE[row.what], is_causal=True)
    else:
        mesh = jax.make_mesh((row.degree,), ("seq",), devices=devices)
        sharding = NamedSharding(mesh, MeshLayout().partition_spec)
        attention = partial(dot_product_attention, is_causal=True, layout=MeshLayout(mesh=mesh))

    def forward_backward(query: jax.Array, key: jax.Array, value: jax.Array, grad: jax.Array):
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(grad)

    arrays = case.inputs().values()
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
    forward = jax.jit(attention).lower(*types[:3]).compile()
    both = jax.jit(forward_backward).lower(*types).compile()
    sizes: Any = both.memory_analysis()
    row.planned = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    )

    def inputs() -> list[jax.Array]:
        return [jax.device_put(x, sharding) for x in arrays]

    row.peak = peak_growth(lambda: jax.block_until_ready(both(*inputs())))
    jax.block_until_ready(forward(*inputs()[:3]))
    return forward, both, inputs()


def measure_torch(degrees: list[int], case: Case, repeats: int, step: Step) -> list[Row]:
    """The rows of one PyTorch process and of `torch_ref`."""
    rows = [Row(ONE_PROCESS)] + [Row(f"torch_ref on gloo, {_count(d, 'rank')}", d) for d in degrees]
    for row in rows:
        step(row.what)
        threads = torch.get_num_threads() if row.what == ONE_PROCESS else 1
        ranks = run_ranks(
            torch_rank, row.degree, row, case, repeats, timeout=TIMEOUT, threads=threads
        )
        row.forward = [max(seconds) for seconds in zip(*(r.forward for r in ranks), strict=True)]
        row.both = [max(seconds) for seconds in zip(*(r.both for r in ranks), strict=True)]
        peaks = [r.peak for r in ranks]
        row.peak = None if None in peaks else sum(peaks)
    return rows


def torch_rank(rank: int, row: Row, case: Case, repeats: int) -> Row:
    """One rank's measurements of a PyTorch row."""
    attention: Callable[..., torch.Tensor] = sdpa
    if row.what != ONE_PROCESS:
        attention = partial(DistributedAttention(sdpa), batch_dim_idx=0)

    def forward(query, key, value, grad):
        with torch.no_grad():
            return attention(query, key, value)

    def both(query, key, value, grad):
        out = attention(query, key, value)
        return out, torch.autograd.grad(out, (query, key, value), grad)

    # The library's code is in memory after this, so only the attention itself is seen to grow.
    both(*_local_inputs(replace(case, tokens=row.degree), row.degree))
    row.peak = peak_growth(lambda: both(*_local_inputs(case, row.degree)))
    inputs = _local_inputs(case, row.degree)
    forward(*inputs)
    for _ in range(repeats):
        for fn, seconds in ((forward, row.forward), (both, row.both)):
            dist.barrier()
            seconds.append(_seconds(fn, *inputs))
    return row


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's own causal attention, batch-first."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    gqa = query.shape[2] != key.shape[2]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2)


def _local_inputs(case: Case, degree: int) -> list[torch.Tensor]:
    """One rank's query, key, value and output gradient."""
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = ((case.batch, case.tokens // degree, n, case.head_dim) for n in heads)
    *inputs, grad = (torch.randn(shape) for shape in shapes)
    return [*(x.requires_grad_() for x in inputs), grad]


def _seconds(fn: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))  # leaves PyTorch's results alone
    return time.perf_counter() - start


def peak_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which this process's resident memory at its highest exceeds that before `run`."""
    try:
        # Memory kept from earlier would be used again without being seen to grow.
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the peak. That of getrusage stays, and a spawned process starts at its parent's.
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # neither exists outside Linux
        run()
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def results(rows: list[Row], case: Case) -> dict[str, Any]:
    """Measurements of all rows, for JSON."""
    (baseline,) = (row for row in rows if row.what == BASELINE)

    def timing(seconds: list[float], reference: list[float]) -> dict[str, Any]:
        median = statistics.median(seconds)
        ratio = median / statistics.median(reference)
        spread = {"min": min(seconds), "max": max(seconds), "seconds": seconds}
        return {"median": median, "ratio": ratio, **spread}

    lines = [
        {
            "what": row.what,
            "degree": row.degree,
            "forward": timing(row.forward, baseline.forward),
            "forward_backward": timing(row.both, baseline.both),
            "peak_bytes": row.peak,
            "planned_bytes_per_device": row.planned,
        }
        for row in rows
    ]
    return {"case": asdict(case), "baseline": BASELINE, "rows": lines}


def results_table(found: dict[str, Any], case: Case) -> Table:
    """One line per row, 80 columns wide."""
    title = f"Causal attention {case} (batch x tokens x heads x head dim), {case.dtype}"
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    table.add_column("what", no_wrap=True)
    headings = ("degree", "forward\ns", "\nratio", "fwd+bwd\ns", "\nratio", "peak\nMB")
    for column in (*headings, "planned MB\nper device"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        cells = [row["what"], str(row["degree"])]
        for timing in (row["forward"], row["forward_backward"]):
            cells += [f"{timing['median']:.3f}", f"{timing['ratio']:.2f}"]
        for size in (row["peak_bytes"], row["planned_bytes_per_device"]):
            cells.append("-" if size is None else f"{size / 1e6:.1f}")
        table.add_row(*cells)
    return table


@app.command()
def benchmark(
    degree: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Devices and ranks; repeat. Default: 1, 2, 4, 8."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Of the whole sequence.")] = 2048,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of which the medians are taken.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.")
    ] = None,
) -> None:
    """Seconds and memory by degree, on simulated JAX devices and on PyTorch ranks."""
    case = Case(batch, tokens, heads, kv_heads, head_dim)
    degrees = sorted(set(degree or (1, 2, 4, 8)))
    query, key, value, _ = case.inputs().values()
    try:
        check_arrays(query, key, value)
        for d in degrees:
            check_division(query.shape, key.shape, MeshLayout(), {"seq": d})
            check_ranks(query.shape, key.shape, d, adds_exactly=False)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    jax.config.update("jax_num_cpu_devices", max(degrees))

    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    jax_rows, torch_rows = len(ONE_DEVICE) + len(degrees), 1 + len(degrees)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=jax_rows * (repeats + 1) + torch_rows)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        rows = measure_jax(degrees, case, repeats, step)
        rows += measure_torch(degrees, case, repeats, step)
    found = results(rows, case)
    console.print(results_table(found, case))
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app()
