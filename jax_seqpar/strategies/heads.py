"""Padding and replication of heads that the devices do not divide."""

from dataclasses import dataclass
from math import lcm

import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class HeadPlan:
    """Query heads in even parts, each with the KV heads that they read.

    KV heads are copied `first_copies` times and padded to `padded_kv_heads`; the `group` of query
    heads of each is padded to `padded_group`; then each KV head is copied `copies` times, once for
    every device that has query heads of its group. Added heads are 0, and computed for nothing.

    Example, 4 devices, with q for a query head and + for an added one:
      N = 6, K = 2   group 3 padded to 4, each KV head on two devices   qq q+ | qq q+
      N = 6, K = 3   KV heads padded to 4, each on a device             qq | qq | qq | ++
      N = 12, K = 6  KV heads copied twice, three on each device        qqq | qqq | qqq | qqq

    Attributes:
      kv_heads: K.
      group: N / K.
    """

    kv_heads: int
    group: int
    first_copies: int
    padded_kv_heads: int
    padded_group: int
    copies: int

    @property
    def query_heads(self) -> int:
        """Number of query heads with padding; every device gets an equal part."""
        return self.padded_kv_heads * self.padded_group

    @property
    def sent_kv_heads(self) -> int:
        """Number of KV heads with padding and all replicas; every device gets an equal part."""
        return self.padded_kv_heads * self.copies

    @property
    def is_trivial(self) -> bool:
        """Whether the query heads need no padding."""
        return self.query_heads == self.kv_heads * self.group

    def pad_queries(
        self, x: Shaped[Array, "..."], axis: int, fill: float | bool = False
    ) -> Shaped[Array, "..."]:
        """An axis of N query heads with those added, which hold `fill`."""
        if self.is_trivial:
            return x
        x = split_heads(x, axis, self.group // self.first_copies)
        x = _pad(x, axis, self.padded_kv_heads, fill)
        x = _pad(x, axis + 1, self.padded_group, fill)
        return merge_heads(x, axis)

    def unpad_queries(self, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
        """The N query heads of an axis that has the added ones too."""
        if self.is_trivial:
            return x
        x = split_heads(x, axis, self.padded_group)
        group = self.group // self.first_copies
        kv_heads = self.kv_heads * self.first_copies
        index = [slice(None)] * x.ndim
        index[axis], index[axis + 1] = slice(kv_heads), slice(group)
        return merge_heads(x[tuple(index)], axis)

    def spread_keys(self, x: Shaped[Array, "B S K H"]) -> Shaped[Array, "B S K2 H"]:
        """Keys or values, each KV head as often as it is needed, in the order of the devices."""
        x = repeat_heads(x, self.first_copies)
        return repeat_heads(_pad(x, 2, self.padded_kv_heads), self.copies)


def plan_heads(heads: int, kv_heads: int, degree: int, may_copy: bool = True) -> HeadPlan:
    """The plan with the fewest query heads per device, and among those the fewest KV heads to send.

    With copies it is `ceil(N / degree)` query heads for each device, always. Compared are plans
    in which every device has as many parts of groups, all of one size, as any other. A plan with
    parts of several sizes can send fewer KV heads.

    Args:
      heads, kv_heads: N and K; K divides N.
      degree: devices that share them.
      may_copy: False for a kernel that adds up the gradients of a KV head on the devices that have
        it: these are then a run of neighbours, as many for every KV head. That takes more query
        heads where the degree and K have no common factor: of 40, with K = 5 on 8 devices, 8 for
        each and not 5.
    """
    group = heads // kv_heads
    plans = []
    for first in (n for n in range(1, group + 1) if group % n == 0 and (may_copy or n == 1)):
        copied, rest = kv_heads * first, group // first
        fits = [d for d in range(copied, degree) if degree % d == 0]
        fits.append(-(-copied // degree) * degree)
        for padded in fits:
            copies = lcm(padded, degree) // padded
            plan = HeadPlan(kv_heads, group, first, padded, -(-rest // copies) * copies, copies)
            plans.append(plan)
    return min(plans, key=lambda p: (p.query_heads, p.sent_kv_heads, p.first_copies))


def repeat_heads(x: Shaped[Array, "B S K H"], copies: int) -> Shaped[Array, "B S K2 H"]:
    """Each head several times, side by side.

    The copies are stacked, so that the derivative adds their gradients one by one, in order, in the
    dtype of x.
    """
    B, S, K, H = x.shape
    return x if copies == 1 else jnp.stack([x] * copies, axis=3).reshape(B, S, K * copies, H)


def split_heads(x: Array, axis: int, size: int) -> Array:
    """An axis of heads as two: groups, and `size` heads of each."""
    # In numbers: another axis may be of size 0, and then -1 has no meaning.
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def merge_heads(x: Array, axis: int) -> Array:
    """The inverse of `split_heads`."""
    merged = x.shape[axis] * x.shape[axis + 1]
    return x.reshape(*x.shape[:axis], merged, *x.shape[axis + 2 :])


def _pad(x: Array, axis: int, size: int, fill: float | bool = False) -> Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=fill)
