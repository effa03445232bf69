"""The wrong published versions are wrong exactly where `TRUTH_TABLE` says, and nowhere else."""

from itertools import product
from typing import get_args

import pytest
import torch
from einops import rearrange

from torch_ref.wrong_versions import (
    SPECIFICATION,
    TRUTH_TABLE,
    WRONG_V1,
    WRONG_V2,
    WRONG_V5,
    WRONG_VERSIONS,
    Outcome,
    Version,
    classify,
    simulate,
)

CELLS = list(product(range(1, 5), repeat=4))  # P, b, s, hl

# v0, the first published version and a right one: split one axis, exchange, concatenate the other.
RIGHT_V0 = Version(
    "v0",
    "0.10.2 (#4198)",
    split=lambda x, scatter_idx, _, world_size: torch.stack(x.chunk(world_size, scatter_idx)),
    merge=lambda received, _, __, gather_idx, *___: torch.cat(received.unbind(0), gather_idx),
)


def test_table_has_a_row_for_every_version_layout_and_op():
    rows = set(product(WRONG_VERSIONS, ("sbhd", "bshd"), ("op1", "op2")))
    rows |= {(name, "mis-set bshd", "round trip") for name in ("v1", "v2")}
    assert set(TRUTH_TABLE) == rows


@pytest.mark.parametrize("row", TRUTH_TABLE, ids=" ".join)
def test_every_cell_is_what_the_table_says(row):
    name, layout, op = row
    stated = {cell: TRUTH_TABLE[row](*cell) for cell in CELLS}
    observed = {cell: classify(WRONG_VERSIONS[name], layout, op, *cell) for cell in CELLS}
    assert observed == stated


def test_table_contains_every_outcome():
    assert {stated(*cell) for stated in TRUTH_TABLE.values() for cell in CELLS} == set(
        get_args(Outcome)
    )


@pytest.mark.parametrize("key", SPECIFICATION, ids=" ".join)
def test_the_right_version_is_right_in_every_cell(key):
    assert {cell for cell in CELLS if classify(RIGHT_V0, *key, *cell) != "right"} == set()


@pytest.mark.parametrize("version", [WRONG_V1, WRONG_V2], ids=lambda version: version.name)
def test_round_trip_alone_misses_the_mis_set_axis(version):
    mis_set = "mis-set bshd", "round trip"
    passed = [cell for cell in CELLS if classify(version, *mis_set, *cell) == "right"]
    on_several_ranks = [cell for cell in passed if cell[0] > 1]
    assert on_several_ranks
    for P, b, s, hl in on_several_ranks:
        x = torch.arange(P * b * s * P * hl).reshape(P, b, s, P * hl, 1)
        got = simulate(version, x, 2, 0, 0)
        assert got.shape == (P, P * b, s, hl, 1)  # The chunks of the sequence sit in the batch.
        assert got.shape != rearrange(x, SPECIFICATION["bshd", "op1"], q=P).shape


def test_the_wrong_shape_of_v5_is_the_right_one_only_for_one_rank_with_b_equal_to_s():
    for P, b, s, hl in CELLS:
        if hl % P:
            continue
        x = torch.arange(P * P * s * b * hl * 2).reshape(P, P * s, b, hl, 2)
        right = rearrange(x, SPECIFICATION["sbhd", "op2"], p=P)
        assert torch.equal(simulate(WRONG_V5, x, 0, 2, 1), right) == (P == 1 and b == s)
