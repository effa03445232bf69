"""Cross entropy over all tokens of a mesh, with one rounding in each operation."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from .arithmetic import flush
from .elementary import exp, log
from .rounding import add, divide, multiply, nearest, subtract, total

WEIGHT_BITS = 32  # of a weight in the sum that divides it
IGNORE = -100


def cross_entropy(
    logits: Float32[Array, "B S V"],
    labels: Integer[Array, "B S"],
    *,
    normaliser: Integer[Array, ""] | int | None = None,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
) -> Float32[Array, ""]:
    """The mean over the labels that count of `log(sum(exp(z))) - z[label] + z_loss lse^2`.

    `x_j = R(z_j - max z)`, `p = exp(x)`, `l = R(sum rint(p 2^32) 2^-32)`,
    `loss = log(l) (-) x_label`; with `lse = max z (+) log(l)` and z-loss c it is
    `loss (+) (c (*) (lse (*) lse))`. The mean is `total(losses) (/) N`.

    Args:
      logits: sharded in any way.
      labels: already shifted; one outside of the vocabulary gives NaN.
      normaliser: N; the labels that count if None.
      z_loss: rounded to float32.
      ignore_index: the label that does not count.
    """
    counts = labels != ignore_index
    number = jnp.maximum(counts.sum() if normaliser is None else normaliser, 1)
    number = jnp.asarray(number).astype(jnp.float32)
    return _cross_entropy(z_loss, ignore_index, logits, labels, number)


def log_probabilities(
    logits: Float32[Array, "B S V"], labels: Integer[Array, "B S"]
) -> Float32[Array, "B S"]:
    """`x_label (-) log(l)` of each token, with the x and l of `cross_entropy`: minus its loss.

    What a sampler keeps of the tokens that it has drawn, with the bits that a trainer finds for
    them. It has no derivative: differentiate `cross_entropy`.

    Args:
      logits: sharded in any way.
      labels: one outside of the vocabulary gives NaN.
    """
    return _log_probabilities(logits, labels)


@jax.custom_jvp
def _log_probabilities(logits: Array, labels: Array) -> Array:
    with jax.enable_x64(True):
        return -_losses(_tokens(logits), logits, labels[..., None])[..., 0]


@_log_probabilities.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"log_probabilities of logits {primals[0].shape} are differentiated, and have no "
        f"derivative. Write cross_entropy(logits, labels), or jax.lax.stop_gradient(logits)."
    )


class _Token(NamedTuple):
    """What a token's loss and its gradient have in common."""

    shifted: Array
    weights: Array
    sums: Array
    lse: Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    z_loss: float, ignore_index: int, logits: Array, labels: Array, number: Array
) -> Array:
    with jax.enable_x64(True):
        token, label = _tokens(logits), labels[..., None]
        losses = _losses(token, logits, label)
        if z_loss:
            c = jnp.full_like(token.lse, np.float32(z_loss))
            losses = add(losses, multiply(c, multiply(token.lse, token.lse)))
        losses = jnp.where(label != ignore_index, losses, jnp.float32(0))
        return divide(total(losses, (0, 1, 2))[0, 0, 0], number)


def _losses(token: _Token, logits: Array, label: Array) -> Array:
    """`log(l) (-) x_label`; NaN for a label outside of the vocabulary."""
    # A sum of one number and zeros, and no lookup: the vocabulary may be sharded.
    of_label = jnp.where(_vocabulary(logits) == label, token.shifted, 0).sum(-1, keepdims=True)
    losses = subtract(log(token.sums), of_label)
    valid = (label >= 0) & (label < logits.shape[-1])
    return jnp.where(valid, losses, jnp.float32(jnp.nan))


def _tokens(logits: Array) -> _Token:
    top = jnp.max(flush(logits), axis=-1, keepdims=True)
    shifted = nearest(flush(logits) - top)
    weights = exp(shifted)
    sums = jnp.rint(weights.astype(jnp.float64) * 2.0**WEIGHT_BITS).sum(-1, keepdims=True)
    sums = nearest(sums * 2.0**-WEIGHT_BITS)
    return _Token(shifted, weights, sums, add(nearest(top), log(sums)))


def _vocabulary(logits: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)


def _forward(z_loss: float, ignore_index: int, logits: Array, labels: Array, number: Array):
    loss = _cross_entropy(z_loss, ignore_index, logits, labels, number)
    return loss, (logits, labels, number)


def _backward(z_loss: float, ignore_index: int, saved: Any, g: Array):
    logits, labels, number = saved
    with jax.enable_x64(True):
        token, label = _tokens(logits), labels[..., None]
        one = jnp.ones_like(token.sums)
        w = multiply(token.weights, divide(one, token.sums))
        if z_loss:
            doubled = jnp.float64(np.float32(2 * np.float32(z_loss)))
            w = multiply(w, nearest(1.0 + doubled * flush(token.lse)))
        is_label = _vocabulary(logits) == label
        share = multiply(divide(one, number), g)
        dz = multiply(nearest(flush(w) - is_label.astype(jnp.float64)), share)
        valid = (label >= 0) & (label < logits.shape[-1])
        dz = jnp.where(valid, dz, jnp.float32(jnp.nan))
        return jnp.where(label != ignore_index, dz, jnp.float32(0)), None, None


_cross_entropy.defvjp(_forward, _backward)
