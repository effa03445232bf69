"""Linear layers whose output and gradients are sums of integers."""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float32

from . import rounding
from .engines import Engine
from .matmul import balanced_matmul, matmul
from .sharding import PrimalSharding, explicit_sharding


def linear(
    letters: str,
    x: Float32[Array, "..."],
    kernel: Float32[Array, "..."],
    *,
    engine: Engine | None = None,
    out_sharding: Any = None,
) -> Float32[Array, "..."]:
    """`einsum(letters, x, kernel)`: `y = mm(x, W)`, `dx = mm(dy, W^T)`, `dW = mmT(x, dy)`.

    Args:
      letters: an einsum such as "BSD,DNH->BSNH"; axes that the kernel lacks are the tokens.
      engine, out_sharding: as for `jax_seqpar.exact.matmul.matmul`.
    """
    return _linear(letters.replace(" ", ""), engine, out_sharding, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(letters: str, engine: Engine | None, out_sharding: Any, x: Array, kernel: Array):
    with jax.enable_x64(True):
        return matmul(letters, x, kernel, engine=engine, out_sharding=out_sharding)


def _forward(letters: str, engine: Engine | None, out_sharding: Any, x: Array, kernel: Array):
    return _linear(letters, engine, out_sharding, x, kernel), (x, kernel)


def _backward(letters: str, engine: Engine | None, out_sharding: Any, saved: Any, dy: Array):
    x, kernel = saved
    operands, output = letters.split("->")
    of_x, of_kernel = operands.split(",")
    with jax.enable_x64(True):
        dx = matmul(
            f"{output},{of_kernel}->{of_x}",
            dy,
            kernel,
            engine=engine,
            out_sharding=explicit_sharding(x),
        )
        dkernel = balanced_matmul(
            f"{of_x},{output}->{of_kernel}",
            x,
            dy,
            engine=engine,
            out_sharding=explicit_sharding(kernel),
        )
    return dx, dkernel


_linear.defvjp(_forward, _backward)


@jax.custom_vjp
def add(a: Float32[Array, "..."], b: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`a (+) b`, a residual connection: the gradient of both is that of the sum."""
    with jax.enable_x64(True):
        return rounding.add(a, b)


def _add_forward(a: Array, b: Array) -> tuple[Array, tuple[PrimalSharding, PrimalSharding]]:
    return add(a, b), (PrimalSharding.of(a), PrimalSharding.of(b))


def _add_backward(primals: tuple[PrimalSharding, ...], dy: Array) -> tuple[Array, ...]:
    return tuple(primal.reshard(dy) for primal in primals)


add.defvjp(_add_forward, _add_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def fork(x: Float32[Array, "..."], uses: int) -> tuple[Float32[Array, "..."], ...]:
    """x, once for each of its uses, whose gradients are added from the first to the last.

    Where an array is used more than once JAX adds the gradients in an order that it chooses, which
    changes the last bit from three uses on.
    """
    return (x,) * uses


def _add_in_order(uses: int, _: None, gradients: tuple[Array, ...]) -> tuple[Array]:
    total = gradients[0]
    with jax.enable_x64(True):
        for gradient in gradients[1:]:
            total = rounding.add(total, gradient)
    return (total,)


fork.defvjp(lambda x, uses: (fork(x, uses), None), _add_in_order)


def add_bias(y: Float32[Array, "..."], bias: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """`y (+) bias`, of a bias that broadcasts to y, as `[F]` does to `[B, S, F]`.

    Its gradient is the total over the axes that it lacks or has of size 1.

    Raises:
      ValueError: a bias that does not broadcast to y.
    """
    sizes = zip(y.shape[::-1], bias.shape[::-1], strict=False)
    if bias.ndim > y.ndim or any(n not in (1, size) for size, n in sizes):
        raise ValueError(
            f"a bias broadcasts to y, got the bias {bias.shape} and y {y.shape}. Write a bias of "
            f"the last axes of y, such as {y.shape[-1:]}."
        )
    return _add_bias(y, bias)


@jax.custom_vjp
def _add_bias(y: Array, bias: Array) -> Array:
    with jax.enable_x64(True):
        return rounding.add(y, bias.reshape(_padded_shape(y, bias)))


def _padded_shape(y: Array, bias: Array) -> tuple[int, ...]:
    return (1,) * (y.ndim - bias.ndim) + bias.shape


def _bias_forward(y: Array, bias: Array) -> tuple[Array, tuple[Array, PrimalSharding]]:
    return _add_bias(y, bias), (bias, PrimalSharding.of(y))


def _bias_backward(saved: tuple[Array, PrimalSharding], dy: Array) -> tuple[Array, Array]:
    bias, of_y = saved
    with jax.enable_x64(True):
        shape = _padded_shape(dy, bias)
        summed = tuple(axis for axis, size in enumerate(shape) if size == 1)
        dbias = rounding.total(dy, summed) if summed else rounding.nearest(rounding.flush(dy))
        dbias = dbias.reshape(bias.shape)
    # dy has the shardings of y and of the bias together, where only one of them has an axis.
    return of_y.reshard(dy), PrimalSharding.of(bias).reshard(dbias)


_add_bias.defvjp(_bias_forward, _bias_backward)
