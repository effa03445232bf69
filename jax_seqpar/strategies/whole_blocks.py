"""Tokens dealt anew for a kernel whose blocks stay together, and dealt back.

Some sums of `Exact()` have one unit for each 256 consecutive tokens. Where an order deals whole
blocks, nothing moves: contiguous with a multiple of 256 tokens a device, a zigzag with one of 512.
Any other array is dealt block by block as its order deals tokens, so that the work stays as
balanced, with a permute for each distance that some token has to go.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._checks import Shape
from ..mask import AnyTokens, Mask, Spec
from ..mask.array_fields import Axes
from ..mesh_layout import AxisName
from ..order import Contiguous, TokenOrder
from ..varying_axes import full_varying
from .send import send


@dataclass(frozen=True)
class WholeBlocks(TokenOrder):
    """Blocks of consecutive tokens, dealt as an order deals tokens."""

    order: TokenOrder
    block: int

    def numbers(self, size: int, index: Any, degree: int) -> Any:
        blocks = self.order.numbers(size // self.block, index, degree)
        within = np.arange(self.block, dtype=np.int32)
        return (blocks[:, None] * self.block + within[None]).reshape(-1)

    def multiple(self, degree: int) -> int:
        return self.order.multiple(degree) * self.block


class Move(NamedTuple):
    """Tokens of every device that go `distance` places on; arrays `[P, most]`, by the sender.

    Attributes:
      source: their places in the array that is sent.
      target: their places in the array that is made; beyond its end where a device sends fewer.
    """

    distance: int
    source: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class Deal:
    """The tokens of an array in two orders: `before`, as a device has them, and `after`.

    Attributes:
      tokens: of the whole sequence; an array may hold greater numbers, which pad it.
      degree: devices of the axis.
      sizes: tokens of a device before and after.
    """

    tokens: int
    degree: int
    before: TokenOrder
    after: TokenOrder
    sizes: tuple[int, int]

    @classmethod
    def in_blocks(cls, order: TokenOrder, block: int, tokens: int, degree: int) -> "Deal":
        """Deal from an order to whole blocks, the same number on each device."""
        size = tokens // degree
        if block <= 1:  # 0 of an empty sequence
            return cls(tokens, degree, order, order, (size, size))
        multiple = order.multiple(degree) * block
        padded = -(-tokens // multiple) * multiple
        # Tokens of the contiguous order are a run, known by its start.
        after = order if order == Contiguous() else WholeBlocks(order, block)
        return cls(tokens, degree, order, after, (size, padded // degree))

    @property
    def added(self) -> int:
        """Tokens that pad the sequence."""
        return self.sizes[1] * self.degree - self.tokens

    def held(self, axis_name: AxisName) -> AnyTokens:
        """The tokens of this device afterwards."""
        return self.after.tokens(self.sizes[1], jax.lax.axis_index(axis_name), self.degree)

    def forth(self, x: Array, axis_name: AxisName) -> Array:
        """`[B, size, ...]` with its tokens as they are afterwards, 0 in place of those added."""
        return _moved(self, axis_name, x)

    def back(self, x: Array, axis_name: AxisName) -> Array:
        """Array in the order before `forth`, from the order of whole blocks."""
        return _moved(self.reversed, axis_name, x)

    @property
    def reversed(self) -> "Deal":
        before, after = self.sizes
        return Deal(self.tokens, self.degree, self.after, self.before, (after, before))

    @property
    def moves(self) -> list[Move]:
        """Moves of every device, to itself included; empty if all tokens are in their place."""
        if self.sizes[0] == self.sizes[1] and self.before == self.after:
            return []
        (sender, source), (receiver, target) = self._places(0), self._places(1)
        if np.array_equal(sender, receiver) and np.array_equal(source, target):
            return []
        distances = (receiver - sender) % self.degree
        moves = []
        for distance in np.unique(distances).tolist():
            own = np.flatnonzero(distances == distance)
            tables = _by_device(sender[own], source[own], target[own], self.degree, self.sizes[1])
            moves.append(Move(distance, *tables))
        return moves

    @property
    def received(self) -> int:
        """Tokens that a device receives from others."""
        return sum(move.source.shape[1] for move in self.moves if move.distance)

    def _places(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Device and place on the device of each token, before (side 0) or after (side 1)."""
        order, size = (self.before, self.after)[side], self.sizes[side]
        numbers = np.concatenate([order.numbers(size, i, self.degree) for i in range(self.degree)])
        places, is_token = np.empty(self.tokens, np.int64), numbers < self.tokens
        places[numbers[is_token]] = np.flatnonzero(is_token)
        return places // size, places % size


