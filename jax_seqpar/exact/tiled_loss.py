"""Cross entropy of hidden states, never with all the logits in memory, to the same bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Integer

from .._checks import check_count
from .arithmetic import LEAST_EXPONENT
from .engines import Engine
from .loss import (
    IGNORE,
    LossOptions,
    count_labels,
    logit_gradients,
    mean,
    share_of_token,
    token_losses,
)
from .matmul import (
    Numbers,
    balanced,
    check_terms,
    integer_sums,
    largest_exponents,
    matmul,
    rounded_sum,
)
from .sharding import explicit_sharding

LOGITS, HIDDEN, TABLE = "BSD,VD->BSV", "BSV,VD->BSD", "BSD,BSV->VD"


def tiled_cross_entropy(
    hidden: Float32[Array, "B S D"],
    table: Float32[Array, "V D"],
    labels: Integer[Array, "B S"],
    *,
    tiles: int,
    normaliser: Integer[Array, ""] | int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    engine: Engine | None = None,
) -> Float32[Array, ""]:
    """`cross_entropy` of the logits `mm(hidden, table^T)`: the same bits, of loss and gradients.

    Of the logits `[B, S / tiles, V]` are in memory at a time. They are found three times: for the
    loss, for the gradient of the hidden states and the exponents above that of the table, and for
    the integers of the latter, whose sum over the tiles is rounded once.

    Args:
      hidden: sharded in any way.
      table: of a tied embedding, or of an unembedding.
      labels: already shifted; one outside of the vocabulary gives NaN.
      tiles: how many; divides S, and on a mesh the tokens of each device. Tile i has every
        tiles-th token, from token i on, so that each device has its part of each tile.
      normaliser, label_smoothing, z_loss, ignore_index: as for `cross_entropy`.
      engine: of the products, as for `jax_seqpar.exact.matmul.matmul`.

    Raises:
      ValueError: for tiles that do not divide S, more tokens than a sum has room for, and options
        out of range.
    """
    check_tiles(tiles, hidden.shape)
    check_terms(TABLE, hidden.shape, (*hidden.shape[:2], table.shape[0]))
    options = LossOptions(label_smoothing, z_loss, ignore_index)
    number = count_labels(labels, normaliser, ignore_index)
    return _tiled(options, tiles, engine, hidden, table, labels, number)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(
    options: LossOptions,
    tiles: int,
    engine: Engine | None,
    hidden: Array,
    table: Array,
    labels: Array,
    number: Array,
) -> Array:
    with jax.enable_x64(True):

        def of_tile(_: None, tile: tuple[Array, Array]) -> tuple[None, Array]:
            logits = matmul(LOGITS, tile[0], table, engine=engine)
            return None, token_losses(options, logits, tile[1])

        _, losses = jax.lax.scan(of_tile, None, (_split(hidden, tiles), _split(labels, tiles)))
        return mean(_joined(losses), number)


def _forward(
    options: LossOptions, tiles: int, engine: Engine | None, *arrays: Array
) -> tuple[Array, Any]:
    return _tiled(options, tiles, engine, *arrays), arrays


def _backward(
    options: LossOptions, tiles: int, engine: Engine | None, saved: Any, g: Array
) -> tuple[Array, Array, None, None]:
    hidden, table, labels, number = saved
    with jax.enable_x64(True):
        share, given = share_of_token(number, g), (_split(hidden, tiles), _split(labels, tiles))

        def gradient(tile: tuple[Array, Array]) -> Array:
            logits = matmul(LOGITS, tile[0], table, engine=engine)
            return logit_gradients(options, logits, tile[1], share)

        def with_balance(tile: tuple[Array, Array]) -> tuple[Array, tuple[Numbers, Numbers]]:
            dz = gradient(tile)
            return dz, balanced(TABLE, tile[0], dz)

        def raise_exponents(met: Any, tile: tuple[Array, Array]) -> tuple[Any, Array]:
            dz, operands = with_balance(tile)
            met = _met(met, largest_exponents(TABLE, *operands))
            return met, matmul(HIDDEN, dz, table, engine=engine)

        V, D = table.shape
        least = tuple(jnp.full((1, 1, n), LEAST_EXPONENT, jnp.int32) for n in (D, V))
        met, dhidden = jax.lax.scan(raise_exponents, least, given)

        def add_integers(added: Any, tile: tuple[Array, Array]) -> tuple[Any, None]:
            _, operands = with_balance(tile)
            sums = integer_sums(TABLE, *operands, met, engine, explicit_sharding(table))
            return tuple(map(jnp.add, added, sums)), None

        zeros = (jnp.zeros_like(table, jnp.int64),) * 2
        sums, _ = jax.lax.scan(add_integers, zeros, given)
        return _joined(dhidden), rounded_sum(TABLE, sums, met), None, None


_tiled.defvjp(_forward, _backward)


def _met(some: tuple[Array, Array], others: tuple[Array, Array]) -> tuple[Array, Array]:
    """The exponents of two sets of tokens together."""
    return jnp.maximum(some[0], others[0]), jnp.maximum(some[1], others[1])


def _split(x: Array, tiles: int) -> Array:
    """`[B, S, ...]` to `[tiles, B, S / tiles, ...]`."""
    B, S, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, S // tiles, tiles, *rest), 2, 0)


def _joined(x: Array) -> Array:
    """The inverse of `_split`."""
    tiles, B, s, *rest = x.shape
    return jnp.moveaxis(x, 0, 2).reshape(B, s * tiles, *rest)


def check_tiles(tiles: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the tiles divide the tokens."""
    check_count("tiles", tiles)
    if shape[1] % tiles:
        raise ValueError(
            f"tiles = {tiles} must divide the tokens S of hidden {shape}. Write a divisor of "
            f"{shape[1]}."
        )
