"""Wrong rings that `test_torch_ring` has to catch: each replaces functions of `torch_ref.ring`.

All are context managers, for the call and its gradients.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from torch_ref import ring
from torch_ref.rank_layout import Order, token_numbers
from torch_ref.ring import Sums


def replaced(name: str, function: Any) -> Any:
    return mock.patch.object(ring, name, function)


def sinks_at_every_hop(sinks: Tensor) -> Any:
    """The sink is merged again with every part."""

    def merge(a: Sums, b: Sums, right: Any = ring.merge) -> Sums:
        top = sinks[:, None, None].expand_as(b.top)
        sink = Sums(top, (top > -torch.inf).to(top.dtype), torch.zeros_like(b.weighted))
        return right(right(a, b), sink)

    return replaced("merge", merge)


@contextlib.contextmanager
def residual_of_the_last_hop() -> Iterator[None]:
    """Residual `top` and `total` of one part, which gradients divide by; the output is right."""
    parts = []

    def merge(a: Sums, b: Sums, right: Any = ring.merge) -> Sums:
        parts.append(b)
        return right(a, b)

    def finish(sums: Sums, right: Any = ring.finish) -> Any:
        _, top, total = right(parts[-1])
        return right(sums)[0], top, total

    with replaced("merge", merge), replaced("finish", finish):
        yield


def one_shift_short(degree: int) -> Any:
    """Gradients of keys and values that are not passed on after the last hop."""
    shifts = [0]

    def pass_on(group: Any, *tensors: Tensor, right: Any = ring.pass_on) -> Any:
        shifts[0] += 1
        # P - 1 forward; backward as many of keys and values, and P of their gradients.
        return list(tensors) if shifts[0] == 3 * degree - 2 else right(group, *tensors)

    return replaced("pass_on", pass_on)


def wrong_second_half() -> Any:
    """A zigzag whose second half is run P + r, in place of 2P - 1 - r."""

    def numbers(order: Order, size: int, rank: int, degree: int, *rest: Any) -> Tensor:
        half = size // 2
        runs = (torch.arange(half) + run * half for run in (rank, degree + rank))
        return torch.cat(tuple(runs))

    return replaced("token_numbers", numbers)


def local_numbers() -> Any:
    """Token numbers counted from 0 on every rank."""
    return replaced("token_numbers", lambda order, size, *rest: token_numbers(order, size, 0, 1))


@contextlib.contextmanager
def one_residual() -> Iterator[None]:
    """One residual, `top + log(total)`, in place of the two numbers."""

    def finish(sums: Sums, right: Any = ring.finish) -> Any:
        out, top, total = right(sums)
        return out, top + total.log(), torch.ones_like(total)

    with replaced("finish", finish):
        yield


def rounded_parts() -> Any:
    """Parts rounded to bfloat16, as by a kernel that returns its inputs' dtype."""

    def merge(a: Sums, b: Sums, right: Any = ring.merge) -> Sums:
        part = (b.weighted / b.total.clamp(min=1e-9)).bfloat16().to(b.total.dtype)
        return right(a, b._replace(weighted=part * b.total))

    return replaced("merge", merge)


def recorded(dtypes: list[tuple[torch.dtype, ...]]) -> Any:
    """The right ring, which adds the dtypes of what it sends to a list."""

    def pass_on(group: Any, *tensors: Tensor, right: Any = ring.pass_on) -> Any:
        dtypes.append(tuple(x.dtype for x in tensors))
        return right(group, *tensors)

    return replaced("pass_on", pass_on)
