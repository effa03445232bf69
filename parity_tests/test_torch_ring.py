"""The PyTorch ring over real gloo ranks, against attention of the whole sequence in float64.

One launch of four ranks, with groups of 2, 3 and 4; the tests look at what came back.
"""

import re
from functools import cache

import pytest
import torch
from rank_functions import failure
from ring_cases import (
    CASES,
    GROUPS,
    LARGE,
    LOCAL,
    MUTANTS,
    ORDERS,
    all_rings,
    bfloat16_inputs,
    call,
    large_inputs,
)

from jax_seqpar.bridge import run_ranks
from torch_ref.dense import dense_attention
from torch_ref.rank_layout import join, split, split_tokens, token_numbers

# Whole on every rank: a rank's gradient is a term of a sum.
LEARNED = ("alibi_slopes", "sinks")
# Both are float64 attention of at most 24 tokens and 7 channels: some hundred operations, each off
# by at most 1.1e-16 of numbers of the size of the largest entry.
NEAR = 1e-12

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module", params=(2, 3, 4))
def degree(request):
    return request.param


@pytest.fixture(scope="module")
def four_ranks():
    return run_ranks(all_rings, 4)


@pytest.fixture
def ranks(four_ranks, degree):
    return of_group(four_ranks, degree)


def of_group(four_ranks, degree):
    return [four_ranks[rank][degree] for rank in GROUPS[degree] or range(4)]


def joined(parts, order):
    """The whole output and gradients, from what the ranks have."""
    return {
        name: stacked.sum(0) if name in LEARNED else join(stacked, order)
        for name in parts[0]
        for stacked in [torch.stack([part[name] for part in parts])]
    }


@cache
def expected(name, degree):
    case = CASES[name]
    return call(dense_attention, case.inputs(degree), case.options(LOCAL * degree))


def errors(got, truth):
    """Largest difference of each result by name, in units of the largest entry."""
    assert list(got) == list(truth)
    found = {}
    for name, x in got.items():
        assert x.shape == truth[name].shape, name
        difference = (x.double() - truth[name].double()).abs().max()
        found[name] = (difference / truth[name].double().abs().max()).item()
    return found


def within(found, bound):
    """Whether every error is within the bound; Python's `max` may pass over a NaN."""
    return all(error <= bound for error in found.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_whole_sequence(ranks, degree, name, order):
    got = joined([rank["cases"][name, order] for rank in ranks], order)
    found = errors(got, expected(name, degree))
    assert within(found, NEAR), found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ("query lengths", "key lengths", "offset", "sinks without keys"))
def test_a_query_without_a_key_has_an_output_and_gradients_of_0(ranks, degree, name, order):
    case = CASES[name]
    *operands, _ = case.inputs(degree)
    whole = dense_attention(*operands, **case.options(LOCAL * degree))
    without = (whole == 0).flatten(2).all(-1)
    assert without.any()
    got = joined([rank["cases"][name, order] for rank in ranks], order)
    assert not got["out"][without].any()
    assert not got["query"][without].any()


def caught(ranks, degree, name):
    """Errors of a wrong ring beyond the bound of the test above, by result."""
    _, case, order = MUTANTS[name]
    wrong = joined([rank["mutants"][name] for rank in ranks], order)
    found = errors(wrong, expected(case, degree))
    return {result: error for result, error in found.items() if not error <= NEAR}


def test_sinks_that_are_counted_at_every_hop_are_caught(ranks, degree):
    found = caught(ranks, degree, "sinks at every hop")
    assert found["out"] > 0.01
    assert set(found) == {"out", "query", "key", "value", "sinks"}


def test_a_residual_of_the_last_hop_is_caught_by_the_gradients_alone(ranks, degree):
    found = caught(ranks, degree, "residual of the last hop")
    assert set(found) == {"query", "key", "value"}
    assert min(found.values()) > 0.1


def test_gradients_one_shift_short_are_caught_by_those_of_keys_and_values(ranks, degree):
    found = caught(ranks, degree, "gradients one shift short")
    assert set(found) == {"key", "value"}
    assert min(found.values()) > 0.1


def test_a_zigzag_with_a_wrong_second_half_is_caught(ranks, degree):
    found = caught(ranks, degree, "wrong second half")
    assert set(found) == {"out", "query", "key", "value"}
    assert min(found.values()) > 0.1


@pytest.mark.parametrize("what", ("lengths", "dropout"))
def test_tokens_that_are_counted_on_each_rank_are_caught(ranks, degree, what):
    found = caught(ranks, degree, f"{what} by local numbers")
    assert set(found) == {"out", "query", "key", "value"}
    assert min(found.values()) > 0.1


def test_every_mutant_is_looked_at(ranks):
    assert set(ranks[0]["mutants"]) == {*MUTANTS, "one residual"}


# Logits are exact. A weight of 1 or less is off by a few units of 2^-24, and so is a sum of at most
# 24; 320 times a sum of gradients that add up to 0 is off by 320 times as much.
LARGE_NEAR = 320 * 8 * 2**-24


@pytest.mark.parametrize("order", ORDERS)
def test_large_common_logits_keep_their_gradients(ranks, degree, order):
    truth = call(dense_attention, large_inputs(degree), LARGE)
    found = errors(joined([rank["large"][order] for rank in ranks], order), truth)
    assert within(found, LARGE_NEAR), found


