"""Times of the kernels on one NVIDIA GPU, beside `jax.nn`'s cuDNN and PyTorch's flash attention.

    export XLA_PYTHON_CLIENT_PREALLOCATE=false
    python examples/benchmark_gpu.py kernels
    python examples/benchmark_gpu.py masks --tokens 8192 --json results.json

`kernels`: causal attention of one sequence, bfloat16 but where a row says otherwise, forward alone
and forward with gradients. Medians of repeats that take turns, each of several calls; TFLOP/s
counts the pairs that attend: 2 S^2 N H forward, 7 S^2 N H in all. `fused` is the kernel that
`dot_product_attention` chooses; it should cost what cuDNN costs. `triton` is what it chooses where
cuDNN lacks what is asked. Float32 products of a GPU have 10 bits unless
`jax.default_matmul_precision` says otherwise; exact attention takes float64.

`masks`: every mask and option by each kernel that has it, beside cuDNN's causal attention, whose
pairs TFLOP/s counts in every row.
"""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import torch
import typer
from benchmark_tools import PASSES, Run, planned, progress, save, show, take_turns, timer
from torch.nn.attention import SDPBackend, sdpa_kernel

from jax_seqpar import (
    Dropout,
    Logits,
    Mask,
    Triton,
    blockwise_attention,
    choose_kernel,
    exact_attention,
    fused_attention,
)

CUDNN = "jax.nn, cuDNN"
# With the tokens beyond which a row takes seconds, and is left out.
KERNELS: dict[str, tuple[Any, Any, float]] = {
    CUDNN: (partial(jax.nn.dot_product_attention, implementation="cudnn"), jnp.bfloat16, math.inf),
    "fused": (fused_attention, jnp.bfloat16, math.inf),
    "triton": (Triton(), jnp.bfloat16, math.inf),
    "triton, float32": (Triton(), jnp.float32, math.inf),
    "blockwise": (blockwise_attention, jnp.bfloat16, 1 << 14),
    "blockwise, float32": (blockwise_attention, jnp.float32, 1 << 14),
    "exact, float32": (exact_attention, jnp.float32, 1 << 12),
}
CAUSAL = {"is_causal": True}
FLOPS = {"forward": 2, "both": 7}  # matrix products of S^2 N H, halved by causality

