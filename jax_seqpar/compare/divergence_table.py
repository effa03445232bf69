"""Table of the differences of two runs at every tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._extras import require
from .tensor_comparison import AXES, Row, along, axis_names, first_index, rows_of


def divergence_table(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    rtol: float = 0.0,
    axes: Sequence[str] = AXES,
) -> Any:
    """Differences of two runs at every tensor: where an error begins, and how it grows.

    Args:
      a, b, rtol, axes: as in `first_divergence`.

    Returns:
      a `rich.table.Table` with one row per tensor: its name and shape, the share of the elements
      that differ, the largest absolute difference, that relative to the largest magnitude in `a`,
      and in ULP, and the first token that differs. The first tensor that differs is in bold.

    Raises:
      ValueError, TypeError: as `first_divergence`.

    Example:
      rich.print(divergence_table(torch_activations, jax_activations, rtol=1e-5))
    """
    escape = require("rich.markup").escape
    table = require("rich.table").Table(
        title=f"Where two runs differ, rtol = {rtol}", box=require("rich.box").SIMPLE
    )
    table.add_column("tensor", overflow="fold")
    for column in ("shape", "differs", "max abs", "relative", "ULP", "first token"):
        table.add_column(column, justify="right")
    found = False
    for row in rows_of(a, b, rtol, axes):
        style = "bold red" if row.differs.any() and not found else None
        found = found or bool(row.differs.any())
        table.add_row(escape(row.name), *map(escape, _cells(row, axes)), style=style)
    return table


def _cells(row: Row, axes: Sequence[str]) -> list[str]:
    token = None
    if row.differs.any():
        names = axis_names(row.differs.ndim, axes)
        token = along(first_index(row.differs, names), names, "token")
    ulp = row.report.max_ulp
    return [
        "x".join(map(str, row.a.shape)) or "scalar",
        f"{100 * row.share:.3g}%",
        f"{row.report.max_abs:.3g}",
        f"{row.relative:.2g}",
        "-" if ulp is None else f"{ulp:,}",
        "-" if token is None else str(token),
    ]