def deals(order: TokenOrder, block: int, tokens: tuple[int, ...], degree: int) -> list[Deal]:
    """Deals of arrays with these numbers of tokens into whole blocks.

    Args:
      block: `Kernel.block`; a shorter sequence is one block.
      tokens: of the queries, and of the keys where they are dealt, too.
    """
    block = min(block, max(tokens))
    return [Deal.in_blocks(order, block, n, degree) for n in tokens]


def numbers_dealt(deals: list[Deal], query: Shape, key: Shape, value: Shape) -> int:
    """Numbers that a device receives where query, key and value are dealt, and the output back.

    Args:
      deals: as `deals` gives them; of queries alone where keys stay.
    """
    moved = sum(deal.received * x[2] for deal, x in zip(deals, (query, key), strict=False))
    return query[0] * moved * (query[3] + value[3])


def padded(spec: Spec, batch: int, **deals: Deal) -> Spec:
    """The Spec of a sequence with the tokens that deals add, which attend to nothing.

    Args:
      deals: of "queries" and "keys".
    """
    added = {name: deal.added for name, deal in deals.items() if deal.added}
    if not added:
        return spec

    def pad(x: Array, axes: Axes) -> Array:
        widths = [
            (0, added[name] if name in added and n > 1 else 0)
            for n, name in zip(x.shape, axes, strict=True)
        ]
        return jnp.pad(x, widths, mode="edge")

    fields = {"queries": "query_seq_lengths", "keys": "key_value_seq_lengths"}
    lengths: Any = {fields[n]: jnp.full(batch, deals[n].tokens, jnp.int32) for n in added}
    spec = spec.map(pad)
    return replace(spec, mask=spec.mask & Mask(**lengths))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _moved(deal: Deal, axis_name: AxisName, x: Array) -> Array:
    if not (moves := deal.moves):
        return x
    index = jax.lax.axis_index(axis_name)
    out = full_varying((x.shape[0], deal.sizes[1], *x.shape[2:]), 0, x.dtype, x)
    for distance, source, target in moves:
        sent = jnp.take(x, jnp.asarray(source)[index], axis=1, mode="clip")
        received = send(sent, distance, axis_name) if distance else sent
        places = jnp.asarray(target)[(index - distance) % deal.degree]
        out = out.at[:, places].set(received, mode="drop")
    return out


def _moved_fwd(deal: Deal, axis_name: AxisName, x: Array) -> tuple[Array, None]:
    return _moved(deal, axis_name, x), None


def _moved_bwd(deal: Deal, axis_name: AxisName, _: None, gradient: Array) -> tuple[Array]:
    """Gradient of the move, which goes back without a sum, as no token is in two places."""
    return (_moved(deal.reversed, axis_name, gradient),)


_moved.defvjp(_moved_fwd, _moved_bwd)


def _by_device(
    sender: np.ndarray, source: np.ndarray, target: np.ndarray, degree: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tables `[P, most]` of the places of tokens, from lists of them; int32."""
    order = np.argsort(sender, kind="stable")
    counts = np.bincount(sender, minlength=degree)
    slot = np.arange(len(sender)) - np.repeat(np.cumsum(counts) - counts, counts)
    tables = (
        np.zeros((degree, counts.max()), np.int32),
        np.full((degree, counts.max()), end, np.int32),
    )
    for table, places in zip(tables, (source, target), strict=True):
        table[sender[order], slot] = places[order]
    return tables
