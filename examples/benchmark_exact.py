"""Seconds of exact attention beside ordinary attention, by number of tokens.

    python examples/benchmark_exact.py
    python examples/benchmark_exact.py --tokens 2048 --tokens 8192 --json results.json

Causal attention of one sequence, 8 heads of 64 channels, float32 (one row has inputs of bfloat16),
forward alone and forward with gradients, on JAX's default device. Medians of repeats that take
turns, after a warm-up. Ratios are to `torch sdpa`: PyTorch's fused float32 kernel, blockwise and
causal blocks skipped, on the CPU; without PyTorch's row, as on a GPU that only JAX sees, to
`jax.nn`. `jax.nn` holds all the weights, so it is left out beyond 4096 tokens. On a GPU there is a
row of `jax.nn` in bfloat16 by cuDNN.

First the certificate: whether this device gives exact attention the bits of every other.
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
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jax_seqpar import exact_attention
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.exact import arithmetic, certify
from jax_seqpar.parity.inputs import Arrays, Case
from torch_ref.exact import exact_attention as torch_exact_attention

DENSE_TOKENS = 4096  # `jax.nn` holds tokens x tokens weights for every head
REFERENCE_TOKENS = 2048  # the reference is for reading

Run = Callable[[], Any]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def jax_runs(attention: Callable[..., Any], inputs: Arrays, dtype: Any = jnp.float32) -> list[Run]:
    """Returns forward, and forward with gradients, which are compiled on the first call."""
    *operands, grad = (jnp.asarray(x, dtype) for x in inputs.values())
    attend = partial(attention, is_causal=True)

    @jax.jit
    def both(query, key, value, grad):
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(grad)

    forward = jax.jit(attend)
    return [
        lambda: jax.block_until_ready(forward(*operands)),
        lambda: jax.block_until_ready(both(*operands, grad)),
    ]


def torch_runs(attention: Callable[..., Any], inputs: Arrays, heads_first: bool) -> list[Run]:
    """Returns PyTorch's forward without and with gradients, batch-first or heads first."""
    *leaves, grad = (numpy_to_torch(x) for x in inputs.values())
    if heads_first:
        *leaves, grad = (x.transpose(1, 2).contiguous() for x in (*leaves, grad))
    leaves = [x.requires_grad_() for x in leaves]
    attend = partial(attention, is_causal=True)

    def forward() -> None:
        with torch.no_grad():
            attend(*leaves)

    return [forward, lambda: torch.autograd.grad(attend(*leaves), leaves, grad)]


def products_alone(tokens: int, heads: int, head_dim: int) -> list[Run]:
    """Returns the float64 products of exact attention alone: no schedule takes less time.

    Of each pair of causal blocks, forward: keys with both digits of the queries, both digits of the
    values with the weights. The gradients take the first again, the same of values and gradients of
    the output, and three products with both digits of key, query and gradient.
    """
    size = min(arithmetic.BLOCK, tokens)
    pairs = [(i, j) for i in range(-(-tokens // size)) for j in range(i + 1)] * heads
    shapes = {
        "queries": (head_dim, 2 * size),
        "keys": (size, head_dim),
        "values": (2 * head_dim, size),
        "weights": (size, size),
        "columns": (size, 2 * head_dim),
    }

    def run(products: list[tuple[str, str]]) -> Run:
        @jax.jit
        def each_pair(blocks: Any) -> Any:
            # Each step overwrites the results of the one before, which XLA computes all the same;
            # with equal operands XLA would compute one step.
            def step(i: Any, results: Any) -> Any:
                return [
                    blocks[left][i % 8] @ blocks[right][(i + n) % 8]
                    for n, (left, right) in enumerate(products)
                ]

            return jax.lax.fori_loop(0, len(pairs), step, step(0, None))

        with jax.enable_x64(True):
            blocks = {name: jnp.ones((8, *shape), jnp.float64) for name, shape in shapes.items()}
            compiled = each_pair.lower(blocks).compile()
        return lambda: jax.block_until_ready(compiled(blocks))

    forward = [("keys", "queries"), ("values", "weights")]
    backward = [("keys", "queries")] * 2 + [("values", "weights")] + [("weights", "columns")] * 2
    return [run(forward), run(forward + backward)]


def runs_of(tokens: int, heads: int, head_dim: int) -> dict[str, list[Run]]:
    """Returns the runs of each row of the table, by its name."""
    case = Case(batch=1, tokens=tokens, heads=heads, kv_heads=heads, head_dim=head_dim)
    inputs = case.inputs()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    on_gpu = jax.default_backend() == "gpu"
    runs = {} if on_gpu else {"torch sdpa": torch_runs(sdpa, inputs, True)}
    if tokens <= DENSE_TOKENS or on_gpu:
        runs["jax.nn"] = jax_runs(jax.nn.dot_product_attention, inputs)
    if on_gpu:
        cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
        runs["jax.nn bfloat16, cuDNN"] = jax_runs(cudnn, inputs, jnp.bfloat16)
    runs["exact"] = jax_runs(exact_attention, inputs)
    runs["exact, bfloat16"] = jax_runs(exact_attention, inputs, jnp.bfloat16)
    runs["its products alone"] = products_alone(tokens, heads, head_dim)
    if tokens <= REFERENCE_TOKENS:
        runs["torch_ref exact"] = torch_runs(torch_exact_attention, inputs, False)
    return runs


def seconds(runs: dict[str, list[Run]], repeats: int) -> dict[str, list[float]]:
    """Median seconds of forward and of forward with gradients; the rows take turns."""
    times: dict[str, list[list[float]]] = {row: [[], []] for row in runs}
    for repeat in range(repeats + 1):
        for row, pair in runs.items():
            for run, found in zip(pair, times[row], strict=True):
                start = time.perf_counter()
                run()
                if repeat > 0:
                    found.append(time.perf_counter() - start)
    return {row: [statistics.median(x) for x in pair] for row, pair in times.items()}


@app.command()
def benchmark(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat. Default: 1024 to 16384.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Of query, key and value.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="After one to warm up.")] = 3,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.")
    ] = None,
) -> None:
    """Seconds of exact and of ordinary attention, and their ratios."""
    console = Console()
    certificate = certify()
    console.print(str(certificate), highlight=False)
    table = Table(title=f"Causal attention 1 x tokens x {heads} x {head_dim}", box=box.SIMPLE)
    for column in ("tokens", "what", "forward s", "ratio", "fwd+bwd s", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows = []
    for n in track(tokens or [1024 << i for i in range(5)], console=console, transient=True):
        found = seconds(runs_of(n, heads, head_dim), repeats)
        baseline = next(iter(found.values()))
        for what, (forward, both) in found.items():
            ratios = forward / baseline[0], both / baseline[1]
            cells = (f"{forward:.3f}", f"{ratios[0]:.1f}", f"{both:.3f}", f"{ratios[1]:.1f}")
            table.add_row(str(n), what, *cells)
            rows.append({"tokens": n, "what": what, "forward": forward, "both": both})
        table.add_section()
    console.print(table)
    if json_file is not None:
        found = {"device": certificate.backend, "trusted": certificate.trusted, "rows": rows}
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    app()
