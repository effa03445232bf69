"""Flax's `precision` of products, for kernels that take the default precision of JAX."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax.lax import Precision


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
    name = check_precision(layer, precision).name.lower()
    return jax.default_matmul_precision(name)


def check_precision(layer: str, precision: Any) -> Precision:
    """The precision of both operands; raises ValueError unless both have the same one."""
    pair = precision if isinstance(precision, tuple | list) else (precision, precision)
    try:
        a, b = (Precision(p) for p in pair)
    except ValueError:
        a, b = None, None
    if a is None or a != b:
        raise ValueError(
            f"{layer} cannot carry precision = {precision!r} to the products of its kernel, which "
            f"take one jax.lax.Precision for both operands. Write jax.lax.Precision.HIGHEST or "
            f"'highest'; for a dot algorithm jax.default_matmul_precision(...) around the step."
        )
    return a
