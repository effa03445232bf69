"""Milliseconds of the Triton kernel's three passes on this GPU, by the sizes of their blocks.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python examples/tune_triton.py
    ... python examples/tune_triton.py --head-dim 64 --dtype float32 --json sizes.json

Causal attention of one sequence. A pass is compiled for every size, several at a time; one that the
GPU has no room for is left out. Medians of repeats, each of several calls. The first rows of each
pass are what `SIZES` of `jax_seqpar/kernels/triton_plan.py` should have for this GPU.
"""

import itertools
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from benchmark_gpu import Calls, HeadDim, Heads, Json, Repeats, check_gpu
from benchmark_tools import progress, save, show, timer

from jax_seqpar import Mask
from jax_seqpar.kernels import triton_backward, triton_forward
from jax_seqpar.kernels.triton_backward import Rows
from jax_seqpar.kernels.triton_plan import Blocks, Plan, make_plan
from jax_seqpar.mask import Spec

PASSES = ("forward", "dq", "dkv")
COLUMNS = {n: n for n in ("what", "queries", "keys", "warps", "stages", "ms", "tflops")}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of S^2 N H, halved by causality
SHOWN = 6  # rows of each pass

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def sizes(most: int) -> list[Blocks]:
    """Blocks of queries and keys of at most so many logits."""
    found = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
    return [Blocks(*x) for x in found if x[0] * x[1] <= most]


def run_pass(name: str, plan: Plan, query: Any, key: Any, value: Any, number: Any) -> Any:
    """One pass of the attention; the numbers of its rows do not matter to its time."""
    spec, rows = Spec(Mask(is_causal=True)), Rows(query, query, number, number, number)
    if name == "forward":
        return triton_forward.forward(plan, query.dtype, query, key, value, spec)
    gradients: dict[str, Any] = {
        "dq": triton_backward.query_gradients,
        "dkv": triton_backward.key_gradients,
    }
    return gradients[name](plan, query.dtype, rows, key, value, spec)


@app.command()
def tune(
    tokens: Annotated[
        int, typer.Option(min=256, help="A multiple of 256, of query, key and value.")
    ] = 8192,
    heads: Heads = 16,
    head_dim: HeadDim = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    precision: Annotated[
        str, typer.Option(help="Of float32 products: tensorfloat32, or highest for all bits.")
    ] = "tensorfloat32",
    logits: Annotated[int, typer.Option(min=1 << 10, help="Of a block, at most.")] = 1 << 14,
    repeats: Repeats = 3,
    calls: Calls = 4,
    json_file: Json = None,
) -> None:
    """The fastest sizes of blocks."""
    check_gpu()
    shape = (1, tokens, heads, head_dim)
    operands = [
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 3)
    ]
    with jax.default_matmul_precision(precision):
        query, key, value = operands
        whole = make_plan(query, key, value, None, None, False)
    operands.append(jnp.ones(shape[:3], jnp.float32))

    def compile_one(asked: tuple[str, Blocks]) -> Any:
        name, blocks = asked
        plan = replace(whole, **{name: blocks})
        with jax.default_matmul_precision(precision):
            try:
                return jax.jit(partial(run_pass, name, plan)).lower(*operands).compile()
            except jax.errors.JaxRuntimeError:
                return None  # more shared memory, or more registers, than the GPU has

    asked = [(name, blocks) for name in PASSES for blocks in sizes(logits)]
    found: list[dict[str, Any]] = []
    with progress(2 * len(asked)) as step, ThreadPoolExecutor() as pool:
        compiled = []
        for one in pool.map(compile_one, asked):
            step("compile")
            compiled.append(one)
        for (name, blocks), program in zip(asked, compiled, strict=True):
            step(name)
            if program is None:
                continue
            run = timer(
                lambda program=program: jax.block_until_ready(
                    [program(*operands) for _ in range(calls)]
                )
            )
            try:
                run()
                seconds = statistics.median(run() for _ in range(repeats)) / calls
            except jax.errors.JaxRuntimeError:
                continue
            flops = PRODUCTS[name] * tokens**2 * heads * head_dim
            row = {"what": name, **asdict(blocks)}
            found.append(row | {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12})
    found.sort(key=lambda row: (PASSES.index(row["what"]), row["ms"]))
    best = [row for name in PASSES for row in [x for x in found if x["what"] == name][:SHOWN]]
    device = jax.devices()[0].device_kind
    show(f"{tokens} x {heads} x {head_dim} of {dtype} on {device}", COLUMNS, best, section="what")
    save(json_file, {"device": device, "dtype": dtype, "head_dim": head_dim, "rows": found})


if __name__ == "__main__":
    app()
