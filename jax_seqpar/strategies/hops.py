"""How many rounds of a ring a mask needs, in each direction, and which of them are at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ..mask import Mask
from ..order import TokenOrder

# Directions in which keys travel at once, their first round, and the one after their last.
Leg = tuple[tuple[int, ...], Any, Any]


def legs(
    mask: Mask, order: TokenOrder, queries: int, keys: int, degree: int, bidirectional: bool
) -> list[Leg]:
    """The rounds of a ring, one way after the other or those that both have at once.

    Args:
      queries, keys: T and S of the whole sequence.
    """
    before, after = hops(mask, order, queries, keys, degree, bidirectional)
    both: Any = 0
    if bidirectional:
        both = min(before, after) if isinstance(before, int) else jnp.minimum(before, after)
    all_legs: list[Leg] = [((1, -1), 0, both), ((1,), both, before), ((-1,), both, after)]
    return [leg for leg in all_legs if not (isinstance(leg[2], int) and leg[1] == leg[2])]


def hops(
    mask: Mask,
    order: TokenOrder,
    queries: int,
    keys: int,
    degree: int,
    bidirectional: bool = False,
) -> tuple[Any, Any]:
    """Rounds that bring the keys of devices before and after, as many as some device needs.

    Python integers where no array decides, so that whole transfers are left out of the program.
    Where documents do, integers that are the same on all devices of a program, whatever shard of
    the batch they have, or a device would wait for ever for one that sends no more.

    Args:
      queries, keys: T and S of the whole sequence.
      bidirectional: whether both directions are at once, so that the longer of them counts.
    """
    needed: Any = _by_place(mask, order, queries, keys, degree)
    if mask.segment_ids is None:
        before, after = _fewest(needed, bidirectional, np)
        return int(before), int(after)
    needed = needed & _by_documents(mask, order, degree)
    # All manual axes, as types do not say what varies under check_vma=False. Sorted, as all
    # processes have to compile one program. The table is reduced and not its result: the largest of
    # two pairs of numbers may be a pair that counts a device from both sides.
    axes = tuple(sorted(jax.sharding.get_abstract_mesh().manual_axes))
    if axes:
        needed = jax.lax.pmax(needed.astype(jnp.int32), axes) > 0
    return _fewest(needed, bidirectional, jnp)


def _by_place(
    mask: Mask, order: TokenOrder, queries: int, keys: int, degree: int
) -> Bool[np.ndarray, "P P"]:
    """True where some query of the first device may be near enough to some key of the second."""
    if mask.positions is not None:
        return np.ones((degree, degree), bool)
    before, after = mask.reach
    of_queries, of_keys = (_runs(order, tokens, degree) for tokens in (queries, keys))
    needed = np.zeros((degree, degree), bool)
    for a, runs in enumerate(of_queries):
        for b, others in enumerate(of_keys):
            for first, last in runs + mask.query_offset:
                low = -np.inf if before is None else first - before
                high = np.inf if after is None else last + after
                needed[a, b] |= bool(((others[:, 1] >= low) & (others[:, 0] <= high)).any())
    return needed


def _runs(order: TokenOrder, tokens: int, degree: int) -> list[np.ndarray]:
    """Runs of tokens of each device: the first and the last number of each, `[runs, 2]`."""
    runs = []
    for index in range(degree):
        numbers = order.numbers(tokens // degree, index, degree)
        if not len(numbers):
            runs.append(np.empty((0, 2), np.int32))
            continue
        ends = np.flatnonzero(np.diff(numbers) != 1)
        if len(ends) > 2 * degree:  # a stripe: as good as everywhere
            ends, numbers = ends[:0], np.array([numbers.min(), numbers.max()])
        first, last = np.append(0, ends + 1), np.append(ends, len(numbers) - 1)
        runs.append(np.stack([numbers[first], numbers[last]], 1))
    return runs


def _by_documents(mask: Mask, order: TokenOrder, degree: int) -> Bool[Array, "P P"]:
    """True where the documents of two devices, from the least to the greatest number, overlap."""
    (least, most), (key_least, key_most) = (
        _ends(order.reorder(ids, 1, degree), degree) for ids in mask.segment_ids
    )
    overlap = (least[:, :, None] <= key_most[:, None]) & (key_least[:, None] <= most[:, :, None])
    return overlap.any(0)


def _ends(ids: Array, degree: int) -> tuple[Array, Array]:
    """`[B, P]`: the least and the greatest segment id of each device."""
    of_device = ids.reshape(ids.shape[0], degree, -1)
    return of_device.min(2), of_device.max(2)


def _fewest(needed: Any, bidirectional: bool, xp: Any) -> tuple[Any, Any]:
    """Rounds before and after, of least sum, that bring every device's keys where they are needed.

    Of least maximum, and of these of least sum, where both directions are at once.

    The device o places before is that P - o places after, so either direction can bring its keys.
    """
    degree = needed.shape[0]
    # int32 whether 64 bits are on or not, as the loops that go so far.
    ranks = before = np.arange(degree, dtype=np.int32)
    offsets = ranks[1:]
    wanted = needed[ranks[None], (ranks[None] - offsets[:, None]) % degree].any(1)  # [P - 1]
    beyond = wanted[None] & (offsets[None] > before[:, None])  # [P, P - 1]
    after = xp.where(beyond, (degree - offsets)[None], 0).max(1, initial=0)
    # Where several have the least sum, the most before: causal masks end there.
    rounds = before + after
    if bidirectional:
        rounds = xp.maximum(before, after) * (2 * degree) + rounds
    best = xp.where(rounds == rounds.min(), before, 0).max()
    return best, after[best]
