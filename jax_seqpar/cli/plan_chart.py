"""Memory and time of several plans against tokens or degree, the chip's memory drawn."""

from pathlib import Path
from typing import Any

from ..plan.report import Plan
from .plan_sizes import tokens_as_text
from .plan_table import degree_of


def require_matplotlib() -> Any:
    """Matplotlib's figure, or how to install it.

    Raises:
      ImportError: without Matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'--png: {error}. Write pip install "jax-seqpar[training]".') from None
    return Figure


def check_format(file: Path) -> None:
    """Raises unless Matplotlib is installed and writes files of this name's ending.

    Raises:
      ImportError: without Matplotlib.
      ValueError: for an ending of another format.
    """
    known = require_matplotlib()().canvas.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in {"", *known}:
        raise ValueError(
            f"--png {file}: Matplotlib does not write {file.suffix}. Write a name that ends in "
            f".png or .svg."
        )


def chart(plans: list[Plan], against: str, file: Path) -> None:
    """Writes the chart, as the ending of the file's name says."""
    figure = require_matplotlib()(figsize=(9, 4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    points = [degree_of(x) if against == "degree" else x.tokens or 0 for x in plans]
    _memory(memory, plans, points)
    _time(time, plans, points)
    for axes in (memory, time):
        axes.set_xscale("log", base=2)
        axes.set_xticks(points, [_label(x, against) for x in points])
        axes.minorticks_off()
        axes.set_xlabel("devices of a sequence" if against == "degree" else "tokens")
        axes.grid(alpha=0.3)
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    time.set_yscale("log")
    figure.suptitle(f"{plans[0].name}, {plans[0].topology}, {plans[0].devices} devices")
    figure.savefig(file, dpi=150)


def _memory(axes: Any, plans: list[Plan], points: list[int]) -> None:
    gib = 2**30
    known = [
        (x, p.memory.peak / gib) for x, p in zip(points, plans, strict=True) if p.memory is not None
    ]
    missed = [(x, p.needed / gib) for x, p in zip(points, plans, strict=True) if p.needed]
    if known:
        axes.plot(*zip(*known, strict=True), "o-", label="peak")
    if missed:
        axes.plot(*zip(*missed, strict=True), "x", color="tab:red", label="out of memory")
    chip = plans[0].chip
    if chip.memory:
        axes.axhline(chip.memory / gib, color="black", linestyle="--", label=f"a {chip.name} has")
    axes.set_title("memory of a device, GiB")
    axes.legend()


def _time(axes: Any, plans: list[Plan], points: list[int]) -> None:
    for name, marker in (("compute", "o-"), ("memory", "s-"), ("link", "^-")):
        values = [getattr(x.step, name) for x in plans]
        axes.plot(points, values, marker, label=name)
    axes.plot(points, [x.at_least for x in plans], "k.--", label="step, at least")
    axes.set_title("seconds at full speed")
    axes.legend()


def _label(point: int, against: str) -> str:
    return str(point) if against == "degree" else tokens_as_text(point)