def test_a_residual_of_maximum_and_sum_in_one_number_is_caught(ranks, degree):
    truth = call(dense_attention, large_inputs(degree), LARGE)
    wrong = joined([rank["mutants"]["one residual"] for rank in ranks], "contiguous")
    found = errors(wrong, truth)
    assert found["query"] > 10 * LARGE_NEAR, found


def test_tensors_of_any_order_in_memory(ranks, degree):
    found = errors(
        joined([rank["strided"] for rank in ranks], "zigzag"), expected("causal", degree)
    )
    assert within(found, NEAR), found


def rms(got, truth):
    return {name: (x.double() - truth[name]).square().mean().sqrt() for name, x in got.items()}


def test_bfloat16_is_rounded_once(four_ranks):
    """Four ranks are as near as one; parts rounded to bfloat16 are not, and the test sees it."""
    truth = call(dense_attention, [x.double() for x in bfloat16_inputs()], {"is_causal": True})

    def errors_of(degree, ring):
        parts = [rank["bfloat16"][ring] for rank in of_group(four_ranks, degree)]
        got = joined(parts, "zigzag")
        assert {x.dtype for x in got.values()} == {torch.bfloat16}
        return rms(got, truth)

    of_one = errors_of(1, "ring")
    for name, error in errors_of(4, "ring").items():
        assert error <= 1.02 * of_one[name], name
    assert errors_of(4, "rounded parts")["out"] > 1.1 * of_one["out"]


def test_gradients_of_keys_and_values_travel_in_float32(four_ranks):
    sent = four_ranks[0][4]["bfloat16"]["sent"]
    keys_and_values, gradients = (torch.bfloat16,) * 2, (torch.float32,) * 2
    hops = [keys_and_values, gradients] * 3
    assert sent == [*[keys_and_values] * 3, *hops, gradients]


REFUSALS = {
    "odd queries": r"query has 5 tokens on each of {P} ranks.* from {P5} to {P6} tokens, or use",
    "odd keys": r"key has 7 tokens on each of {P} ranks.* from {P7} to {P8} tokens, or use",
    "order": r"order = 'zig-zag' is unknown\. Write one of \('contiguous', 'zigzag', 'striped'\)",
    "local segments": r"segment_ids of the {P6} queries .* \[B, {P6}\], got \(2, 6\)\. Give",
    "segments of keys": r"segment_ids of the {P6} keys .* \[B, {P6}\], got \(2, 6\)\. Give",
    "local positions": r"positions of {P6} queries must be .* \[B, {P6}\], got .* \(2, 6\)",
    "lengths": r"query_seq_lengths must be \[B\]",
    "KV heads": r"K = 3 must divide the query heads N = 4,.*Got query \(2, 6, 4, 5\)",
    "channels": r"the same channels\. Got query \(2, 6, 4, 5\), key \(2, 6, 4, 4\)",
    "value": r"same shape.*key \(2, 6, 4, 5\), value \(2, 5, 4, 5\)",
    "three axes": r"must have 4 axes\. Got query \(6, 4, 5\)",
    "sinks": r"sinks must be \[N\] = \(4,\), got \(2,\)",
    "no key": r"needs a key\. Write dropout_rng=",
}


def test_every_refusal_is_looked_at(ranks):
    assert set(ranks[0]["refusals"]) == {"sent", *REFUSALS}
    # Without an error the call does communicate, so the others raised before.
    assert all(rank["refusals"]["sent"] == "AssertionError: was sent" for rank in ranks)


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_state_the_sizes_before_anything_is_sent(ranks, degree, what):
    sizes = {"P": degree} | {f"P{n}": n * degree for n in (5, 6, 7, 8)}
    for rank in ranks:
        message = rank["refusals"][what]
        assert re.search("^ValueError: .*" + REFUSALS[what].format(**sizes), message), message


HELD = {
    "contiguous": ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]),
    "zigzag": ([0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]),
    "striped": ([0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_which_tokens_a_rank_holds(order):
    held = [token_numbers(order, 4, rank, 3).tolist() for rank in range(3)]
    assert held == list(HELD[order])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axis", (0, 1, -1))
def test_join_is_the_inverse_of_split(order, axis):
    x = torch.arange(24 * 24 * 2).reshape(24, 24, 2).movedim(2, 1 if axis == -1 else 2)
    for world_size in (1, 2, 3, 4):
        parts = split(x, order, world_size, axis)
        assert torch.equal(join(parts, order, axis), x)
        for rank, part in enumerate(parts):
            held = token_numbers(order, 24 // world_size, rank, world_size)
            assert torch.equal(part, x.index_select(axis, held))


def test_split_in_order_is_that_of_ulysses():
    x = torch.arange(2 * 12 * 3 * 5).reshape(2, 12, 3, 5)
    assert torch.equal(split(x, "contiguous", 4), split_tokens(x, 4))


def test_tokens_that_the_ranks_do_not_divide_are_refused():
    message = failure(split, torch.ones(2, 10, 4, 5), "striped", 4)
    assert message == (
        "ValueError: axis 1 of 10 tokens is not divisible by the 4 ranks. Got x (2, 10, 4, 5). Pad "
        "it to 12."
    )
