"""Versions of Python and of the packages that bits may depend on."""

import platform
from importlib.metadata import PackageNotFoundError, version

from .. import __version__


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that bits may depend on; None if not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "jax-seqpar": __version__,
    }
    for package in ("jax", "jaxlib", "numpy", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
