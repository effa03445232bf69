"""The `seqpar` command."""

from typing import Annotated

try:
    import packaging  # noqa: F401
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit('The seqpar command needs: pip install "jax-seqpar[cli]"') from error

from .. import __version__
from .certify_command import certify
from .doctor_command import doctor
from .parity_command import parity
from .plan_command import plan

# Without rich's panels, which cut the names of options and break paths at the width of a terminal.
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool | None) -> None:
    if asked:
        typer.echo(f"jax-seqpar {__version__}")
        raise typer.Exit


@app.callback()
def seqpar(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Sequence-parallel attention for JAX, compared bit for bit with PyTorch."""


app.command()(parity)
app.command()(certify)
app.command()(plan)
app.command()(doctor)
