"""Seconds of a step of exact training beside an ordinary one of float32, by part.

    python examples/benchmark_exact_training.py
    python examples/benchmark_exact_training.py --features 512 --tokens 4096 --json results.json

One layer of a decoder on JAX's default device: each part forward and with gradients, in the
arithmetic of `jax_seqpar.flax` that is exact and in the ordinary one; then the whole step. The
fastest of repeats that take turns, after a warm-up, as other work on the machine only adds time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from benchmark_tools import Step, Timer, progress, save, show, timer
from training_in_flax import ORDINARY_ADAMW, flax_decoder

from jax_seqpar import MeshLayout, dot_product_attention
from jax_seqpar.flax import Arithmetic, ExactArithmetic, Rotary
from jax_seqpar.parity.training.jax_side import (
    EXACT_ADAMW,
    LAYOUT,
    Optimizer,
    loaded,
    mesh_of,
    step_of,
)
from jax_seqpar.parity.training.task import Training
from jax_seqpar.training import TokenLayout

SIDES: dict[str, tuple[Arithmetic, Optimizer]] = {
    "float32": (Arithmetic(), ORDINARY_ADAMW),
    "exact": (ExactArithmetic(), EXACT_ADAMW),
}
COLUMNS = {"what": "part", "float32": "float32\nms", "exact": "exact\nms", "ratio": "\nratio"}
COLUMNS |= {"share": "of the parts'\nexact time, %"}

Part = tuple[Callable[..., Any], list[np.ndarray]]


def parts(training: Training, arithmetic: Arithmetic) -> dict[str, Part]:
    """Operations of a layer, embedding and loss, each a function of float32 arrays."""
    rng = np.random.default_rng(0)
    B, S, D, F = training.batch, training.tokens, training.features, training.hidden
    N, K, H, V = training.heads, training.kv_heads, training.head_dim, training.vocabulary

    def of(*shapes: tuple[int, ...]) -> list[np.ndarray]:
        return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    of_batch = {"layout": MeshLayout(tokens=None), "dtype": jnp.float32}

    def linear(x: Any, h: Any, o: Any, *kernels: Any) -> Any:
        inputs = (x, x, x, o, x, x, h)
        project = partial(arithmetic.project, "BSD,DF->BSF", dtype=jnp.float32)
        return [project(y, w) for y, w in zip(inputs, kernels, strict=True)]

    def attention(*operands: Any) -> Any:
        return dot_product_attention(*operands, is_causal=True, kernel=arithmetic.kernel)

    def norms(x: Any, scale: Any) -> Any:
        return [arithmetic.head_norm(x, scale, 1e-5) for _ in range(2)]

    def rotary(q: Any, k: Any) -> Any:
        positions = jnp.arange(S)[None]
        return [arithmetic.rotate(Rotary(), x, positions) for x in (q, k)]

    def cross_entropy(logits: Any) -> Any:
        return arithmetic.cross_entropy(logits, jnp.asarray(tokens), None)

    kernels = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    return {
        "linear, seven": (linear, of((B, S, D), (B, S, F), (B, S, N * H), *kernels)),
        "attention": (attention, of((B, S, N, H), (B, S, K, H), (B, S, K, H))),
        "RMSNorm, two": (norms, of((B, S, D), (D,))),
        "rotary": (rotary, of((B, S, N, H), (B, S, K, H))),
        "SwiGLU": (arithmetic.swiglu, of((B, S, F), (B, S, F))),
        "residual, two": (
            lambda x, y: arithmetic.add(arithmetic.add(x, y), y),
            of(*[(B, S, D)] * 2),
        ),
        "embedding": (lambda t: arithmetic.embed(t, jnp.asarray(tokens), **of_batch), of((V, D))),
        "unembedding": (arithmetic.unembed, of((B, S, D), (V, D))),
        "cross entropy": (cross_entropy, of((B, S, V))),
    }


def timer_of(part: Part) -> Timer:
    """Seconds of output and gradients."""
    function, arrays = part

    @jax.jit
    def both(operands: Any, gradient: Any) -> Any:
        out, pull = jax.vjp(function, *operands)
        return out, pull(gradient)

    operands = [*map(jnp.asarray, arrays)]
    gradient = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(function, *operands)
    )
    return timer(lambda: jax.block_until_ready(both(operands, gradient)))


def optimizer_and_step(training: Training, side: str) -> tuple[Timer, Timer]:
    """Seconds of clipping and AdamW, and of the whole step, under `jax.set_mesh`."""
    arithmetic, optimizer = SIDES[side]
    model, tx = flax_decoder(arithmetic, training, LAYOUT), optimizer.make(training)
    params, state = loaded(model, tx, optimizer, training.start())
    mesh: Any = jax.sharding.get_mesh()
    batch = TokenLayout(MeshLayout("seq", "data", mesh=mesh)).shard(next(training.batches()))
    update, step = jax.jit(tx.update), jax.jit(step_of(model, tx))
    return (
        timer(lambda: jax.block_until_ready(update(params, state, params))),
        timer(lambda: jax.block_until_ready(step(params, state, batch, jnp.int32(1)))),
    )


def rows_of(training: Training) -> dict[str, list[Timer]]:
    """Timers of each part and of the step: in float32, and exact."""
    by_side = []
    for side, (arithmetic, _) in SIDES.items():
        timers = {name: timer_of(part) for name, part in parts(training, arithmetic).items()}
        update, step = optimizer_and_step(training, side)
        by_side.append({**timers, "clip and AdamW": update, "whole step": step})
    return {name: [side[name] for side in by_side] for name in by_side[0]}


def turns(rows: dict[str, list[Timer]], repeats: int, step: Step) -> list[dict[str, Any]]:
    """Milliseconds of each row on both sides, their ratio, and its share of the exact parts."""
    times: dict[str, list[list[float]]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name, timers in rows.items():
            step(name)
            pair = [seconds() for seconds in timers]
            if repeat > 0:
                times[name].append(pair)
    fastest = {name: np.min(found, axis=0) * 1e3 for name, found in times.items()}
    parts = sum(exact for name, (_, exact) in fastest.items() if name != "whole step")
    return [
        {
            "what": name,
            "float32": float(ordinary),
            "exact": float(exact),
            "ratio": float(exact / ordinary),
            "share": None if name == "whole step" else float(100 * exact / parts),
        }
        for name, (ordinary, exact) in fastest.items()
    ]


def main(
    features: Annotated[int, typer.Option(min=64, help="A multiple of 64.")] = 256,
    tokens: Annotated[int, typer.Option(min=8, help="Of a step, in two sequences.")] = 2048,
    vocabulary: Annotated[int, typer.Option(min=8)] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="After one to warm up.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every number to this file.")
    ] = None,
) -> None:
    """Seconds of each part of a step, exact and ordinary, and their ratio."""
    training = Training(
        **{"vocabulary": vocabulary, "features": features, "hidden": features * 11 // 4},
        **{"layers": 1, "heads": features // 64, "kv_heads": 1, "head_dim": 64},
        **{"batch": 2, "tokens": tokens // 2, "steps": 1},
    )
    with jax.set_mesh(mesh_of(1, 1)), jax.numpy_dtype_promotion("standard"):
        rows = rows_of(training)
        with progress(len(rows) * (repeats + 1)) as step:
            found = turns(rows, repeats, step)
    title = f"A step of {tokens} tokens, one layer of {features} features, fwd+bwd"
    show(title, COLUMNS, found)
    save(json_file, {"rows": found})


if __name__ == "__main__":
    typer.run(main)
