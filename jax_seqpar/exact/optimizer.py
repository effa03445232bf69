"""AdamW and SGD with one rounding in each operation, as `optax.GradientTransformation`s.

An update is such that `optax.apply_updates`, a plain addition of float32, gives `w (+) update`. So
the loop around it stays that of any other optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int

from .._checks import check_decay_rate, check_finite
from .arithmetic import SMALLEST_NORMAL
from .rounding import add, divide, flush, multiply, nearest, square_root

# A float, or a function of the number of steps that were made.
LearningRate = float | Callable[[Int[Array, ""]], Any]


class AdamWState(NamedTuple):
    """Steps that were made, and the moments of each weight."""

    steps: Int[Array, ""]
    mean: Any
    square: Any


def adamw(
    learning_rate: LearningRate,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """AdamW (https://arxiv.org/abs/1711.05101) of float32 weights.

    `m = R(b1 m + c1 g)`, `v = R(b2 v + c2 (g (*) g))`,
    `u = (m (*) k1) (/) (R(sqrt(v (*) k2)) (+) epsilon)`, `update = R(-lr R(u + wd w))`. With
    c1 = 1 - b1 and k1 = 1 / (1 - b1^t), in float64 from the arguments, the power by repeated
    products, and each rounded once to float32; likewise c2 and k2.

    Args:
      learning_rate: at least 0, as are the other numbers.
      epsilon: a normal float32, without which a weight whose gradients were all 0 becomes 0 / 0.
      mask: of the weights that decay, a tree of booleans or a function from the weights to one;
        all of them if None.

    Raises:
      ValueError: for a number that is not finite in float32 or out of range. A schedule is not
        asked, nor are tracers, which the learning rate and epsilon may be; the other numbers are
        Python's: `optax.inject_hyperparams(adamw, static_args=("b1", "b2", "weight_decay"))`.
    """
    check_decay_rate("b1", b1, 0.9)
    check_decay_rate("b2", b2, 0.999)
    check_finite("epsilon", epsilon, 1e-8, least=SMALLEST_NORMAL)
    _check_rates(learning_rate, weight_decay)

    def init(params: Any) -> AdamWState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamWState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamWState]:
        check_has_params("adamw", params)
        count = state.steps + 1
        rate = _rate(learning_rate, state.steps)
        with jax.enable_x64(True):
            mean = jax.tree.map(lambda m, g: _moment(m, g, b1), state.mean, updates)
            square = jax.tree.map(
                lambda v, g: _moment(v, multiply(g, g), b2), state.square, updates
            )
            k1, k2 = (_correction(b, count) for b in (b1, b2))
            directions = jax.tree.map(
                lambda m, v: divide(
                    multiply(m, k1),
                    add(square_root(multiply(v, k2)), jnp.float32(epsilon)),
                ),
                mean,
                square,
            )
            changes = _decayed(directions, params, rate, weight_decay, mask)
        return changes, AdamWState(count, mean, square)

    return optax.GradientTransformation(init, update)


def sgd(
    learning_rate: LearningRate, momentum: float = 0.0, weight_decay: float = 0.0, mask: Any = None
) -> optax.GradientTransformation:
    """SGD: `m = R(mu m + g)`, `update = R(-lr R(m + wd w))`.

    Arguments and errors are those of `adamw`.
    """
    check_finite("momentum", momentum, 0.9)
    _check_rates(learning_rate, weight_decay)

    def init(params: Any) -> tuple[Array, Any]:
        return jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        check_has_params("sgd", params)
        count, before = state
        rate = _rate(learning_rate, count)
        with jax.enable_x64(True):
            mu = _float32(momentum)
            mean = jax.tree.map(lambda m, g: nearest(mu * flush(m) + flush(g)), before, updates)
            changes = _decayed(mean, params, rate, weight_decay, mask)
        return changes, (count + 1, mean)

    return optax.GradientTransformation(init, update)


def _moment(m: Array, g: Array, b: float) -> Array:
    return nearest(_float32(b) * flush(m) + _float32(1 - b) * flush(g))


def _correction(b: float, count: Array) -> Float32[Array, ""]:
    """`1 / (1 - b^count)`, the power by repeated products, which no library rounds in its way."""
    power = jax.lax.fori_loop(0, count, lambda _, p: p * jnp.float64(b), jnp.float64(1))
    return nearest(1 / (1 - power))


def _decayed(directions: Any, params: Any, rate: Array, weight_decay: float, mask: Any) -> Any:
    """The updates, of a size that no plain addition makes subnormal or -0."""
    decays = mask(params) if callable(mask) else mask
    if decays is None:
        decays = jax.tree.map(lambda w: True, params)

    def change(u: Array, w: Array, its: Any) -> Array:
        decay = jnp.where(its, _float32(weight_decay), 0.0)
        inner = nearest(flush(u) + decay * flush(w))
        step = nearest(-flush(rate) * flush(inner))
        vanishes = jnp.abs(flush(w) + flush(step)) < SMALLEST_NORMAL
        return jnp.where(vanishes, jnp.where(w == 0, jnp.float32(0), -w), step)

    return jax.tree.map(change, directions, params, decays)


def _rate(learning_rate: LearningRate, count: Array) -> Float32[Array, ""]:
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    return jnp.asarray(rate, jnp.float32)


def _float32(x: float) -> Any:
    """A float rounded to float32, as float64."""
    return jnp.float64(np.float32(x))


def _check_rates(learning_rate: LearningRate, weight_decay: float) -> None:
    if not callable(learning_rate):
        check_finite("learning_rate", learning_rate, 1e-3)
    check_finite("weight_decay", weight_decay, 0.01)


def check_has_params(name: str, params: Any) -> None:
    """Raises ValueError unless an optimizer is given the weights beside their gradients."""
    if params is None:
        raise ValueError(
            f"{name} needs the weights beside the gradients, got params={params}. Write "
            f"update(gradients, state, params)."
        )
