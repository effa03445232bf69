"""The optional dependency of the bridge."""

from types import ModuleType


def require_torch() -> ModuleType:
    """Imports PyTorch, or says how to install it.

    Returns:
      the module `torch`.

    Raises:
      ImportError: if PyTorch cannot be imported.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            'PyTorch is needed here: pip install "jax-seqpar[parity]"', name="torch"
        ) from error
    return torch
