"""Three WRONG published versions of DeepSpeed-Ulysses' `single_all_to_all`: negative controls.

Never for use: a test that accepts one of them cannot see the bug. Written anew from a description.
`split` lays out a rank's tensor by destination, an all-to-all exchanges the leading axis, `merge`
lays out the result. The exchange stays outside, so that one version runs over real ranks
(`single_all_to_all`) and over a visible rank axis (`simulate`).

P ranks, b sequences, s local tokens, hl heads per rank; S = P*s, N = P*hl, d channels.
op1 is sequence to heads, from `[s, b, N, d]` (sbhd) or `[b, s, N, d]` (bshd) on each rank; op2 is
heads to sequence, from `[S, b, hl, d]` or `[b, S, hl, d]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

Layout = Literal["sbhd", "bshd", "mis-set bshd"]
Op = Literal["op1", "op2", "round trip"]
Outcome = Literal["right", "scrambled", "error", "reshaped"]


@dataclass(frozen=True)
class Version:
    """One way to do the two reshards.

    Attributes:
      name: as in `TRUTH_TABLE`.
      published: the DeepSpeed releases that contain it.
      split: `(input, scatter_idx, batch_dim_idx, world_size)` to `[P, ...]` by destination rank.
      merge: `(received, input_shape, scatter_idx, gather_idx, batch_dim_idx, world_size)` to the
        result, from `[P, ...]` by source rank.
    """

    name: str
    published: str
    split: Callable[[Tensor, int, int, int], Tensor]
    merge: Callable[[Tensor, Sequence[int], int, int, int, int], Tensor]


def single_all_to_all(
    version: Version,
    input: Tensor,
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    group: Any = None,
) -> Tensor:
    """Tensor that this rank gets; `partial(single_all_to_all, WRONG_V1)` fits `exchange=`."""
    world_size = dist.get_world_size(group)
    chunks = version.split(input, scatter_idx, batch_dim_idx, world_size).contiguous()
    received = torch.empty_like(chunks)
    dist.all_to_all_single(received.view(torch.uint8), chunks.view(torch.uint8), group=group)
    return version.merge(
        received, input.shape, scatter_idx, gather_idx, batch_dim_idx, world_size
    ).contiguous()


def simulate(
    version: Version, x: Tensor, scatter_idx: int, gather_idx: int, batch_dim_idx: int
) -> Tensor:
    """Tensors that all ranks get, `[P, ...]` from `[P, ...]`; raises the errors of PyTorch."""
    world_size, *shape = x.shape
    chunks = torch.stack([version.split(one, scatter_idx, batch_dim_idx, world_size) for one in x])
    received = chunks.transpose(0, 1)
    arguments = shape, scatter_idx, gather_idx, batch_dim_idx, world_size
    return torch.stack([version.merge(one, *arguments) for one in received])


def _wrong_v1_split(x: Tensor, scatter_idx: int, batch_dim_idx: int, world_size: int) -> Tensor:
    """Wrong: the axes before the scattered one are dropped (op2) or taken as one (op1)."""
    size, *rest = x.shape[scatter_idx:]
    if scatter_idx < 2:
        return x.reshape(world_size, size // world_size, *rest)
    return x.reshape(-1, world_size, size // world_size, *rest).transpose(0, 1)


def _wrong_v1_merge(
    received: Tensor,
    input_shape: Sequence[int],
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    world_size: int,
    *,
    swapped_with: int = 1,
) -> Tensor:
    """Wrong: the rank axis belongs before the gathered one, wherever the batch is."""
    if scatter_idx < 2:
        received = received.transpose(0, swapped_with)
    shape = list(input_shape)
    shape[scatter_idx] //= world_size
    shape[gather_idx] *= world_size
    return received.reshape(shape)


def _wrong_v5_split(x: Tensor, scatter_idx: int, batch_dim_idx: int, world_size: int) -> Tensor:
    """Split of version 5, which is right."""
    if scatter_idx == 2:
        return rearrange(x, "x y (p n) h -> p x y n h", p=world_size)
    batch_first, token_first = "b (p s) n h -> p b s n h", "(p s) b n h -> p s b n h"
    return rearrange(x, batch_first if batch_dim_idx == 0 else token_first, p=world_size)


def _wrong_v5_merge(
    received: Tensor,
    input_shape: Sequence[int],
    scatter_idx: int,
    gather_idx: int,
    batch_dim_idx: int,
    world_size: int,
) -> Tensor:
    """Wrong for token-first op2, which gets the shape that batch-first op1 would have."""
    if batch_dim_idx == 0:
        gathered = "b (p s) n h" if scatter_idx == 2 else "b s (p n) h"
        return rearrange(received, f"p b s n h -> {gathered}")
    if scatter_idx == 2:
        return rearrange(received, "p s b n h -> (p s) b n h")
    S, b, hl, d = input_shape
    return received.permute(1, 2, 0, 3, 4).reshape(b, world_size * S, hl // world_size, d)


WRONG_V1 = Version("v1", "0.12.4 to 0.14.3 (#4695)", _wrong_v1_split, _wrong_v1_merge)
WRONG_V2 = Version(
    "v2", "0.14.4 (#5664)", _wrong_v1_split, partial(_wrong_v1_merge, swapped_with=2)
)
WRONG_V5 = Version("v5", "0.16.3 to 0.19.5 (#6750)", _wrong_v5_split, _wrong_v5_merge)
WRONG_VERSIONS = {version.name: version for version in (WRONG_V1, WRONG_V2, WRONG_V5)}

# (gather_idx of op1, batch_dim_idx). The report of the bug left the default gather_idx for bshd.
LAYOUTS: dict[Layout, tuple[int, int]] = {"sbhd": (0, 1), "bshd": (1, 0), "mis-set bshd": (0, 0)}

# With the rank as the leading axis. Mis-set, only the round trip has a meaning: the identity.
SPECIFICATION: dict[tuple[Layout, Op], str] = {
    ("sbhd", "op1"): "p s b (q n) h -> q (p s) b n h",
    ("sbhd", "op2"): "q (p s) b n h -> p s b (q n) h",
    ("bshd", "op1"): "p b s (q n) h -> q b (p s) n h",
    ("bshd", "op2"): "q b (p s) n h -> p b s (q n) h",
    ("mis-set bshd", "round trip"): "p b s (q n) h -> p b s (q n) h",
}

# Outcome of each version for (P, b, s, hl). Scrambled: the right shape, the wrong data, no error.
# Reshaped: the right numbers in order, in the shape [b, P*S, hl/P, d].
TRUTH_TABLE: dict[tuple[str, Layout, Op], Callable[[int, int, int, int], Outcome]] = {
    ("v1", "sbhd", "op1"): lambda P, b, s, hl: "right",
    ("v1", "sbhd", "op2"): lambda P, b, s, hl: "right" if b == 1 or P == 1 else "scrambled",
    ("v1", "bshd", "op1"): lambda P, b, s, hl: "right" if b == 1 or P == 1 else "scrambled",
    ("v1", "bshd", "op2"): lambda P, b, s, hl: "right" if b == 1 else "error",
    ("v1", "mis-set bshd", "round trip"): lambda P, b, s, hl: (
        "right" if P == 1 or s == 1 else "scrambled"
    ),
    ("v2", "sbhd", "op1"): lambda P, b, s, hl: "right",
    ("v2", "sbhd", "op2"): lambda P, b, s, hl: "right" if b == 1 or s == 1 else "scrambled",
    ("v2", "bshd", "op1"): lambda P, b, s, hl: "right" if b == 1 or P == 1 else "scrambled",
    ("v2", "bshd", "op2"): lambda P, b, s, hl: (
        "error" if b > 1 else "right" if hl == 1 or (s == 1 and P == 1) else "scrambled"
    ),
    ("v2", "mis-set bshd", "round trip"): lambda P, b, s, hl: (
        "right" if b == 1 or s == 1 else "scrambled"
    ),
    ("v5", "sbhd", "op1"): lambda P, b, s, hl: "right",
    ("v5", "sbhd", "op2"): lambda P, b, s, hl: "error" if hl % P else "reshaped",
    ("v5", "bshd", "op1"): lambda P, b, s, hl: "right",
    ("v5", "bshd", "op2"): lambda P, b, s, hl: "right",
}


def expected_outcome(
    name: str, layout: Layout, P: int, b: int, s: int, heads: Sequence[int]
) -> Outcome:
    """Outcome of a whole pipeline with this version, by the truth table.

    Args:
      name: of the version.
      layout: "sbhd" or "bshd".
      P, b, s: ranks, sequences, local tokens.
      heads: per rank, of the query first and then of key and value.

    Returns:
      The worst of its reshards: an error ends it, a wrong shape shows before wrong data.
    """
    op1, op2 = TRUTH_TABLE[name, layout, "op1"], TRUTH_TABLE[name, layout, "op2"]
    outcomes: set[Outcome] = {op2(P, b, s, heads[0]), *(op1(P, b, s, hl) for hl in heads)}
    # v5's wrong shape [b, P*S, hl/P, d] can happen to be the right one.
    if "reshaped" in outcomes and (P, b) == (1, s):
        outcomes.remove("reshaped")
    worst_first: tuple[Outcome, ...] = ("error", "reshaped", "scrambled", "right")
    return next(outcome for outcome in worst_first if outcome in {*outcomes, "right"})


def classify(version: Version, layout: Layout, op: Op, P: int, b: int, s: int, hl: int) -> Outcome:
    """Outcome of a version that is run on unique labels, with 2 channels.

    Raises:
      AssertionError: for a result that is not one of the four outcomes.
    """
    tokens_idx, batch_dim_idx = LAYOUTS[layout]
    tokens, heads = (P * s, hl) if op == "op2" else (s, P * hl)
    shape = (P, tokens, b, heads, 2) if layout == "sbhd" else (P, b, tokens, heads, 2)
    x = torch.arange(P * tokens * b * heads * 2).reshape(shape)
    expected = rearrange(x, SPECIFICATION[layout, op], p=P, q=P)
    try:
        got = x
        if op != "op2":
            got = simulate(version, got, 2, tokens_idx, batch_dim_idx)
        if op != "op1":
            got = simulate(version, got, tokens_idx, 2, batch_dim_idx)
    except RuntimeError:
        return "error"

    in_order = torch.equal(got.flatten(), expected.flatten())
    # The version decides, not the shape: v5's wrong shape is right, too, with P = 1 and b = s.
    if version is WRONG_V5 and (layout, op) == ("sbhd", "op2"):
        assert in_order, "v5 keeps the order"
        assert got.shape == (P, b, P * P * s, hl // P, 2)
        return "reshaped"
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    return "right" if in_order else "scrambled"
