"""Writes the reference of the public names, one page for each package, from their docstrings.

python .ci/reference.py FOLDER
"""

import importlib
import pkgutil
import sys
import types
import warnings
from pathlib import Path

import pdoc
import pdoc.render

PACKAGE = "jax_seqpar"
# Flax names types in annotations that it does not import where they are read.
UNREADABLE = "Error parsing type annotation"


def packages() -> list[str]:
    """Packages whose `__init__` hands out public names, the package itself first."""
    found = pkgutil.walk_packages(importlib.import_module(PACKAGE).__path__, f"{PACKAGE}.")
    return [PACKAGE, *(module.name for module in found if module.ispkg)]


def main(folder: Path) -> None:
    """Writes the pages; a warning of the generator is an error."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=UNREADABLE)
    # Of what a package imports the generator shows the names of `__all__` alone.
    for name in packages():
        package = importlib.import_module(name)
        package.__all__ = [
            public
            for public, x in vars(package).items()
            if not public.startswith("_") and not isinstance(x, types.ModuleType)
        ]
    pages = "|".join(packages()).replace(".", r"\.")
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*packages(), rf"!(?!({pages})$)", output_directory=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
