"""Time and memory of the default attention, beside PyTorch, `jax.nn`, DeepSpeed and yunchang.

    python examples/benchmark_attention.py kernels    # one device's kernel, by tokens
    python examples/benchmark_attention.py skipping   # what windows, documents and lengths save
    python examples/benchmark_attention.py pipeline   # four devices against four ranks of others
    python examples/benchmark_attention.py memory     # what each device holds, against a formula

Each writes its numbers with `--json FILE`. Causal attention, float32, on the CPU, forward alone and
forward with gradients. Seconds are medians of repeats after a warm-up; the rows of a table take
turns, repeat by repeat, and a ratio is the median of those within one repeat, so that a machine
that slows down changes no ratio. JAX and PyTorch use all the cores, but in `pipeline`, where each
rank has the threads that `--threads` says: with one the four fill two cores. JAX's four devices are
simulated and share the same cores.

Peak memory: by how much the resident memory of a separate process grows in one call, results
included, operands not. Planned: results and temporaries of the compiled program.

The formula of `memory`, in bytes of temporaries on one device. A = 4 B S N/P H is one array, before
the reshard or after it, with P devices and n = N/P/c heads in each of c slices. The kernel holds,
of one head, copies of query, key and value (3 columns of 4 S H), and two blocks of logits:

    kernel forward    3 heads + 2 blocks
    kernel gradients  8 heads + 3 blocks + 2 rows of 4 B S n

The eight are query, key, value and the gradient of the output; the transposes of the first and the
last; the gradients of key and value, transposed. Where n B = 1 the first four (forward: three) are
not copies. Around it, with P > 1 devices, lie the gathered arrays of one slice, A/c each:

    forward    max(4 A/c, 3 A/c + kernel), and A for the outputs of the slices if c > 1
    gradients  c = 1: max(6 A, 5 A + kernel)
               c > 1: A + 8 A/c + kernel, and 6 in place of 8 where n B = 1

Forward: query, key, value, and the output, which is made in the memory of the result and then sent.
Gradients: those and the gradients of all four are eight; with one slice, three of them lie in the
memory of the results dq, dk and dv, which with more slices has their sums, and A is the gradient of
the output, slice by slice. So two slices save forward, and nothing with gradients; four save both.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from benchmark_peers import HAS_DEEPSPEED, PEER, PEERS, Ranks, flash_runs
from benchmark_tools import (
    PASSES,
    TIMES,
    Run,
    console,
    planned,
    programs,
    progress,
    runs_of,
    save,
    show,
    take_turns,
    timer,
)
from benchmark_ulysses import peak_growth
from jax.sharding import NamedSharding

from jax_seqpar import (
    Mask,
    MeshLayout,
    Ring,
    Ulysses,
    blockwise_attention,
    dot_product_attention,
)
from jax_seqpar.parity.inputs import Case

OURS, TORCH, JAX_NN = "blockwise", "torch flash", "jax.nn"
KERNELS = {OURS: blockwise_attention, JAX_NN: jax.nn.dot_product_attention}
BLOCK = 512  # what the kernel takes if not told

Heads = Annotated[int, typer.Option(min=1, help="Of query, key and value.")]
HeadDim = Annotated[int, typer.Option(min=1, help="Channels of a head.")]
Repeats = Annotated[int, typer.Option(min=1, help="After one to warm up.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def peaks(what: str, case: Case) -> list[int | None]:
    """Bytes by which one call of either pass makes the resident memory of a fresh process grow."""

    def runs(case: Case) -> list[Run]:
        return flash_runs(case) if what == TORCH else runs_of(programs(KERNELS[what], case), case)

    for run in runs(Case(1, 8, 2, 2, 8)):  # the libraries' own memory is there after this
        run()
    return [peak_growth(run) for run in runs(case)]


@app.command()
def kernels(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1K to 16K.")] = None,
    heads: Heads = 8,
    head_dim: HeadDim = 64,
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """Times one device's kernel; aims: PyTorch's takes 1.0 times its time or more, `jax.nn`'s 4."""
    cases = [Case(1, n, heads, heads, head_dim) for n in tokens or [1024 << i for i in range(5)]]
    found, skipped = [], []
    names = (OURS, TORCH, JAX_NN)
    with progress(len(cases) * len(names) * (repeats + 2)) as step:
        for case in cases:
            rows = {TORCH: [timer(run) for run in flash_runs(case)]}
            plans = {}
            for what in (OURS, JAX_NN):
                compiled = programs(KERNELS[what], case)
                plans[what] = [planned(x) for x in compiled]
                if max(plans[what]) > memory() / 2:
                    most = f"{max(plans[what]) / 1e9:.1f} GB"
                    skipped.append(f"{what} at {case.tokens} tokens: it would need {most}.")
                else:
                    rows[what] = [timer(run) for run in runs_of(compiled, case)]
            lines = take_turns(rows, OURS, repeats, step)
            for line in lines:
                what = line["what"]
                step(f"{what}, memory")
                # Each in its own process: memory that another left would be used again.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    line["peak_bytes"] = pool.submit(peaks, what, case).result()
                line["planned_bytes"] = plans.get(what, [None, None])
            found += [{"tokens": case.tokens} | line for line in lines]
    columns = {"tokens": "tokens", "what": "what"} | TIMES
    columns |= {"peak_bytes.0": "peak\nMB", "planned_bytes.0": "planned\nMB"}
    columns |= {"peak_bytes.1": "fwd+bwd\npeak", "planned_bytes.1": "\nplanned"}
    show(
        f"Causal attention 1 x tokens x {heads} x {head_dim}; ratios to {OURS}",
        columns,
        found,
        section="tokens",
    )
    for line in skipped:
        console.print(f"Left out: {line}")
    save(json_file, {"baseline": OURS, "rows": found, "skipped": skipped})


