"""Lines and tables on standard output, as wide as where they go."""

import os

from rich.console import Console


def stdout() -> Console:
    """Standard output, as wide as its terminal or COLUMNS; a file or a pipe has no width."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    return console


def say(console: Console, text: str, style: str | None = None) -> None:
    """Prints text as it is; a line is broken by the terminal alone, so that paths stay whole."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
