"""The parity run's results as a table a person can read."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .parity import COLUMNS, Result


def parity_table(results: Sequence[Result]) -> Table:
    """One row per check: how many elements differ in each output, and the verdict."""
    title = "JAX against PyTorch: elements whose bits differ"
    table = Table(title=title, box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False)
    for column in ("case", "shape", "degree"):
        table.add_column(column, justify="right" if column == "degree" else "left", overflow="fold")
    for column in (*COLUMNS, "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    if any(result.sha256 for result in results):
        table.add_column("SHA-256", no_wrap=True)
    degree = None
    for result in results:
        if degree not in (None, result.degree):
            table.add_section()
        degree = result.degree
        cells = [_cell(result, column) for column in COLUMNS]
        style = "green" if result.passed else "bold red"
        table.add_row(
            escape(result.name),
            result.shape,
            str(result.degree),
            *cells,
            f"[{style}]{result.verdict}[/{style}]",
            *([(result.sha256 or "")[:8]] if len(table.columns) > 3 + len(COLUMNS) + 1 else []),
        )
    return table


def summary(results: Sequence[Result]) -> str:
    """The verdict in one line."""
    failed = sum(not r.passed for r in results)
    controls = [r for r in results if r.must_differ and r.expected != "rounded"]
    plain = [report for r in results if r.expected == "rounded" for report in r.reports.values()]
    equal = [r for r in results if not r.must_differ]
    if failed:
        return f"NOT EQUAL: {failed} of {len(results)} checks failed."
    bits = sum(report.total for r in equal for report in r.reports.values())
    caught = f"; {len(controls)} wrong versions caught" if controls else ""
    rounded = ""
    if plain:
        share = sum(x.differing for x in plain) / sum(x.total for x in plain)
        rounded = f"attention that is not exact differs in {100 * share:.0f} % of the elements"
    if not equal:
        return f"DIFFERENT, as plain kernels must be: {rounded}."
    parts = [f"EQUAL: {len(equal)} checks, {bits:,} elements, 0 bits differ{caught}", rounded]
    return "; ".join(filter(None, parts)) + "."


def _cell(result: Result, column: str) -> str:
    if result.error is not None:
        return "error" if column == COLUMNS[0] else "-"
    report = result.reports.get(column)
    if report is None:
        return "-"
    if report.equal:
        return "0"
    shapes = {leaf.shape_a == leaf.shape_b for leaf in report.leaves}
    return f"{report.differing:,}" if shapes == {True} else "shape"
