"""The same training at degree 1, 2, 4 and 8, and with the historical bug in the second reshard.

    python examples/loss_by_degree.py --out loss_by_degree.png

The four curves coincide; the fifth is that of DeepSpeed 0.12.4 to 0.14.3 (token-first): shapes were
right, no error was raised, and every activation was scrambled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest import mock

import jax
import typer
from decoder import Config
from jax import Array
from long_context_training import Run, read, train
from loss_plot import plot
from rich.progress import track

DEGREES = (1, 2, 4, 8)


def scrambling_heads_to_sequence(x: Array, axis_name: str) -> Array:
    """`[B, S, n, H] -> [B, s, N, H]` as it once was: read in the order of arrival.

    After the exchange the part of each sender comes first, `[P, B, s, n, H]`; it has to be moved
    to the heads before they are joined, and was not.
    """
    P = jax.lax.axis_size(axis_name)
    B, S, n, H = x.shape
    parts = x.reshape(B, P, S // P, n, H).swapaxes(0, 1)
    received = jax.lax.all_to_all(parts, axis_name, split_axis=0, concat_axis=0, tiled=True)
    return received.reshape(B, S // P, P * n, H)


@contextmanager
def planted_bug() -> Iterator[None]:
    """Puts it into the strategy while the context lasts.

    The strategy is looked up when attention is traced. JAX keeps what it has traced, so the same
    sizes would be computed without the bug where they came before, and with it afterwards.
    """
    jax.clear_caches()
    try:
        where = "jax_seqpar.strategies.ulysses.heads_to_sequence"
        with mock.patch(where, scrambling_heads_to_sequence):
            yield
    finally:
        jax.clear_caches()


def main(
    out: Annotated[Path, typer.Option(help="A PNG.")] = Path("loss_by_degree.png"),
    tokens: int = 256,
    batch: int = 4,
    steps: int = 120,
    attention: str = "blockwise",
) -> None:
    """Trains at every degree, and plots."""
    jax.config.update("jax_num_cpu_devices", 8)
    text = read([], tokens)
    config = Config(features=64, hidden=192, layers=2)
    curves: dict[str, list[float]] = {}
    for degree in track(DEGREES, "training"):
        run = Run(degree=degree, tokens=tokens, batch=batch, steps=steps, attention=attention)
        curves[f"degree {degree}"] = train(run, text, config)
    with planted_bug():
        run = Run(degree=4, tokens=tokens, batch=batch, steps=steps, attention=attention)
        curves["degree 4, historical bug"] = train(run, text, config)
    plot(curves, out)
    first = curves["degree 1"]
    for label, losses in curves.items():
        apart = max(abs(a - b) for a, b in zip(losses, first, strict=True))
        print(f"{label:26} loss {losses[-1]:.4f}, at most {apart:.1e} from degree 1")


if __name__ == "__main__":
    typer.run(main)
