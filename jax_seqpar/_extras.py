"""The optional dependencies of the bridge."""

from importlib import import_module
from types import ModuleType


def require_torch() -> ModuleType:
    """Imports PyTorch, or says how to install it.

    Returns:
      the module `torch`.

    Raises:
      ImportError: if PyTorch cannot be imported.
    """
    return require("torch", "PyTorch")


def require(module: str, called: str | None = None) -> ModuleType:
    """Imports a module of the extra `parity`, or says how to install it.

    Args:
      module: its name, like "einops" or "rich.table".
      called: its name in the message, where that is not its package's name.

    Returns:
      the module.

    Raises:
      ImportError: if it cannot be imported.

    Example:
      einops = require("einops")
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{called or package} is needed here: pip install "jax-seqpar[parity]"', name=package
        ) from error
