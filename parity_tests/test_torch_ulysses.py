"""The PyTorch reference over real gloo ranks, and its visible-rank oracle, each against another.

One launch of ranks a degree; the tests look at what came back.
"""

import re
from functools import partial
from itertools import permutations, product

import pytest
import torch
from rank_functions import (
    ATTENTION,
    DTYPES,
    HEADS,
    LAYOUTS,
    OPS,
    ROTARY,
    ROTATED_CHANNELS,
    SIZES,
    SUBGROUPS,
    TOKENS,
    UNEVEN,
    all_ulysses,
    angles,
    axis_indices,
    dense,
    derivatives,
    global_shape,
    historical_inputs,
    packed,
    random_bits,
    swap,
)

from jax_seqpar.bridge import run_ranks
from torch_ref import rank_layout, wrong_versions
from torch_ref.dense import dense_attention

ORACLES = {
    "sequence_to_heads": rank_layout.sequence_to_heads,
    "heads_to_sequence": rank_layout.heads_to_sequence,
}
NAMES = ("out", "dq", "dk", "dv", "second dq", "second dk", "second dv", "second dgrad")

by_layout = pytest.mark.parametrize("layout_name", LAYOUTS)
by_op = pytest.mark.parametrize("op", OPS)
by_case = pytest.mark.parametrize("name", ATTENTION)


