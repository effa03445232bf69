"""`seqpar certify`: whether exact attention has its bits on this machine."""

from importlib.util import find_spec
from typing import Annotated

import jax
import typer

from ..parity.torch_self_test import certificate_table, certificates
from .console import say, stdout


def certify(
    backend: Annotated[
        str | None, typer.Option(help="cpu, gpu or tpu. Default: JAX's default.")
    ] = None,
) -> None:
    """Ask JAX's backend, and PyTorch, whether exact attention has its bits on this machine.

    Without PyTorch, JAX alone is asked. Exit status: 0 if all that was asked can be trusted, 1 if
    not, 2 if JAX has no such backend.
    """
    console = stdout()
    try:
        jax.devices(backend)
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from None
    with console.status("asking"):
        found = certificates(backend)
    console.print(certificate_table(found))
    for certificate in found:
        style = "bold green" if certificate.trusted else "bold red"
        say(console, str(certificate), style=style)
    if find_spec("torch") is None:
        say(console, 'PyTorch is not installed, so it was not asked: "jax-seqpar[parity]" has it.')
    if not all(certificate.trusted for certificate in found):
        raise typer.Exit(1)
