"""Derivatives that exact attention does not have: an error where one is taken."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiated(refusal: Callable[[], ValueError], x: Any) -> Any:
    """x, through which no derivative goes."""
    return x


@undifferentiated.defjvp
def _refuse(refusal: Callable[[], ValueError], primals: Any, tangents: Any):
    raise refusal()


def no_gradient(name: str) -> ValueError:
    """Error for a derivative that exact attention does not define."""
    return ValueError(
        f"exact attention has no gradient for {name}. Write jax.lax.stop_gradient({name}), or use "
        f"another attention."
    )


def no_bias_gradient_in_turns(degree: int) -> ValueError:
    """Error for the gradient of a bias where keys are visited in turns."""
    return ValueError(
        f"exact attention has no gradient for bias where keys go round a ring of {degree} devices. "
        f"Write strategy=jax_seqpar.Ulysses(), or jax.lax.stop_gradient(bias)."
    )


def _no_second_derivative() -> ValueError:
    """Error for the derivative of a gradient of exact attention."""
    return ValueError(
        "exact attention can be differentiated once, not twice, as its gradients are rounded like "
        "its output. Use jax_seqpar.dense_attention for second derivatives."
    )


# Second derivatives are undefined: the rule of the first one raises if its operands are
# differentiated again.
refuse_second_derivative = partial(undifferentiated, _no_second_derivative)
