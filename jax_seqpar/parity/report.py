"""The parity run's results as a table a person can read."""

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from .run import COLUMNS, Result

# Dropped in this order where a table is too wide.
_DROPPED = (("SHA-256",), ("shape",), COLUMNS)
# Room that a case's name gets before columns are dropped for it; a longer word is folded.
_WORD = 24


def parity_table(results: Sequence[Result], width: int | None = None) -> Table:
    """One row per check: how many elements differ in each output, and the verdict.

    Args:
      results: of all degrees, in order.
      width: of the terminal. Where the table is wider, columns are left out; None for no limit.
    """
    columns = ["case", "shape", "degree", *COLUMNS, "verdict"]
    if any(result.sha256 for result in results):
        columns.append("SHA-256")
    rows = [dict(zip(columns, _cells(result), strict=False)) for result in results]

    def needs(column: str) -> int:
        if column == "case":
            words = (word for row in rows for word in row["case"].split())
            return max((len(column), *(min(len(word), _WORD) for word in words)))
        return max((len(column), *(len(row[column]) for row in rows)))

    dropped: list[str] = []
    for some in _DROPPED:
        if width is None or sum(needs(c) + 1 for c in columns) - 1 <= width:
            break
        dropped += [c for c in columns if c in some]
        columns = [c for c in columns if c not in some]

    title = "JAX against PyTorch: elements whose bits differ"
    caption = f"Left out for want of room: {', '.join(dropped)}." if dropped else None
    table = Table(
        title=title, caption=caption, box=box.SIMPLE, padding=0, show_edge=False, pad_edge=False
    )
    for column in columns:
        left = column in ("case", "shape", "SHA-256")
        table.add_column(
            column,
            justify="left" if left else "right",
            no_wrap=column != "case" or width is None,
            overflow="fold",
        )
    degree = None
    for result, row in zip(results, rows, strict=True):
        style = "green" if result.passed else "bold red"
        styled = row | {"case": escape(row["case"]), "verdict": f"[{style}]{row['verdict']}[/]"}
        if table.rows and row["degree"] != degree:
            table.add_section()
        degree = row["degree"]
        table.add_row(*(styled[c] for c in columns))
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


def _cells(result: Result) -> list[str]:
    """A row, in the order of the whole table's columns."""
    differing = (differing_cell(result, column) for column in COLUMNS)
    sha256 = (result.sha256 or "")[:8]
    return [result.name, result.shape, str(result.degree), *differing, result.verdict, sha256]


def differing_cell(result: Result, column: str) -> str:
    """Number of differing elements of an output, "error", "shape", or "-" without an output."""
    if result.error is not None:
        return "error" if column == COLUMNS[0] else "-"
    report = result.reports.get(column)
    if report is None:
        return "-"
    if report.equal:
        return "0"
    shapes = {leaf.shape_a == leaf.shape_b for leaf in report.leaves}
    return f"{report.differing:,}" if shapes == {True} else "shape"
