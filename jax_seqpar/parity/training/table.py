"""Runs of one training side by side, as a table a person can read."""

from collections.abc import Mapping

from rich import box
from rich.table import Table

from .run import TrainingResult
from .steps import Step, all_equal


def training_table(
    result: TrainingResult, *, beside: Mapping[str, list[Step]] = {}, rows: int = 20
) -> Table:
    """A row per step: the loss, its 32 bits, the SHA-256 of each run's step, equal or not.

    Args:
      beside: other runs by name, of which the bits of the loss are shown.
      rows: the most that are shown, half of them of the first steps and half of the last.
    """
    names = "step", "loss", "its bits", *result.runs, "equal", *beside
    # One space between columns: in a terminal of 80 columns every number is whole.
    table = Table(*names, box=box.SIMPLE, padding=0)
    steps = result.steps
    for n, row in enumerate(steps):
        if rows // 2 <= n < len(steps) - rows // 2:
            continue
        table.add_row(
            str(row[0].number),
            f"{row[0].loss:.6f}",
            row[0].loss_bits,
            *(step.sha256[:8] for step in row),
            "[green]yes" if all_equal(row) else "[bold red]no",
            *(run[n].loss_bits for run in beside.values()),
        )
    return table


def training_summary(result: TrainingResult) -> list[str]:
    """The verdict in a line, after a line for each run that differs."""
    first = next(iter(result.runs))
    found = {name: where for name, where in result.differences.items() if where is not None}
    lines = [f"{first} and {name}: {where}" for name, where in found.items()]
    steps = result.steps
    if not found and result.golden not in (None, result.sha256):
        lines.append(f"SHA-256 {result.sha256}, expected {result.golden}")
    if not result.passed:
        return [*lines, "NOT EQUAL: the training has other bits than it must have."]
    numbers = sum(x.size for x in steps[-1][0].arrays.values())
    golden = ", the hash that every machine has" if result.golden else ""
    return [
        f"EQUAL: {len(steps)} steps of {len(result.runs)} runs, {numbers:,} weights and moments "
        f"after each, 0 bits differ; SHA-256 {result.sha256[:8]}{golden}."
    ]
