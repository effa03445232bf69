"""The cases of `test_torch_ring` and what its ranks run.

Whole inputs are made on both sides; a rank cuts its own tokens out of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from rank_functions import failure, normal
from torch import Tensor
from wrong_torch_rings import (
    local_numbers,
    one_residual,
    one_shift_short,
    recorded,
    residual_of_the_last_hop,
    rounded_parts,
    sinks_at_every_hop,
    wrong_second_half,
)

from torch_ref.rank_layout import Order, split
from torch_ref.ring import ring_attention

ORDERS: tuple[Order, ...] = ("contiguous", "zigzag", "striped")
B, N, K, H, V = 2, 4, 2, 5, 3
LOCAL = 6  # tokens of a rank, S/P
RNG = torch.tensor([0x13198A2E, 0xF3707344])


@dataclass(frozen=True)
class Case:
    """Options by the number of keys S of the whole sequence, and sizes."""

    options: Callable[[int], dict[str, Any]]
    kv_heads: int = K
    value_dim: int = V
    local_queries: int = LOCAL

    def inputs(self, degree: int) -> list[Tensor]:
        """Query, key, value and output gradient."""
        T, S = self.local_queries * degree, LOCAL * degree
        shapes = ((T, N, H), (S, self.kv_heads, H), (S, self.kv_heads, self.value_dim))
        return [
            normal((B, *shape), seed)
            for seed, shape in enumerate((*shapes, (T, N, self.value_dim)))
        ]


def integers(shape: tuple[int, ...], high: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, shape))


def documents(S: int) -> Tensor:
    """Documents: one over all the ranks, and some of odd lengths, whose numbers come back."""
    lengths = (1, 5, S // 2 - 3, S - S // 2 - 3)
    several = torch.tensor([4, 2, 4, 1]).repeat_interleave(torch.tensor(lengths))
    return torch.stack((torch.full((S,), 7), several))


def shuffled(S: int) -> Tensor:
    """Positions `[B, S]` far from the tokens' numbers, some twice."""
    return integers((B, S), S, 11) * 2 - 5


