"""A picture of losses by step, of one training or of several."""

from pathlib import Path
from typing import Any

import numpy as np


def plot(curves: dict[str, list[float]], file: Path) -> None:
    """Draws losses by step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    first = next(iter(curves.values()))
    for i, (label, losses) in enumerate(curves.items()):
        # Every step has another text: its own loss is faint, the mean of the last ten is the line.
        axes.plot(losses, color=f"C{i}", alpha=0.15, linewidth=0.8)
        means = [
            sum(last) / len(last)
            for last in (losses[max(0, j - 9) : j + 1] for j in range(len(losses)))
        ]
        # Curves that coincide with the first show as dashes on it.
        coincides = i > 0 and np.allclose(losses, first, atol=1e-2)
        dashes: Any = (4 * i, (4, 4 * len(curves))) if coincides else "-"
        axes.plot(means, color=f"C{i}", label=label, linestyle=dashes)
    axes.set(xlabel="step", ylabel="loss in nats per byte")
    axes.legend(frameon=False, handlelength=7)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
