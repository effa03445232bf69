"""The parity run's results as one HTML page, with pictures of every difference.

The page needs no network and no file beside it.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from .html_pictures import figure
from .pictures import Evidence
from .report import differing_cell, summary
from .run import COLUMNS, Result

TEMPLATE = Path(__file__).with_suffix(".html")
LEGEND = (
    "In a picture tokens run down and heads run across, one image for each sequence, whose number "
    "stands below it. Red differs, and green is equal. Where tokens or heads moved, two images "
    "follow, in which one colour marks the same channels: a hue for each token, from red to "
    "violet, lighter with the head. Bars count the finite elements that differ by 0, 1, 2 to 3, 4 "
    "to 7, ... units in the last place."
)


def html_report(results: Sequence[Result], lines: Sequence[str], about: dict[str, Any]) -> str:
    """One page: verdict, checks, pictures of what differs, hashes, command and versions.

    Args:
      results: of all degrees, in order, with their evidence.
      lines: how the inputs were read, as `plan.understood` says.
      about: "command", "versions" by package, "platform".
    """
    numbered = list(enumerate(results))
    shown = [(i, r) for i, r in numbered if not r.passed or _has_evidence(r.evidence)]
    failed = [x for x in shown if not x[1].passed]
    plain = [x for x in shown if x[1].passed and x[1].expected == "rounded"]
    wrong = [x for x in shown if x[1].passed and x[1].expected != "rounded"]
    body = [
        *(f"<p>{escape(line)}</p>" for line in lines),
        "<h2>Checks</h2><p class='pale'>How many elements of each output have other bits.</p>",
        *(_table(degree, numbered, {i for i, _ in shown}) for degree in _degrees(results)),
        f"<h2>Differences</h2><p class='pale'>{LEGEND}</p>" if shown else "",
        _section("What failed", failed, opened=True),
        _section("Wrong versions, which have to be caught", wrong),
        _section("Attention that is not exact, which has to differ", plain),
        _hashes(results),
    ]
    passed = all(result.passed for result in results)
    return _page(summary(results), passed, "\n".join(body), about)


def unfinished_report(about: dict[str, Any]) -> str:
    """The page of a run that has not ended, so that nobody reads the verdict of one before it."""
    return _page("The run did not end.", False, "", about)


def _page(verdict: str, passed: bool, body: str, about: dict[str, Any]) -> str:
    versions = {**about["versions"], "platform": about["platform"]}
    rows = (_row(name, version or "not installed") for name, version in versions.items())
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        verdict=escape(verdict),
        style=_style(passed),
        body=body,
        command=escape(about["command"]),
        versions="".join(rows),
    )


def _table(degree: int, results: Iterable[tuple[int, Result]], linked: set[int]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("check", *COLUMNS, "SHA-256", "verdict"))
    rows = "".join(_check(i, r, i in linked) for i, r in results if r.degree == degree)
    return (
        f'<table class="checks"><caption>Degree {degree}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _check(number: int, result: Result, linked: bool) -> str:
    name = f"{escape(result.name)} <span class='pale'>{escape(result.shape)}</span>"
    first = f'<a href="#check-{number}">{name}</a>' if linked else name
    differing = {column: differing_cell(result, column) for column in COLUMNS}
    labelled = {**differing, "SHA-256": (result.sha256 or "-")[:8]}
    rest = "".join(
        f'<td data-label="{label}"{" class=none" if x == "-" else ""}>{x}</td>'
        for label, x in labelled.items()
    )
    verdict = f'<td class="{_style(result.passed)}">{escape(result.verdict)}</td>'
    return f"<tr><td>{first}</td>{rest}{verdict}</tr>"


def _section(title: str, results: Sequence[tuple[int, Result]], *, opened: bool = False) -> str:
    if not results:
        return ""
    return f"<h3>{title}</h3>" + "".join(_details(i, result, opened) for i, result in results)


def _details(number: int, result: Result, opened: bool) -> str:
    evidence = result.evidence or Evidence("", {}, {})
    parts = [f"<p>{escape(evidence.about)}</p>"] if evidence.about else []
    if result.error is not None:
        parts.append(
            f"<p>PyTorch's pipeline ends with an error.</p><pre>{escape(result.error)}</pre>"
        )
    if result.golden not in (None, result.sha256):
        parts.append(f"<p>SHA-256 {result.sha256}, expected {result.golden}.</p>")
    figures = []
    for name, found in evidence.reshards.items():
        if isinstance(found, str):
            parts.append(f"<p>{name}: {escape(found)}</p>")
        else:
            figures.append(figure(name, found, ("right", "this version")))
    figures += (figure(name, x, ("JAX", "PyTorch")) for name, x in evidence.outputs.items())
    parts.append(f'<div class="figures">{"".join(figures)}</div>')
    if not result.passed:
        unequal = (f"{name}: {x}" for name, x in result.reports.items() if not x.equal)
        parts += (f"<pre>{escape(text)}</pre>" for text in unequal)
    state = f'<span class="{_style(result.passed)}">{escape(result.verdict)}</span>'
    title = f"<summary>{escape(result.name)}, degree {result.degree}: {state}</summary>"
    # An anchor below the title opens the section that it is in.
    inside = f'<div id="check-{number}">{"".join(parts)}</div>'
    return f"<details{' open' if opened else ''}>{title}{inside}</details>"


def _hashes(results: Sequence[Result]) -> str:
    """A row for each hash, with the checks and degrees that have it."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.sha256 is not None:
            found.setdefault(result.sha256, []).append(result)
    rows = []
    for sha256, same in found.items():
        names = ", ".join(dict.fromkeys(result.name for result in same))
        golden = "; as on every machine" if same[0].golden == sha256 else ""
        degrees = ", ".join(map(str, _degrees(same)))
        rows.append(
            f"<tr><td>{escape(names)}<br><span class='pale'>degree {degrees}{golden}</span>"
        )
        rows.append(f"<br><code>{sha256}</code></td></tr>")
    title = "<h2>SHA-256 of output and gradients</h2>"
    return f"{title}<table class='words'>{''.join(rows)}</table>" if rows else ""


def _has_evidence(evidence: Evidence | None) -> bool:
    return evidence is not None and bool(evidence.outputs or evidence.reshards)


def _degrees(results: Iterable[Result]) -> list[int]:
    return list(dict.fromkeys(result.degree for result in results))


def _style(passed: bool) -> str:
    return "passed" if passed else "failed"


def _row(name: str, value: str) -> str:
    return f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