Heads = Annotated[int, typer.Option(min=1, help="Of query, key and value.")]
HeadDim = Annotated[int, typer.Option(min=16, help="Channels of a head.")]
Repeats = Annotated[int, typer.Option(min=1, help="After one to warm up.")]
Calls = Annotated[int, typer.Option(min=1, help="Of each repeat.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def options(S: int, heads: int) -> dict[str, dict[str, Any]]:
    """Masks and options beside causality, by the name of their row."""
    ids = jnp.arange(S, dtype=jnp.int32)[None] * 16 // S
    causal = Mask(is_causal=True)
    return {
        "causal": {"mask": causal},
        f"window {S // 8}": {"mask": Mask(True, local_window_size=(S // 8 - 1, 0))},
        "half the length": {
            "mask": Mask(True, key_value_seq_lengths=jnp.array([S // 2], jnp.int32))
        },
        "16 documents": {"mask": Mask(True, segment_ids=ids)},
        "positions": {"mask": Mask(True, positions=jnp.arange(S, dtype=jnp.int32)[None])},
        "soft cap": {"mask": causal, "logits": Logits(soft_cap=30.0)},
        "ALiBi": {
            "mask": causal,
            "logits": Logits(alibi_slopes=jnp.float32(0.5) ** jnp.arange(1.0, heads + 1)),
        },
        "sinks": {"mask": causal, "logits": Logits(sinks=jnp.zeros(heads))},
        "dropout": {"mask": causal, "dropout": Dropout(0.1, jnp.array([1, 2], jnp.uint32))},
    }


def jax_runs(
    attention: Any, dtype: Any, shape: tuple[int, ...], calls: int, asked: dict[str, Any]
) -> Any:
    """Returns forward, forward with gradients, and the bytes that each program plans."""
    inputs = [
        jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)
    ]
    attend = partial(attention, **asked)

    def both(query: Any, key: Any, value: Any, grad: Any) -> Any:
        out, pull = jax.vjp(attend, query, key, value)
        return out, pull(grad)

    programs = [
        jax.jit(attend).lower(*inputs[:3]).compile(),
        jax.jit(both).lower(*inputs).compile(),
    ]

    def run(program: Any, operands: Any) -> Run:
        return lambda: jax.block_until_ready([program(*operands) for _ in range(calls)][-1])

    runs = [run(p, x) for p, x in zip(programs, (inputs[:3], inputs), strict=True)]
    return runs, [planned(p) for p in programs]


def torch_runs(shape: tuple[int, ...], calls: int) -> list[Run]:
    """PyTorch's flash attention, heads first: without and with gradients."""
    B, S, N, H = shape
    of: Any = {"device": "cuda", "dtype": torch.bfloat16}
    query, key, value = (torch.randn(B, N, S, H, **of, requires_grad=True) for _ in range(3))
    grad = torch.randn(B, N, S, H, **of)

    def attend() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True
            )

    def forward() -> None:
        with torch.no_grad():
            for _ in range(calls):
                attend()
        torch.cuda.synchronize()

    def both() -> None:
        for _ in range(calls):
            torch.autograd.grad(attend(), (query, key, value), grad)
        torch.cuda.synchronize()

    return [forward, both]


def check_gpu() -> None:
    """Raises BadParameter unless JAX's default device is a GPU."""
    if jax.default_backend() != "gpu":
        raise typer.BadParameter("JAX sees no GPU.")


@app.command()
def kernels(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeat. Default: 4K, 16K, 64K.")
    ] = None,
    heads: Heads = 16,
    head_dim: HeadDim = 128,
    repeats: Repeats = 5,
    calls: Calls = 4,
    json_file: Json = None,
) -> None:
    """Seconds of one GPU's kernels, and their ratios to cuDNN's."""
    check_gpu()
    sizes = tokens or [4096, 16384, 65536]
    found: list[dict[str, Any]] = []
    rows_of_all = sum(1 + sum(most >= S for *_, most in KERNELS.values()) for S in sizes)
    with progress(rows_of_all * (repeats + 1)) as step:
        for S in sizes:
            shape = (1, S, heads, head_dim)
            rows, plans = {}, {}
            for what, (attention, dtype, most) in KERNELS.items():
                if most >= S:
                    runs, plans[what] = jax_runs(attention, dtype, shape, calls, CAUSAL)
                    rows[what] = [timer(run) for run in runs]
            if torch.cuda.is_available():
                rows["torch flash"] = [timer(run) for run in torch_runs(shape, calls)]
            found += with_rates(take_turns(rows, CUDNN, repeats, step), shape, calls, plans)
    show_table(found, heads, head_dim, device := jax.devices()[0].device_kind)
    save(json_file, {"baseline": CUDNN, "device": device, "calls": calls, "rows": found})


@app.command()
def masks(
    tokens: Annotated[int, typer.Option(min=128, help="Of query, key and value.")] = 16384,
    heads: Heads = 16,
    head_dim: HeadDim = 128,
    repeats: Repeats = 3,
    calls: Calls = 4,
    json_file: Json = None,
) -> None:
    """Seconds of every mask and option by every kernel that has it."""
    check_gpu()
    shape = (1, tokens, heads, head_dim)
    like: Any = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3
    subjects: list[tuple[str, Any, dict[str, Any]]] = [(CUDNN, KERNELS[CUDNN][0], CAUSAL)]
    for name, asked in options(tokens, heads).items():
        if choose_kernel(*like, platform="gpu", **asked).name == "cuDNN":
            subjects.append((f"{name}, cuDNN", fused_attention, asked))
        subjects.append((f"{name}, triton", Triton(), asked))
        subjects.append((f"{name}, blockwise", blockwise_attention, asked))
    with progress(len(subjects) * (repeats + 1)) as step:
        rows, plans = {}, {}
        for what, attention, asked in subjects:
            runs, plans[what] = jax_runs(attention, jnp.bfloat16, shape, calls, asked)
            rows[what] = [timer(run) for run in runs]
        found = take_turns(rows, CUDNN, repeats, step)
        found = with_rates(found, shape, calls, plans)
    show_table(found, heads, head_dim, device := jax.devices()[0].device_kind)
    save(json_file, {"baseline": CUDNN, "device": device, "calls": calls, "rows": found})


def with_rates(
    rows: list[dict[str, Any]], shape: tuple[int, ...], calls: int, plans: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows with milliseconds of a call, TFLOP/s of all causal pairs, and planned bytes."""
    _, S, heads, head_dim = shape
    for line in rows:
        for name in PASSES:
            seconds = line[name]["median"] / calls
            flops = FLOPS[name] * S**2 * heads * head_dim
            line[name] |= {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12}
        line |= {"tokens": S, "planned_bytes": plans.get(line["what"], [None, None])}
    return rows


def show_table(rows: list[dict[str, Any]], heads: int, head_dim: int, device: str) -> None:
    """Milliseconds, ratios, TFLOP/s and planned memory, by tokens."""
    columns = {"tokens": "tokens", "what": "what"}
    for name, heading in (("forward", "forward"), ("both", "fwd+bwd")):
        columns |= {f"{name}.ms": f"{heading}\nms", f"{name}.ratio": "\nratio"}
        columns |= {f"{name}.tflops": "\nTFLOP/s"}
    columns |= {"planned_bytes.0": "planned\nMB", "planned_bytes.1": "fwd+bwd\nMB"}
    title = f"Causal attention 1 x tokens x {heads} x {head_dim} on {device}; ratios to {CUDNN}"
    show(title, columns, rows, section="tokens")


if __name__ == "__main__":
    app()
