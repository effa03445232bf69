"""Flax's `precision` of products, for kernels that take the default precision of JAX."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from . import refusals


def kernel_precision(layer: str, precision: Any) -> AbstractContextManager[Any]:
    """The context in which a kernel's products, forward and backward, have this precision.

    Args:
      layer: for the message.
      precision: as `jax.lax.dot_general` takes it; None changes nothing, so a
        `jax.default_matmul_precision` around the call holds.

    Raises:
      ValueError: for a pair of two different precisions, a dot algorithm, or a name that JAX does
        not know.
    """
    if precision is None:
        return nullcontext()
    name = refusals.check_precision(layer, precision).name.lower()
    return jax.default_matmul_precision(name)
