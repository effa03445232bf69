"""Loss and gradients of several batches, added by the addition of exact training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from .rounding import add


def accumulated_value_and_grad(
    loss: Callable[..., Float32[Array, ""]],
) -> Callable[[Any, Any], tuple[Float32[Array, ""], Any]]:
    """A function of parameters and several batches: the sums of losses and of gradients.

    `(g_1 (+) g_2) (+) g_3`, in the order of the batches, and the losses likewise: another number of
    batches has other bits. One batch is in memory at a time.

    Args:
      loss: of float32 parameters and one batch. For the mean over all labels it divides by the
        number of labels that count in all batches: `jax_seqpar.training.micro_batches` gives
        batches with that normaliser.

    Returns:
      a function `(params, batches)` of arrays `[k, ...]` for k batches, differentiable no further.
    """

    def value_and_grad(params: Any, batches: Any) -> tuple[Array, Any]:
        def add_batch(added: Any, batch: Any) -> tuple[Any, None]:
            found = jax.value_and_grad(loss)(params, batch)
            with jax.enable_x64(True):
                return jax.tree.map(add, added, found), None

        # 0 (+) g is g, as no gradient is subnormal or -0.
        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, params)
        (value, gradients), _ = jax.lax.scan(add_batch, zeros, batches)
        return value, gradients

    return value_and_grad