@pytest.fixture(scope="module", params=(2, 4))
def degree(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(degree):
    return run_ranks(all_ulysses, degree, degree)


@pytest.fixture
def one_thread():
    """One thread, as on the ranks, so that the same sums are added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joined(ranks, topic, key=None):
    """The global arrays, from each rank's tokens."""
    parts = [rank[topic] if key is None else rank[topic][key] for rank in ranks]
    return [torch.cat(x, TOKENS) for x in zip(*parts, strict=True)]


def assert_near(got, expected):
    """Asserts equality to 1e-12 of the largest entry.

    Both are float64 attention of at most 12 tokens and 5 channels: some hundred operations, each
    off by at most 1.1e-16 of numbers of that size.
    """
    for name, x, truth in zip(NAMES, got, expected, strict=True):
        assert x.shape == truth.shape, name
        difference = (x - truth).abs().max().item()
        assert difference <= 1e-12 * truth.abs().max().item(), f"{name}: {difference:.3g}"


@by_op
@by_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_to_all_moves_every_bit_to_where_the_oracle_says(ranks, degree, dtype, layout_name, op):
    for sizes in SIZES:
        x = random_bits(dtype, global_shape(sizes, degree), 0)
        held = torch.stack(x.chunk(degree, OPS[op][0]))
        # The oracle moves bytes, as so many channels.
        expected = ORACLES[op](held.view(torch.uint8)).view(x.dtype)
        for rank, part in enumerate(expected):
            got = ranks[rank]["all_to_all"][sizes, dtype, layout_name, op]
            assert got == packed(swap(part, layout_name)), f"rank {rank} of {sizes}"


def test_uneven_heads_move_every_bit_to_the_first_ranks_first(ranks, degree):
    for (heads, dtype, layout_name), _ in ranks[0]["uneven"].items():
        x = random_bits(dtype, (2, 3 * degree, heads, 3), 0)
        by_heads, by_tokens = x.tensor_split(degree, HEADS), x.chunk(degree, TOKENS)
        for rank in range(degree):
            got = ranks[rank]["uneven"][heads, dtype, layout_name]
            assert got == (packed(by_heads[rank]), packed(by_tokens[rank])), (heads, rank)


@by_op
@pytest.mark.parametrize("dtype", ("float32", "uint8"))
def test_all_to_all_of_any_order_in_memory(ranks, dtype, op):
    """Tensors of any memory order are exchanged right, like the gradients of an einsum."""
    for rank in ranks:
        expected = rank["all_to_all"][SIZES[2], dtype, "bshd", op]
        for order in permutations(range(4)):
            assert rank["strides"][order, dtype, op] == expected, order


@pytest.mark.parametrize("dtype", ("float8_e5m2", "bfloat16", "float16", "float32", "float64"))
def test_there_are_nans_of_several_payloads_among_the_bits(degree, dtype):
    x = random_bits(dtype, global_shape(SIZES[2], degree), 0)
    width = x.element_size()
    bits = x.view(torch.uint8).reshape(-1, width)[x.isnan().flatten()]
    assert len({bytes(row) for row in bits.tolist()}) > 1


@by_op
@by_layout
def test_the_derivative_is_the_adjoint(ranks, layout_name, op):
    """<op x, y> = <x, vjp y>, exactly: whole numbers below 2**53."""
    for sizes in SIZES:
        left, right = zip(*(rank["adjoint"][sizes, layout_name, op] for rank in ranks), strict=True)
        assert sum(left) == sum(right)
        assert sum(left) != 0


@pytest.mark.parametrize("name", ATTENTION | UNEVEN)
@by_layout
def test_attention_and_derivatives_equal_those_of_the_whole_sequence(
    ranks, degree, name, layout_name
):
    case = (ATTENTION | UNEVEN)[name]
    attend = partial(dense, layout="bshd", is_causal=case.is_causal)
    expected = derivatives(attend, case.inputs(degree))
    assert_near(joined(ranks, "attention", (name, layout_name)), expected)


@by_case
@by_layout
def test_attention_has_the_bits_of_its_heads_alone(ranks, degree, name, layout_name, one_thread):
    """Rank by rank without ranks: the reshards and the sums over repeated heads are all that is
    between, the former exact, the latter in the order of the ranks."""
    case = ATTENTION[name]
    query, key, value, grad, *_ = case.inputs(degree)
    copies = case.repeats(degree)
    key, value = (x.repeat_interleave(copies, HEADS) for x in (key, value))
    parts = []
    for rank in range(degree):
        operands = [
            swap(x.chunk(degree, HEADS)[rank], layout_name).contiguous().requires_grad_()
            for x in (query, key, value)
        ]
        out = dense(*operands, layout=layout_name, is_causal=case.is_causal)
        local_grad = swap(grad.chunk(degree, HEADS)[rank], layout_name).contiguous()
        gradients = torch.autograd.grad(out, operands, local_grad)
        parts.append([swap(x.detach(), layout_name) for x in (out, *gradients)])
    out, dq, *dkv = (torch.cat(x, HEADS) for x in zip(*parts, strict=True))
    dk, dv = (sum_copies(x, copies) for x in dkv)
    got = joined(ranks, "attention", (name, layout_name))
    for output, x, truth in zip(NAMES, got, (out, dq, dk, dv), strict=False):
        assert torch.equal(x, truth), output


def sum_copies(x, copies):
    """Neighbouring heads added one by one, the first to the second, to the third and so on."""
    first, *rest = x.unflatten(HEADS, (-1, copies)).unbind(HEADS + 1)
    for other in rest:
        first = first + other
    return first


@by_layout
@pytest.mark.parametrize("channels", ROTATED_CHANNELS)
def test_rotary_embedding_is_in_global_positions(ranks, degree, layout_name, channels):
    turn = torch.polar(torch.ones(()).double(), angles(degree, channels))[None, :, None]

    def rotated(x):
        left, right, rest = x.split((channels // 2, channels // 2, 6 - channels), -1)
        turned = torch.complex(left, right) * turn
        return torch.cat((turned.real, turned.imag, rest), -1)

    def attend(query, key, value):
        return dense_attention(rotated(query), rotated(key), value, is_causal=True)

    expected = derivatives(attend, ROTARY.inputs(degree))
    assert_near(joined(ranks, "rotary", (channels, layout_name)), expected)


def test_a_process_group_has_a_sequence_of_its_own(ranks, degree):
    inputs = SUBGROUPS.inputs(degree // 2)
    for parity in (0, 1):
        own = [x[parity : parity + 1] for x in inputs]
        expected = derivatives(partial(dense, layout="bshd", is_causal=True), own)
        assert_near(joined(ranks[parity::2], "subgroups"), expected)


def test_further_arguments_are_passed_on(ranks):
    for rank in ranks:
        assert rank["passed on"] == ((2.0, "other"), {"offset": 0.5})


REFUSALS = {
    "sp_stream": "sp_stream is not supported",
    "gather_idx of the batch": "scatter_idx = 2 and gather_idx = 0 .* Use scatter_idx=2, "
    "gather_idx=1",
    "scatter_idx of the channels": "scatter_idx = 3 and gather_idx = 1 .* Use scatter_idx=2",
    "batch_dim_idx": "batch_dim_idx must be 0 or 1, got 2",
    "query heads": r"heads N = {Pm1} are fewer than the {P} ranks.* Got query \(2, 3, {Pm1}, 5\), "
    r"key \(2, 3, {P2}, 5\).* Use at most {Pm1} ranks",
    "heads": r"heads N = {Pm1} are fewer than the {P} ranks.* Got input \(2, 3, {Pm1}, 5\)",
    "KV heads and query heads": r"KV heads K = {P4} must divide the query heads N = {P2}\.",
    "key and value": r"same shape.*key \(2, 3, {P2}, 5\), value \(2, 3, {P}, 5\)",
    "three axes": r"must have 4 axes.*Got query \(3, {P2}, 5\)",
    "output": r"local_attention returned shape \(2, {P3_1}, 2, 5\), .*\(2, {P3}, 2, 5\)",
    "one axis twice": "scatter_idx = 2 and gather_idx = 2",
    "negative axis": "scatter_idx = -2 and gather_idx = 1",
    "tokens": r"axis 1 of size {P3p1} is not divisible by the {P} ranks of the group. Got input "
    r"\(2, {P3p1}, 2, 5\)",
}


def test_every_refusal_is_looked_at(ranks):
    assert set(ranks[0]["refusals"]) == set(REFUSALS)


@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_state_the_sizes(ranks, degree, what):
    sizes = {
        "P": degree,
        "P2": 2 * degree,
        "Pm1": degree - 1,
        "P3": 3 * degree,
        "P3_1": 3 * degree - 1,
        "P3p1": 3 * degree + 1,
        "P4": 4 * degree,
    }
    for rank in ranks:
        message = rank["refusals"][what]
        assert re.search("^ValueError: .*" + REFUSALS[what].format(**sizes), message), message


@by_op
@by_layout
@pytest.mark.parametrize("version", wrong_versions.WRONG_VERSIONS)
def test_wrong_versions_are_as_wrong_over_ranks_as_simulated(
    ranks, degree, version, layout_name, op
):
    held = historical_inputs(layout_name, op, degree)
    try:
        expected = wrong_versions.simulate(
            wrong_versions.WRONG_VERSIONS[version], held, *axis_indices(op, layout_name)
        )
    except RuntimeError:
        expected = None
    for rank, results in enumerate(ranks):
        got = results["history"][version, layout_name, op]
        if expected is None:
            assert isinstance(got, str)
        else:
            assert torch.equal(got, expected[rank])


LAYOUT_CELLS = [(P, 2, s, hl, 3) for P, s, hl in product((1, 2, 3, 4), (1, 3), (1, 5))]


@pytest.mark.parametrize("cell", LAYOUT_CELLS, ids=str)
def test_the_oracle_is_the_index_formula(cell):
    """out_q[b, r*s + t, j] = in_r[b, t, q*hl + j], and its inverse."""
    P, b, s, hl, d = cell
    by_tokens = torch.arange(P * b * s * P * hl * d).reshape(P, b, s, P * hl, d)
    by_heads = rank_layout.sequence_to_heads(by_tokens)
    assert by_heads.shape == (P, b, P * s, hl, d)
    for r, q, t, j in product(range(P), range(P), range(s), range(hl)):
        assert torch.equal(by_heads[q, :, r * s + t, j], by_tokens[r, :, t, q * hl + j])
    labels = torch.arange(by_heads.numel()).reshape(by_heads.shape)
    back = rank_layout.heads_to_sequence(labels)
    assert back.shape == by_tokens.shape
    for r, q, t, j in product(range(P), range(P), range(s), range(hl)):
        assert torch.equal(back[r, :, t, q * hl + j], labels[q, :, r * s + t, j])


@pytest.mark.parametrize("cell", LAYOUT_CELLS, ids=str)
def test_round_trips_of_the_oracle(cell):
    P, b, s, hl, d = cell
    x = torch.arange(b * P * s * P * hl * d).reshape(b, P * s, P * hl, d)
    by_tokens = rank_layout.split_tokens(x, P)
    assert torch.equal(by_tokens, torch.stack(x.chunk(P, TOKENS)))
    by_heads = rank_layout.sequence_to_heads(by_tokens)
    # The whole array is the same before and after: only who holds what has changed.
    assert torch.equal(by_heads, torch.stack(x.chunk(P, HEADS)))
    assert torch.equal(rank_layout.heads_to_sequence(by_heads), by_tokens)
    assert torch.equal(rank_layout.join_tokens(by_tokens), x)
