"""Errors of exact training against float64, as ratios to those of PyTorch's float32.

    python examples/accuracy_exact_training.py
    python examples/accuracy_exact_training.py --steps 200

Of each operation the rms of the errors of its output and of each gradient, on Gaussian inputs of
the sizes of a decoder of 256 features, divided by the same of PyTorch in float32. Then one training
in exact arithmetic (JAX), and in float32 and float64 (PyTorch): how far the losses are apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import ordinary_decoder as ordinary
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from jax_seqpar import exact_attention
from jax_seqpar.exact import activation, linear, loss, norm
from jax_seqpar.exact import rotary as exact_rotary
from jax_seqpar.parity.training.jax_side import train_in_jax
from jax_seqpar.parity.training.task import Training

B, S, D, F, N, K, H, V = 2, 256, 256, 704, 4, 2, 64, 256

# By name: the exact operation, the ordinary one, and the shapes of the operands.
Operation = tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]


def operations(labels: np.ndarray) -> dict[str, Operation]:
    """Operations of a decoder by name: exact, ordinary, and the shapes of their operands."""

    def project(x: Any, w: Any) -> Any:
        return linear.linear("BSD,DF->BSF", x, w)

    def rotate(x: Any) -> Any:
        return exact_rotary.rotary(x, jnp.arange(S)[None])

    def attend(*operands: Any) -> Any:
        return exact_attention(*operands, is_causal=True)

    of_labels = torch.from_numpy(labels.astype(np.int64))
    return {
        "linear": (project, ordinary.linear, [(B, S, D), (D, F)]),
        "linear, 2816 terms": (project, ordinary.linear, [(B, S, 4 * F), (4 * F, D)]),
        "RMSNorm": (lambda x, w: norm.rms_norm(x, w, 1e-5), ordinary.norm, [(B, S, D), (D,)]),
        "rotary": (rotate, ordinary.rotary, [(B, S, N, H)]),
        "rotary beside tables of float64": (
            rotate,
            partial(ordinary.rotary, tables=torch.float64),
            [(B, S, N, H)],
        ),
        "SwiGLU": (activation.swiglu, ordinary.swiglu, [(B, S, F), (B, S, F)]),
        "LayerNorm": (
            lambda x, w, b: norm.layer_norm(x, w, b, 1e-5),
            ordinary.layer_norm,
            [(B, S, D), (D,), (D,)],
        ),
        "GELU": (activation.gelu, ordinary.gelu, [(B, S, F)]),
        "attention": (attend, ordinary.attention, [(B, S, N, H), (B, S, K, H), (B, S, K, H)]),
        "cross entropy": (
            lambda z: loss.cross_entropy(z, jnp.asarray(labels)),
            lambda z: ordinary.cross_entropy(z, of_labels),
            [(B, S, V)],
        ),
    }


def of_jax(function: Callable[..., Any], arrays: list[np.ndarray], grad: np.ndarray) -> list[Any]:
    """Output and gradients of an operation of JAX."""
    out, pull = jax.vjp(jax.jit(function), *map(jnp.asarray, arrays))
    return [np.asarray(x, np.float64) for x in (out, *pull(jnp.asarray(grad)))]


def of_torch(
    function: Callable[..., Any], arrays: list[np.ndarray], grad: np.ndarray, dtype: torch.dtype
) -> list[Any]:
    """Output and gradients of an operation of PyTorch in a dtype."""
    leaves = [torch.from_numpy(x).to(dtype).requires_grad_() for x in arrays]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, torch.from_numpy(grad).to(dtype))
    return [x.detach().double().numpy() for x in (out, *gradients)]


def ratios(operation: Operation, rng: np.random.Generator) -> list[float]:
    """Errors of output and gradients, as ratios to those of float32."""
    exact, plain, shapes = operation
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    shape = plain(*map(torch.from_numpy, arrays)).shape
    grad = np.asarray(rng.standard_normal(shape), np.float32)
    truth = of_torch(plain, arrays, grad, torch.float64)
    found = of_jax(exact, arrays, grad), of_torch(plain, arrays, grad, torch.float32)
    ours, theirs = ([rms(x - y) for x, y in zip(side, truth, strict=True)] for side in found)
    return [x / y for x, y in zip(ours, theirs, strict=True)]


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(x**2)))


def main(
    steps: Annotated[int, typer.Option(min=1, help="Of the training.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Of the inputs; the median is shown.")] = 5,
) -> None:
    """Errors of the operations, and distances of the losses."""
    labels = np.random.default_rng(0).integers(0, V, (B, S)).astype(np.int32)
    table = Table("operation", "output", "1st gradient", "2nd", "3rd", box=box.SIMPLE)
    for name, operation in operations(labels).items():
        found = [ratios(operation, np.random.default_rng(seed)) for seed in range(seeds)]
        table.add_row(name, *(f"{x:.2f}" for x in np.median(found, axis=0)))
    console = Console()
    console.print(table)
    training = Training(steps=steps)
    exact = np.array([step.loss for step in train_in_jax(training, 1, 1)], np.float64)
    curves = {"exact": exact, "float32": ordinary.losses(training, torch.float32)}
    truth = ordinary.losses(training, torch.float64)
    console.print(f"{steps} steps, loss {truth[0]:.3f} to {truth[-1]:.3f}", highlight=False)
    for name, curve in curves.items():
        distance = np.abs(curve - truth)
        said = f"{name} from float64: at most {distance.max():.2g}, rms {rms(distance):.2g}"
        console.print(said, highlight=False)


if __name__ == "__main__":
    typer.run(main)
