"""Cross entropy over all tokens of a mesh, with one rounding in each operation."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Integer

from .._checks import check_loss_options
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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
) -> Float32[Array, ""]:
    """The mean of `lse - (1 - e) z[label] - e mean(z) + c lse^2` over the labels that count.

    `lse` is `log(sum(exp(z)))`. `x_j = R(z_j - max z)`, `p = exp(x)`,
    `l = R(sum rint(p 2^32) 2^-32)`, `loss = log(l) (-) x_label`; with label smoothing e
    `loss = log(l) (-) R((1 - e) x_label + e (total(x) (/) V))`; with `lse = max z (+) log(l)` and
    z-loss c it is `loss (+) (c (*) (lse (*) lse))`. The mean is `total(losses) (/) N`.

    Args:
      logits: sharded in any way.
      labels: already shifted; one outside of the vocabulary gives NaN.
      normaliser: N; the labels that count if None.
      label_smoothing: e, from 0 to 1; it and 1 - e are rounded to float32.
      z_loss: c, from 0 to 2^126, rounded to float32.
      ignore_index: the label that does not count.

    Raises:
      ValueError: for a label smoothing or a z-loss out of range.
    """
    options = LossOptions(label_smoothing, z_loss, ignore_index)
    number = count_labels(labels, normaliser, ignore_index)
    return _cross_entropy(options, logits, labels, number)


@dataclass(frozen=True)
class LossOptions:
    """The numbers of a loss that no array holds; arguments as for `cross_entropy`."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = IGNORE

    def __post_init__(self) -> None:
        check_loss_options(self.label_smoothing, self.z_loss)


def count_labels(labels: Integer[Array, "B S"], normaliser: Any, ignore_index: int) -> Array:
    """N as float32: what was given, or how many labels count; 1 in place of 0."""
    number = (labels != ignore_index).sum() if normaliser is None else normaliser
    return jnp.asarray(jnp.maximum(number, 1)).astype(jnp.float32)


def log_probabilities(
    logits: Float32[Array, "B S V"], labels: Integer[Array, "B S"]
) -> Float32[Array, "B S"]:
    """`x_label (-) log(l)` of each token, with the x and l of `cross_entropy`: minus its loss.

    A sampler keeps these for the tokens that it has drawn, with the bits that a trainer finds for
    them. It has no derivative: differentiate `cross_entropy`.

    Args:
      logits: sharded in any way.
      labels: one outside of the vocabulary gives NaN.
    """
    return _log_probabilities(logits, labels)


@jax.custom_jvp
def _log_probabilities(logits: Array, labels: Array) -> Array:
    with jax.enable_x64(True):
        return -_without_z_loss(LossOptions(), _tokens(logits), logits, labels[..., None])[..., 0]


@_log_probabilities.defjvp
def _no_derivative(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"log_probabilities of logits {primals[0].shape} are differentiated, and have no "
        f"derivative. Write cross_entropy(logits, labels), or jax.lax.stop_gradient(logits)."
    )


class _Token(NamedTuple):
    """Intermediate results that the loss of a token and its gradient share."""

    shifted: Array
    weights: Array
    sums: Array
    lse: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options: LossOptions, logits: Array, labels: Array, number: Array) -> Array:
    with jax.enable_x64(True):
        return mean(token_losses(options, logits, labels), number)


def mean(losses: Float32[Array, "B S"], number: Float32[Array, ""]) -> Float32[Array, ""]:
    """`total(losses) (/) N`. Call inside `with jax.enable_x64(True):`."""
    return divide(total(losses, (0, 1))[0, 0], number)


def token_losses(
    options: LossOptions, logits: Float32[Array, "B S V"], labels: Integer[Array, "B S"]
) -> Float32[Array, "B S"]:
    """The loss of each token, 0 where its label does not count. In 64 bits, as `mean`."""
    token, label = _tokens(logits), labels[..., None]
    losses = _without_z_loss(options, token, logits, label)
    if options.z_loss:
        c = jnp.full_like(token.lse, np.float32(options.z_loss))
        losses = add(losses, multiply(c, multiply(token.lse, token.lse)))
    return jnp.where(label != options.ignore_index, losses, jnp.float32(0))[..., 0]


def _without_z_loss(options: LossOptions, token: _Token, logits: Array, label: Array) -> Array:
    """`log(l) (-) aim`; NaN for a label outside of the vocabulary."""
    # A sum of one number and zeros, and no lookup: the vocabulary may be sharded.
    aim = jnp.where(_vocabulary(logits) == label, token.shifted, 0).sum(-1, keepdims=True)
    if options.label_smoothing:
        e, k = _smoothing(options)
        m = divide(total(token.shifted, -1), jnp.float32(logits.shape[-1]))
        aim = nearest(k * flush(aim) + e * flush(m))
    losses = subtract(log(token.sums), aim)
    valid = (label >= 0) & (label < logits.shape[-1])
    return jnp.where(valid, losses, jnp.float32(jnp.nan))


def _smoothing(options: LossOptions) -> tuple[Array, Array]:
    """e and `k = 1 - e`, each rounded to float32, as float64."""
    e = options.label_smoothing
    return jnp.float64(np.float32(e)), jnp.float64(np.float32(1 - e))


def _tokens(logits: Array) -> _Token:
    top = jnp.max(flush(logits), axis=-1, keepdims=True)
    shifted = nearest(flush(logits) - top)
    weights = exp(shifted)
    sums = jnp.rint(weights.astype(jnp.float64) * 2.0**WEIGHT_BITS).sum(-1, keepdims=True)
    sums = nearest(sums * 2.0**-WEIGHT_BITS)
    return _Token(shifted, weights, sums, add(nearest(top), log(sums)))


def _vocabulary(logits: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)


def logit_gradients(
    options: LossOptions,
    logits: Float32[Array, "B S V"],
    labels: Integer[Array, "B S"],
    share: Float32[Array, ""],
) -> Float32[Array, "B S V"]:
    """The gradient of the logits, of which each token's part of the mean is `share`."""
    token, label = _tokens(logits), labels[..., None]
    w = multiply(token.weights, divide(jnp.ones_like(token.sums), token.sums))
    if options.z_loss:
        doubled = jnp.float64(np.float32(2 * np.float32(options.z_loss)))
        w = multiply(w, nearest(1.0 + doubled * flush(token.lse)))
    q = (_vocabulary(logits) == label).astype(jnp.float32)
    if options.label_smoothing:
        e, k = _smoothing(options)
        others = nearest(e / logits.shape[-1])
        q = jnp.where(q > 0, add(others, nearest(k)), others)
    dz = multiply(subtract(w, q), share)
    valid = (label >= 0) & (label < logits.shape[-1])
    dz = jnp.where(valid, dz, jnp.float32(jnp.nan))
    return jnp.where(label != options.ignore_index, dz, jnp.float32(0))


def share_of_token(number: Float32[Array, ""], g: Float32[Array, ""]) -> Float32[Array, ""]:
    """`(1 (/) N) (*) g`, g the gradient of the mean. In 64 bits, as `mean`."""
    return multiply(divide(jnp.ones_like(number), number), g)


def _forward(options: LossOptions, logits: Array, labels: Array, number: Array):
    return _cross_entropy(options, logits, labels, number), (logits, labels, number)


def _backward(options: LossOptions, saved: Any, g: Array):
    logits, labels, number = saved
    with jax.enable_x64(True):
        share = share_of_token(number, g)
        return logit_gradients(options, logits, labels, share), None, None


_cross_entropy.defvjp(_forward, _backward)
