"""Exact attention against Python integers, in which nothing is rounded that is not said to be."""

from dataclasses import replace

import integer_oracle
import jax
import numpy as np
import pytest
import torch
from cases import slow
from exact_cases import CROSS, CROSS_OPTIONS, NAMES, jax_exact, torch_exact
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import arithmetic
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from jax_seqpar.parity.inputs import Case
from torch_ref.dense import dense_attention as torch_dense_attention
from torch_ref.exact import arithmetic as exact_arithmetic

pytestmark = pytest.mark.usefixtures("less_optimised")


def of_integers(inputs, *, mask=True, **options):
    """The integers, with blocks of as many tokens as the JAX implementation has now."""
    query, key, value, grad = inputs.values()
    allowed = np.ones((1, 1, query.shape[1], key.shape[1]), bool) & mask
    options = {"block": arithmetic.BLOCK, **options}
    return integer_oracle.attention(query, key, value, grad=grad, allowed=allowed, **options)


def check_equal(inputs, options):
    """Asserts that both frameworks have the bits of the integers."""
    expected = of_integers(inputs, **options)
    for ours in (jax_exact(inputs, **options), torch_exact(inputs, **options)):
        report = compare_bits(ours, expected)
        assert report.equal, str(report)
    return expected


CASE = Case(batch=2, tokens=9, heads=4, kv_heads=2, head_dim=5)
RNG = np.random.default_rng(5)
# With and without a causal mask alone: `test_any_numbers`.
FEW = {
    "window": {"local_window_size": (2, 1), "scale": -0.7},
    "mask": {"mask": RNG.random((2, 4, 9, 9)) < 0.4},
    "bias": {"bias": RNG.standard_normal((2, 1, 9, 9)).astype(np.float32)},
    "soft cap": {"logits_soft_cap": 2.3},  # none of float32
    "soft cap of small logits": {"logits_soft_cap": 50.0, "is_causal": True},
    "soft cap and bias": {
        "logits_soft_cap": 1.0,
        "bias": np.where(RNG.random((1, 4, 9, 9)) < 0.2, -np.inf, 0.3).astype(np.float32),
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in FEW),
        *(("soft cap", dtype) for dtype in ("bfloat16", "float16")),
    ],
)
def test_both_frameworks_are_the_integers(name, dtype):
    options = FEW[name]
    inputs = Case(**{**vars(CASE), "dtype": dtype}).inputs()
    check_equal(inputs, options)


@pytest.mark.parametrize("options", CROSS_OPTIONS.values(), ids=CROSS_OPTIONS)
def test_cross_attention(options):
    """Queries and keys of two lengths, values of other channels, and the options of both."""
    expected = check_equal(CROSS.inputs(), options)
    assert all(np.count_nonzero(x) > x.size / 5 for x in expected.values())


@pytest.mark.parametrize(
    ("dtype", "by_positions"),
    (("float32", False), ("bfloat16", False), slow("float16", False), ("float32", True)),
)
def test_all_at_once(dtype, by_positions):
    case = replace(CROSS, dtype=dtype)
    expected = check_equal(case.inputs(), case.all_at_once(by_positions))
    assert all(np.count_nonzero(x) > x.size / 5 for x in expected.values())


@pytest.fixture
def blocks_of_four(monkeypatch):
    """Several blocks of queries and keys in few tokens, and programs compiled for them alone."""
    jax.clear_caches()
    for module in (arithmetic, exact_arithmetic):
        monkeypatch.setattr(module, "BLOCK", 4)
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("blocks_of_four")
@pytest.mark.parametrize("case", (CROSS, replace(CROSS, T=7, S=13)), ids=("whole", "with a rest"))
def test_several_blocks(case):
    """Each block has one unit for its sums, so one block for all tokens gives other gradients."""
    inputs, options = case.inputs(), case.all_at_once(False)
    several = check_equal(inputs, options)
    one = of_integers(inputs, block=256, **options)
    assert compare_bits(several["forward"], one["forward"]).equal
    assert not any(compare_bits(several[name], one[name]).equal for name in NAMES[1:])


JUNK = (1e9, 1e12, 3e38, np.nan, np.inf)


def test_tokens_that_nothing_attends_to_change_no_bit():
    """Tokens beyond the lengths, in segments without a partner, or masked out, change no bit."""
    inputs, (T, S) = CROSS.inputs(), (CROSS.T, CROSS.S)
    of_query, of_key = np.zeros((2, T), np.int32), np.zeros((2, S), np.int32)
    of_query[:, 1], of_key[:, 2] = 5, 7  # each without a partner
    of_query[0, T - 1] = of_key[0, 3] = 9  # partners, but for the length of the queries
    mask = np.ones((2, CROSS.N, T, S), bool)
    mask[1, 2, 4] = False
    mask[..., 6] = False
    options = {
        "mask": mask,
        "segment_ids": (of_query, of_key),
        "query_seq_lengths": np.array([T - 1, T], np.int32),
        "key_value_seq_lengths": np.array([S, S - 4], np.int32),
        # A weight of its own in the row of a query without a key.
        "sinks": CROSS.sinks(),
    }
    queries = np.zeros(inputs["query"].shape[:3], bool)
    queries[:, 1] = queries[0, T - 1] = queries[1, 4, 2] = True
    keys = np.zeros(inputs["key"].shape[:3], bool)
    keys[:, 2] = keys[:, 6] = keys[0, 3] = keys[1, S - 4 :] = True
    clean = check_equal(inputs, options)

    leaves = [torch.from_numpy(inputs[name]).double().requires_grad_() for name in INPUT_NAMES[:3]]
    out = torch_dense_attention(*leaves, **jax.tree.map(torch.from_numpy, options))
    truth = (out, *torch.autograd.grad(out, leaves, torch.from_numpy(inputs["grad"]).double()))
    for name, expected in zip(NAMES, truth, strict=True):
        np.testing.assert_allclose(clean[name], expected.detach(), rtol=0, atol=2e-6)

    for junk in JUNK:
        spoilt = {
            name: np.where((queries if name in ("query", "grad") else keys)[..., None], junk, x)
            for name, x in inputs.items()
        }
        spoilt = {name: x.astype(np.float32) for name, x in spoilt.items()}
        for ours in (jax_exact(spoilt, **options), torch_exact(spoilt, **options)):
            assert compare_bits(ours, clean).equal, junk
        if np.isfinite(junk):
            assert compare_bits(of_integers(spoilt, **options), clean).equal, junk


# Magnitudes that meet: subnormals, ties, outliers, zeros of both signs, and what they do to logits.
NUMBERS = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140, 2.0**-126, 3.0 * 2.0**-30, 300.0, -1e4]),
)


@settings(max_examples=60, derandomize=True)
@given(data=st.data(), is_causal=st.booleans())
def test_any_numbers(data, is_causal):
    """Random numbers have the integers' bits; in one shape, as JAX compiles for each."""
    shapes = {"query": (1, 4, 2, 3), "key": (1, 4, 1, 3), "value": (1, 4, 1, 3)}
    inputs = {
        name: np.array(
            data.draw(
                st.lists(NUMBERS, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
            ),
            np.float32,
        ).reshape(shape)
        for name, shape in (shapes | {"grad": shapes["query"]}).items()
    }
    check_equal(inputs, {"is_causal": is_causal})
