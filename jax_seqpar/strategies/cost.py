"""Costs of a strategy in one layer: bytes by link, seconds of attention, seconds of waiting."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from ..chips import Chip
from ..kernels import Kernel, blockwise_attention
from ..kernels.kernel import GRADIENT_PRODUCTS
from ..mask import Mask
from ..order import TokenOrder
from .all_gather import AllGatherKV
from .hops import legs
from .hybrid import Hybrid
from .ring import Ring
from .strategy import Degree, Shape, Strategy, bytes_of_others, share
from .ulysses import head_plan
from .whole_blocks import Deal, deals, numbers_dealt

# Of a chip's FLOP/s: cuDNN's and blockwise attention's on a GPU as measured (`examples/README.md`),
# the others by their likes. Only ratios matter, and only where strategies have other kernels.
EFFICIENCY = {"splash": 0.5, "cuDNN": 0.6, "triton": 0.3, "blockwise": 0.15, "": 0.15}
ON_GPU = EFFICIENCY | {"blockwise": 0.02}
SAMPLE = 256


@dataclass(frozen=True)
class Group:
    """The devices that share the tokens, and where the slow links are among them.

    Attributes:
      sizes: of the mesh axes of the tokens, major to minor.
      near: how many devices along each axis are of one slice or host.
    """

    sizes: tuple[int, ...]
    near: tuple[int, ...]

    @property
    def degree(self) -> int:
        return int(np.prod(self.sizes))

    @property
    def all_near(self) -> int:
        """Consecutive devices of the whole group that are of one slice or host."""
        count = 1
        for size, near in zip(reversed(self.sizes), reversed(self.near), strict=True):
            count *= near
            if near < size:
                break
        return count


@dataclass(frozen=True)
class Layer:
    """One attention: shapes of the global arrays, or of one data-parallel and tensor-parallel part.

    Attributes:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`.
      itemsize: bytes of one number.
      gradients: whether the backward pass counts.
      kernel: what a ring sends, and whether Ulysses may split the group of a KV head, depend on it.
    """

    query: Shape
    key: Shape
    value: Shape
    itemsize: int
    mask: Mask
    order: TokenOrder
    gradients: bool
    kernel: Kernel = blockwise_attention

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        return self.query, self.key, self.value

    @property
    def placed(self) -> Mask:
        """The part of the mask that Python values say: causality and window."""
        mask = self.mask
        if mask.positions is not None:
            return Mask()
        return Mask(
            is_causal=mask.is_causal,
            query_offset=mask.query_offset,
            local_window_size=mask.local_window_size,
        )

    def deals(self, degree: int, *, keys: bool) -> list[Deal]:
        """Deals of the queries, and with `keys` of the keys, into whole blocks."""
        tokens = (self.query[1], self.key[1]) if keys else (self.query[1],)
        return deals(self.order, self.kernel.block, tokens, degree)

    def bytes_dealt(self, degree: int, *, keys: bool) -> int:
        """Bytes that a device receives as its tokens are dealt in whole blocks, and dealt back."""
        numbers = numbers_dealt(self.deals(degree, keys=keys), *self.shapes)
        return numbers * self.itemsize * (2 if self.gradients else 1)

    def bytes_shared(self, key: Shape, value: Shape, devices: int, of: int) -> int:
        """Received by a device for the gradients of KV heads that others have, too."""
        return self.kernel.sharing_traffic(key, value, devices, of) if self.gradients else 0

    def memory(self, strategy: Strategy, degree: Degree) -> int:
        """`Strategy.memory` of this layer."""
        options: Any = {"gradients": self.gradients, "kernel": self.kernel}
        return strategy.memory(*self.shapes, degree=degree, itemsize=self.itemsize, **options)

    def work(self, degree: int) -> Float[np.ndarray, "P P"]:
        """`pairs` of this layer."""
        return pairs(self.placed, self.order, self.query[1], self.key[1], degree)


@dataclass(frozen=True)
class Cost:
    """Cost of one layer on the device with the largest share.

    Attributes:
      inside, between: bytes received from devices of the same slice or host, and from others.
      memory: bytes that a device holds at most, as `Strategy.memory`.
      attention: seconds, of the slowest device where they have unequal work.
      waiting: seconds of transfers under which no attention runs.
    """

    inside: int
    between: int
    memory: int
    attention: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.attention + self.waiting


def cost_of(strategy: Strategy, layer: Layer, group: Group, chip: Chip, efficiency: float) -> Cost:
    """The cost of a strategy by formula.

    Bytes forward are those of `Strategy.traffic`, less the rounds of a ring that a mask makes
    needless; with gradients those of the backward pass as well. Masks that are arrays, and
    documents, count as if they allowed everything.
    """
    seconds_per_pair = _flops_of_pair(layer) / (chip.flops * efficiency)
    if isinstance(strategy, Hybrid):
        return _of_hybrid(strategy, layer, group, chip, seconds_per_pair)
    degree, near = group.degree, group.all_near
    N, work = layer.query[2], layer.work(degree)
    if isinstance(strategy, Ring):
        return _of_ring(strategy, layer, group, chip, seconds_per_pair * N)
    if isinstance(strategy, AllGatherKV):
        busiest = work.sum(1).max() * N
        # Not its `traffic`, which is of tokens in their order.
        forward = bytes_of_others(layer.key, layer.value, degree, layer.itemsize)
        added = layer.bytes_dealt(degree, keys=False)
        added += layer.bytes_shared(layer.key, layer.value, degree, degree)
    else:
        plan = head_plan(N, layer.key[2], degree, layer.kernel)
        busiest = work.sum() * plan.query_heads / degree
        sent: Any = {"degree": degree, "itemsize": layer.itemsize, "kernel": layer.kernel}
        forward = strategy.traffic(*layer.shapes, **sent)
        heads = plan.sent_kv_heads // degree
        k, v = (share(x, x[1], heads) for x in (layer.key, layer.value))
        added = layer.bytes_shared(k, v, plan.copies, degree)
    received = forward * (2 if layer.gradients else 1) + added
    between = received * (degree - near) // max(degree - 1, 1)
    waiting = (received - between) / chip.inside + between / chip.between
    attention = busiest * seconds_per_pair * (1 + GRADIENT_PRODUCTS * layer.gradients)
    return Cost(received - between, between, layer.memory(strategy, degree), attention, waiting)


# Kept, as all candidates of one choice ask it of one mask, and the next eager call again.
@lru_cache(maxsize=256)
def pairs(
    mask: Mask, order: TokenOrder, queries: int, keys: int, degree: int
) -> Float[np.ndarray, "P P"]:
    """Number of attending pairs of one head, of queries of device row and keys of device column.

    Estimated from `SAMPLE` queries of each device, for a mask without arrays, see `Layer.placed`.
    """
    if not queries or not keys:
        return np.zeros((degree, degree))
    before, after = mask.reach
    of_keys = [np.sort(order.numbers(keys // degree, i, degree)) for i in range(degree)]
    work = np.zeros((degree, degree))
    for a in range(degree):
        numbers = order.numbers(queries // degree, a, degree)
        step = max(len(numbers) // SAMPLE, 1)
        places = numbers[step // 2 :: step].astype(np.int64) + mask.query_offset
        low = places - keys if before is None else places - before
        high = places + keys if after is None else places + after
        if before is None:
            low = np.full_like(places, -1)
        if after is None:
            high = np.full_like(places, keys)
        for b, own in enumerate(of_keys):
            seen = np.searchsorted(own, high, "right") - np.searchsorted(own, low, "left")
            work[a, b] = np.maximum(seen, 0).mean() * len(numbers) if len(places) else 0
    work.flags.writeable = False  # it is kept
    return work


_legs = lru_cache(maxsize=256)(legs)


def _of_ring(ring: Ring, layer: Layer, group: Group, chip: Chip, seconds_per_pair: float) -> Cost:
    """Each round the next keys and values travel under the attention to those that are here."""
    (B, _, K, H), V, degree = layer.key, layer.value[3], group.degree
    of_queries, of_keys = layer.deals(degree, keys=True)
    T, S = (deal.sizes[1] * degree for deal in (of_queries, of_keys))
    trips = _legs(layer.placed, of_queries.after, T, S, degree, ring.bidirectional)
    distances = {way: last for ways, _, last in trips for way in ways}
    keys = B * (S // degree) * K
    work = layer.work(degree)
    slow = group.all_near < degree
    link = chip.between if slow else chip.inside
    # A chip of a torus has a link from each neighbour, any other one for all that arrives.
    torus = chip.axes > 0 and not slow
    at_once = max if torus else sum
    devices = np.arange(degree)
    received = layer.bytes_dealt(degree, keys=True)
    attention, waiting = 0.0, received / link
    forward, backward = layer.kernel.turns(H, V, layer.itemsize)
    for turn in (*forward, *backward) if layer.gradients else forward:
        factor = seconds_per_pair * turn.work
        own = work.diagonal().max() * factor
        attention += own
        for ways, first, last in trips:
            for i in range(first + 1, last + 1):
                # What is added comes along, but where it only goes home.
                sent = keys * (turn.sent + (turn.added if last > 1 else 0))
                seen = sum(work[devices, (devices - way * i) % degree] for way in ways)
                busiest = np.max(seen) * factor
                attention += busiest
                waiting += max(at_once([sent] * len(ways)) / link - busiest, 0)
                received += sent * len(ways)
        # The way home, under a device's own attention: on a torus from neighbour to neighbour.
        home = [min(far, degree - far) if torus else 1 for far in distances.values()]
        waiting += max(at_once([0, *home]) * keys * turn.added / link - own, 0)
        received += keys * turn.added * len(home)
    links = (0, received) if slow else (received, 0)
    return Cost(*links, layer.memory(ring, degree), attention, waiting)


def _of_hybrid(
    strategy: Hybrid, layer: Layer, group: Group, chip: Chip, seconds_per_pair: float
) -> Cost:
    """Cost of a Hybrid: Ulysses within a group, around the outer strategy of one device's heads."""
    (R, U), (near_outer, near_inner) = group.sizes, group.near
    sent: Any = {"degree": (R, U), "itemsize": layer.itemsize, "kernel": layer.kernel}
    _, inner = strategy.traffic_by_axis(*layer.shapes, **sent)
    inner *= 2 if layer.gradients else 1
    _, (q, k, v) = strategy.divide(*layer.shapes, degree=(R, U), kernel=layer.kernel)
    copies = head_plan(layer.query[2], layer.key[2], U, layer.kernel).copies
    seen = k[1] if strategy.sees_all_keys else k[1] // R
    own_k, own_v = (share(x, seen, x[2]) for x in (k, v))
    inner += layer.bytes_shared(own_k, own_v, copies, U)
    between_groups = replace(layer, query=q, key=k, value=v, order=layer.order.grouped(U))
    groups = Group((R,), (near_outer,))
    efficiency = _flops_of_pair(layer) / (seconds_per_pair * chip.flops)
    outer = cost_of(strategy.outer, between_groups, groups, chip, efficiency)
    slow = inner * (U - near_inner) // max(U - 1, 1)
    waiting = outer.waiting + (inner - slow) / chip.inside + slow / chip.between
    links = outer.inside + inner - slow, outer.between + slow
    return Cost(*links, layer.memory(strategy, (R, U)), outer.attention, waiting)


def _flops_of_pair(layer: Layer) -> float:
    """FLOPs forward of one query and one key of one head in every sequence of the batch."""
    B, _, _, H = layer.query
    return 2.0 * B * (H + layer.value[3])