def every_feature(S: int) -> dict[str, Any]:
    return {
        "is_causal": True,
        "local_window_size": (S // 2 + 1, None),
        "segment_ids": documents(S),
        "positions": torch.stack((torch.arange(S), torch.arange(S) // 2 + 3)),
        "query_seq_lengths": torch.tensor([S, S - 2]),
        "key_value_seq_lengths": torch.tensor([S - 1, S - 3]),
        "logits_soft_cap": 1.5,
        "alibi_slopes": normal((N,), 8),
        "sinks": normal((N,), 9),
        "dropout_rate": 0.3,
        "dropout_rng": RNG,
        "scale": 0.7,
    }


SINKS = torch.tensor([0.5, -torch.inf, 2.0, -1.0], dtype=torch.float64)
CASES = {
    "plain": Case(lambda S: {}),
    "causal": Case(lambda S: {"is_causal": True}),
    "window below S/P": Case(lambda S: {"local_window_size": (LOCAL - 1, 0)}),
    "window of S/P": Case(lambda S: {"local_window_size": (LOCAL, 0)}),
    "window above S/P": Case(lambda S: {"local_window_size": (LOCAL + 1, 0), "is_causal": True}),
    "window on both sides": Case(lambda S: {"local_window_size": 2}),
    "documents": Case(lambda S: {"segment_ids": documents(S), "is_causal": True}),
    "documents of queries and of keys": Case(
        lambda S: {"segment_ids": (documents(S), documents(S).flip(1) % 3)}
    ),
    "query lengths": Case(lambda S: {"query_seq_lengths": torch.tensor([S - 2, 5])}),
    "key lengths": Case(lambda S: {"key_value_seq_lengths": torch.tensor([0, LOCAL + 1])}),
    "positions": Case(lambda S: {"positions": shuffled(S), "is_causal": True}),
    "positions of queries and of keys": Case(
        lambda S: {"positions": (shuffled(S), shuffled(S).flip(1)), "local_window_size": (9, 4)}
    ),
    "offset": Case(lambda S: {"query_offset": -3, "is_causal": True}),
    "fewer queries": Case(
        lambda S: (
            {"query_offset": S // 3, "is_causal": True, "dropout_rate": 0.2}
            | {"dropout_rng": RNG, "alibi_slopes": normal((N,), 8)}
        ),
        local_queries=4,
    ),
    "ALiBi": Case(lambda S: {"alibi_slopes": normal((N,), 8)}),
    "soft cap": Case(lambda S: {"logits_soft_cap": 1.5}),
    "sinks": Case(lambda S: {"sinks": SINKS}),
    "sinks without keys": Case(lambda S: {"sinks": SINKS, "query_offset": -3, "is_causal": True}),
    "dropout": Case(lambda S: {"dropout_rate": 0.4, "dropout_rng": RNG}),
    "scale": Case(lambda S: {"scale": -0.3}),
    "every head": Case(lambda S: {"is_causal": True}, kv_heads=N),
    "multi-query": Case(lambda S: {"is_causal": True}, kv_heads=1, value_dim=7),
    "every feature": Case(every_feature),
}


def call(
    attend: Callable[..., Tensor], inputs: list[Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The output and the gradients of query, key, value, and of slopes and sinks if given.

    The clones keep the order of the axes in memory.
    """
    *operands, grad = inputs
    learned = {name: options[name] for name in ("alibi_slopes", "sinks") if name in options}
    leaves = dict(zip(("query", "key", "value"), operands, strict=True)) | learned
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out = attend(**(options | leaves))
    grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def on_this_rank(
    inputs: list[Tensor], options: dict[str, Any], order: Order, group: Any
) -> dict[str, Tensor]:
    """This rank's part of `call`, from whole inputs."""
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    held = [split(x, order, degree)[rank] for x in inputs]
    return call(partial(ring_attention, group=group, order=order), held, options)


Results = dict[str, Tensor]

# By name: the wrong ring by its degree, and the case and the order whose results show it.
MUTANTS: dict[str, tuple[Callable[[int], Any], str, Order]] = {
    "sinks at every hop": (lambda P: sinks_at_every_hop(SINKS), "sinks", "contiguous"),
    "residual of the last hop": (lambda P: residual_of_the_last_hop(), "plain", "contiguous"),
    "gradients one shift short": (one_shift_short, "plain", "contiguous"),
    "wrong second half": (lambda P: wrong_second_half(), "causal", "zigzag"),
    "lengths by local numbers": (lambda P: local_numbers(), "query lengths", "contiguous"),
    "dropout by local numbers": (lambda P: local_numbers(), "dropout", "striped"),
}

# Ranks of the four that share a sequence, by how many they are; None for the default group.
GROUPS = {1: (2,), 2: (1, 3), 3: (0, 2, 3), 4: None}


def all_rings(rank: int) -> dict[int, dict[str, Any]]:
    """Results of `test_torch_ring` that need ranks, in one launch, by the size of the group.

    Four ranks have groups of all sizes, for most of the time of a launch is the start of a rank.
    """
    groups = {degree: ranks and dist.new_group(list(ranks)) for degree, ranks in GROUPS.items()}
    return {
        degree: topics(group)
        for degree, group in groups.items()
        if rank in (GROUPS[degree] or range(4))
    }


def topics(group: Any) -> dict[str, Any]:
    degree = dist.get_world_size(group)
    rounding = bfloat16(group) if degree in (1, 4) else {}
    if degree == 1:
        return {"bfloat16": rounding}
    return {
        "cases": cases(group),
        "mutants": mutants(group),
        "large": {order: large(order, group) for order in ORDERS},
        "strided": strided(group),
        "refusals": refusals(group),
        "bfloat16": rounding,
    }


def of_case(name: str, order: Order, group: Any) -> Results:
    case, degree = CASES[name], dist.get_world_size(group)
    return on_this_rank(case.inputs(degree), case.options(LOCAL * degree), order, group)


def cases(group: Any) -> dict[tuple[str, Order], Results]:
    return {(name, order): of_case(name, order, group) for name, order in product(CASES, ORDERS)}


def large_inputs(degree: int) -> list[Tensor]:
    """Logits of about 1e5, all exact in float32: multiples of 1/16 below 2^17, with `scale=1`."""
    shapes = ((N, H), (K, H), (K, V), (N, V))
    inputs = [
        integers((B, LOCAL * degree, *shape), 9, seed).float() / 4 - 1
        for seed, shape in enumerate(shapes)
    ]
    inputs[0][..., 0] = inputs[1][..., 0] = 320.0
    return inputs


LARGE = {"scale": 1.0, "is_causal": True}


def large(order: Order, group: Any) -> Results:
    return on_this_rank(large_inputs(dist.get_world_size(group)), LARGE, order, group)


def strided(group: Any) -> Results:
    """The causal zigzag, of views that are not contiguous in memory."""
    degree, rank = dist.get_world_size(group), dist.get_rank(group)
    held = [split(x, "zigzag", degree)[rank] for x in CASES["causal"].inputs(degree)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in held]
    attend = partial(ring_attention, group=group, order="zigzag")
    return call(attend, views, {"is_causal": True})


def bfloat16_inputs() -> list[Tensor]:
    shapes = ((N, 32), (K, 32), (K, 32), (N, 32))
    return [normal((1, 256, *shape), seed).bfloat16() for seed, shape in enumerate(shapes)]


def bfloat16(group: Any) -> dict[str, Any]:
    """Outputs of the ring, the dtypes that it sent, and outputs of a ring that rounds its parts."""
    inputs, options, sent = bfloat16_inputs(), {"is_causal": True}, []
    with recorded(sent):
        right = on_this_rank(inputs, options, "zigzag", group)
    with rounded_parts():
        rounded = on_this_rank(inputs, options, "zigzag", group)
    return {"ring": right, "rounded parts": rounded, "sent": sent}


def mutants(group: Any) -> dict[str, Results]:
    results = {}
    for name, (wrong, case, order) in MUTANTS.items():
        with wrong(dist.get_world_size(group)):
            results[name] = of_case(case, order, group)
    with one_residual():
        results["one residual"] = large("contiguous", group)
    return results


def refusals(group: Any) -> dict[str, str]:
    """Errors of calls with arguments that do not fit, by the argument; nothing may be sent."""

    def x(tokens: int = LOCAL, heads: int = N, channels: int = H) -> Tensor:
        return torch.ones(B, tokens, heads, channels)

    degree = dist.get_world_size(group)
    few = torch.zeros(B, LOCAL, dtype=torch.int64)
    with mock.patch.object(dist, "batch_isend_irecv", side_effect=AssertionError("was sent")):
        calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
            "sent": ((x(), x(), x()), {}),
            "odd queries": ((x(5), x(), x()), {"order": "zigzag"}),
            "odd keys": ((x(), x(7), x(7)), {"order": "zigzag"}),
            "order": ((x(), x(), x()), {"order": "zig-zag"}),
            "local segments": ((x(), x(), x()), {"segment_ids": few}),
            "segments of keys": ((x(),) * 3, {"segment_ids": (few.repeat(1, degree), few)}),
            "local positions": ((x(), x(), x()), {"positions": few}),
            "lengths": ((x(), x(), x()), {"query_seq_lengths": torch.tensor(9)}),
            "KV heads": ((x(), x(heads=3), x(heads=3)), {}),
            "channels": ((x(), x(channels=4), x()), {}),
            "value": ((x(), x(), x(5)), {}),
            "three axes": ((x()[0], x(), x()), {}),
            "sinks": ((x(), x(), x()), {"sinks": torch.ones(K)}),
            "no key": ((x(), x(), x()), {"dropout_rate": 0.1}),
        }
        return {
            what: failure(ring_attention, *operands, group=group, **options)
            for what, (operands, options) in calls.items()
        }
