"""Exact attention against Python integers, in which nothing is rounded that is not said to be."""

from dataclasses import replace

import integer_oracle
import numpy as np
import pytest
from cases import slow
from exact_cases import CROSS, CROSS_OPTIONS, jax_exact, torch_exact
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_seqpar.bridge import compare_bits
from jax_seqpar.bridge.cases import Case

pytestmark = pytest.mark.usefixtures("less_optimised")


def of_integers(inputs, *, mask=True, segment_ids=None, **options):
    query, key, value, grad = inputs.values()
    allowed = np.ones((1, 1, query.shape[1], key.shape[1]), bool) & mask
    if segment_ids is not None:
        of_query, of_key = segment_ids
        allowed = allowed & (of_query[:, None, :, None] == of_key[:, None, None, :])
    return integer_oracle.attention(query, key, value, grad=grad, allowed=allowed, **options)


def check_equal(inputs, options):
    """Both frameworks to the integers."""
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
    "soft cap": {"logits_soft_cap": 2.5},
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


# Magnitudes that meet: subnormals, ties, outliers, zeros of both signs, and what they do to logits.
NUMBERS = st.one_of(
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140, 2.0**-126, 3.0 * 2.0**-30, 300.0, -1e4]),
)


@settings(max_examples=60, derandomize=True)
@given(data=st.data(), is_causal=st.booleans())
def test_any_numbers(data, is_causal):
    """One shape, so that JAX compiles once for each of the two masks."""
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