@app.command()
def skipping(
    tokens: Annotated[int, typer.Option(min=16)] = 16384,
    heads: Heads = 8,
    head_dim: HeadDim = 64,
    window: Annotated[int, typer.Option(min=1, help="Keys that a query sees.")] = 1024,
    documents: Annotated[int, typer.Option(min=1, help="In the one sequence.")] = 16,
    repeats: Repeats = 3,
    json_file: Json = None,
) -> None:
    """Times masks that skip blocks; aim: a window of 1024 is 5 times faster than causal."""
    case = Case(1, tokens, heads, heads, head_dim)
    index = np.arange(tokens)
    even = index * documents // tokens
    cuts = np.random.default_rng(0).choice(index[1:], documents - 1, replace=False)
    uneven = np.searchsorted(np.sort(cuts), index, side="right")
    quarter = jnp.array([tokens // 4])
    masks = {
        "full": Mask(),
        f"window of {window}": Mask(local_window_size=(window - 1, 0)),
        f"{documents} even documents": Mask(segment_ids=jnp.asarray(even[None])),
        f"{documents} uneven documents": Mask(segment_ids=jnp.asarray(uneven[None])),
        "a quarter of the keys": Mask(key_value_seq_lengths=quarter),
        "a quarter of both": Mask(query_seq_lengths=quarter, key_value_seq_lengths=quarter),
    }
    pairs = index + 1
    attended = [pairs.sum(), np.minimum(pairs, window).sum()]
    attended += [sum(n * (n + 1) // 2 for n in np.bincount(ids)) for ids in (even, uneven)]
    attended += [np.minimum(pairs, tokens // 4).sum(), pairs[: tokens // 4].sum()]
    rows = {
        what: [
            timer(r) for r in runs_of(programs(partial(blockwise_attention, mask=mask), case), case)
        ]
        for what, mask in masks.items()
    }
    with progress(len(rows) * (repeats + 1)) as step:
        found = take_turns(rows, "full", repeats, step)
    for row, count in zip(found, attended, strict=True):
        row["fewer_pairs"] = float(attended[0] / count)
        row["faster"] = [1 / row[name]["ratio"] for name in PASSES]
    columns = {"what": "what", "fewer_pairs": "fewer\npairs"}
    columns |= {"forward.median": "forward\ns", "faster.0": "times\nfaster"}
    columns |= {"both.median": "fwd+bwd\ns", "faster.1": "times\nfaster"}
    show(f"Causal attention 1 x {tokens} x {heads} x {head_dim}", columns, found)
    save(json_file, {"case": asdict(case), "baseline": "full", "rows": found})


@app.command()
def pipeline(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Default: 4096, 8192.")] = None,
    degree: Annotated[int, typer.Option(min=1, help="Devices, and ranks.")] = 4,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    heads: Heads = 8,
    head_dim: HeadDim = 64,
    threads: Annotated[int, typer.Option(min=1, help="PyTorch threads of each rank.")] = 1,
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """Times Ulysses and a ring, beside those of others on gloo."""
    jax.config.update("jax_num_cpu_devices", degree)
    ours, ring = f"jax_seqpar, {degree} devices", f"jax_seqpar ring, {degree} devices"
    cases = [Case(batch, n, heads, heads, head_dim) for n in tokens or (4096, 8192)]
    found = []
    if not HAS_DEEPSPEED:
        console.print(f'No DeepSpeed, so {PEER}: pip install "jax-seqpar[peers]"', markup=False)
    with progress(len(cases) * (2 + len(PEERS)) * (repeats + 1)) as step:
        for case in cases:
            mesh = jax.make_mesh((degree,), ("seq",), devices=jax.devices("cpu")[:degree])
            sharding = NamedSharding(mesh, MeshLayout().partition_spec)
            attention = partial(dot_product_attention, layout=MeshLayout(mesh=mesh))
            runs = {
                what: runs_of(
                    programs(partial(attention, strategy=strategy), case, sharding), case, sharding
                )
                for what, strategy in ((ours, Ulysses()), (ring, Ring()))
            }
            with ExitStack() as stack:
                rows = {what: [timer(run) for run in pair] for what, pair in runs.items()}
                ranks = []
                for what, passes in PEERS.items():
                    ranks.append(stack.enter_context(Ranks(what, degree, case, threads)))
                    timers = [partial(ranks[-1].seconds, name) for name in passes]
                    rows[f"{what}, {degree} ranks"] = timers
                lines = take_turns(rows, ours, repeats, step)
                outputs = [np.asarray(runs[ring][0]()), *(x.output() for x in ranks)]
            out = np.asarray(runs[ours][0]())
            apart = max(float(np.abs(out - x).max()) for x in outputs)
            found += [{"tokens": case.tokens} | line | {"outputs_apart": apart} for line in lines]
    shape = f"{batch} x tokens x {heads} x {head_dim}"
    show(
        f"Causal attention {shape}",
        {"tokens": "tokens", "what": "what"} | TIMES,
        found,
        section="tokens",
    )
    apart = max(line["outputs_apart"] for line in found)
    console.print(f"All give the same output, to {apart:.0e}. Threads of each rank: {threads}.")
    save(json_file, {"baseline": ours, "threads": threads, "rows": found})


@app.command(name="memory")
def memory_command(
    degree: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4, 8.")] = None,
    chunks: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 2, 4.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    tokens: Annotated[int, typer.Option(min=1)] = 16384,
    heads: Heads = 32,
    head_dim: HeadDim = 64,
    json_file: Json = None,
) -> None:
    """Compares temporaries of the compiled programs with a formula; aim: within 1.2 times."""
    degrees, slices = degree or [1, 2, 4, 8], chunks or [1, 2, 4]
    jax.config.update("jax_num_cpu_devices", max(degrees))
    case = Case(batch, tokens, heads, heads, head_dim)
    found = []

    def measure(what: str, compiled: list[Any], formulas: list[float], **sizes: int) -> None:
        row: dict[str, Any] = {"what": what, **sizes}
        for name, program, formula in zip(PASSES, compiled, formulas, strict=True):
            temp = program.memory_analysis().temp_size_in_bytes
            row[name] = {"temp_bytes": temp, "formula_bytes": formula, "ratio": temp / formula}
        found.append(row)

    alone = [n for n in (tokens // 4, tokens // 2, tokens) if n > 0]
    todo = [(d, c) for d in degrees for c in slices if d > 1 and heads % (d * c) == 0]
    with progress(len(alone) + len(todo)) as step:
        for n in alone:
            step(f"{n} tokens")
            one = Case(batch, n, heads, heads, head_dim)
            sizes = {"tokens": n, "degree": 1, "head_chunks": 1}
            measure(OURS, programs(blockwise_attention, one), kernel_bytes(one, heads), **sizes)
        for d, c in todo:
            step(f"{d} devices, {c} slices")
            mesh = jax.make_mesh((d,), ("seq",), devices=jax.devices("cpu")[:d])
            strategy = Ulysses(c, overlap=c == 1)
            attention = partial(
                dot_product_attention, layout=MeshLayout(mesh=mesh), strategy=strategy
            )
            compiled = programs(attention, case, NamedSharding(mesh, MeshLayout().partition_spec))
            sizes = {"tokens": tokens, "degree": d, "head_chunks": c}
            measure("pipeline", compiled, pipeline_bytes(case, d, c), **sizes)
    columns = {"what": "what", "tokens": "tokens", "degree": "degree", "head_chunks": "slices"}
    for name, heading in (("forward", "forward\nMB"), ("both", "fwd+bwd\nMB")):
        columns |= {f"{name}.temp_bytes": heading, f"{name}.formula_bytes": "formula\nMB"}
        columns |= {f"{name}.ratio": "\nratio"}
    show(f"Temporaries of one device, {batch} x tokens x {heads} x {head_dim}", columns, found)
    save(json_file, {"rows": found})


def kernel_bytes(case: Case, heads: int) -> list[float]:
    """Bytes of the kernel with some heads, forward and with gradients, by the formula above."""
    head = 4 * case.tokens * case.head_dim
    block = 4 * min(case.tokens, BLOCK) ** 2
    rows = 2 * 4 * case.batch * case.tokens * heads
    copied = 0 if heads * case.batch == 1 else 1
    return [3 * head * copied + 2 * block, 4 * head * (1 + copied) + 3 * block + rows]


def pipeline_bytes(case: Case, degree: int, chunks: int) -> list[float]:
    """Bytes of one of several devices, forward and with gradients, by the formula above."""
    A = 4 * case.batch * case.tokens * case.heads * case.head_dim / degree
    heads = case.heads // degree // chunks
    forward, gradients = kernel_bytes(case, heads)
    slices = max(4 * A / chunks, 3 * A / chunks + forward)
    if chunks == 1:
        return [slices, max(6 * A, 5 * A + gradients)]
    gathered = 6 if heads * case.batch == 1 else 8
    return [A + slices, A + gathered * A / chunks + gradients]


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    app()
