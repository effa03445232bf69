"""The comparisons of exact attention see what they are for: each mutation is caught."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS
from exact_cases import NAMES, jax_exact, torch_exact
from questions import output_and_gradients

import torch_ref.exact
from jax_seqpar import dot_product_attention, exact_attention
from jax_seqpar.bridge import compare_bits
from jax_seqpar.bridge.cases import Case, adversarial
from jax_seqpar.exact import arithmetic, backward, forward, problem
from jax_seqpar.shared_heads import SharedHeads

CASE = Case(batch=1, tokens=29, heads=4, kv_heads=2, head_dim=16)
SHARED = Case(batch=1, tokens=16, heads=8, kv_heads=2, head_dim=6)


def alone():
    """One device, blocks that overlap, numbers of every magnitude."""
    for inputs in (CASE.inputs(), adversarial(CASE.inputs())):
        ours = jax_exact(inputs, is_causal=True, query_chunk=3, key_chunk=5)
        report = compare_bits(ours, torch_exact(inputs, is_causal=True))
        assert report.equal, str(report)


def on_devices_that_share_heads():
    inputs = SHARED.inputs()
    attend = partial(
        dot_product_attention, attention=exact_attention, mesh=ONE_AXIS[8].mesh(), is_causal=True
    )
    ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
    report = compare_bits(ours, torch_exact(inputs, is_causal=True))
    assert report.equal, str(report)


def float32_product(equation, a, b):
    """The same product of float64 integers, added in float32."""
    product = jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32))
    return product.astype(jnp.float64)


def subnormal_keys():
    inputs = CASE.inputs()
    inputs["query"] *= np.float32(2.0**124)
    inputs["key"] *= np.float32(2.0**-130)
    report = compare_bits(jax_exact(inputs), torch_exact(inputs))
    assert report.equal, str(report)


def single_exp(x):
    return jnp.where(x < -80, jnp.float32(0), jnp.exp(x))


MUTATIONS = {
    "dot products in float32": (
        alone,
        problem,
        "dots",
        lambda q, k: float32_product("DGTH,SH->DGTS", q, k).sum(0),
    ),
    "sums over tokens in float32": (
        alone,
        forward,
        "token_sums",
        lambda equation, a, b, dtype: float32_product(equation, a, b).astype(dtype),
    ),
    "sums for the keys in float32": (
        alone,
        backward,
        "token_sums",
        lambda equation, a, b, dtype: float32_product(equation, a, b).astype(dtype),
    ),
    "exp in float32": (alone, problem, "exp", single_exp),
    # In PyTorch: XLA:CPU itself reads a subnormal as 0.
    "subnormals kept": (subnormal_keys, torch_ref.exact, "flush", lambda x: x.double()),
    "tokens of two blocks counted twice": (alone, forward, "fresh_only", lambda x, fresh, axis: x),
    "queries of two blocks counted twice": (
        alone,
        backward,
        "fresh_only",
        lambda x, fresh, axis: x,
    ),
    "weights not normalised": (
        alone,
        backward,
        "normalised",
        lambda p, normaliser: p.astype(jnp.float64),
    ),
    "a last bit of the logits": (
        alone,
        problem,
        "round32",
        lambda x: (arithmetic.flush(x) * (1 + 2.0**-25)).astype(jnp.float32),
    ),
    "one more bit in a grid": (alone, forward, "TOKEN_BITS", 31),
    "heads that do not know of one another": (
        on_devices_that_share_heads,
        SharedHeads,
        "sum",
        lambda self, x: x,
    ),
    "exponents of each device's own": (
        on_devices_that_share_heads,
        SharedHeads,
        "max",
        lambda self, x: x,
    ),
    "every device returns the sum": (
        on_devices_that_share_heads,
        SharedHeads,
        "is_first",
        lambda self: jnp.bool_(True),
    ),
}


@pytest.fixture(autouse=True)
def compiled_anew():
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(("question", "owner", "name", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_is_caught(monkeypatch, question, owner, name, mutant):
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError, match="elements differ"):
        question()


@pytest.mark.parametrize("question", (alone, subnormal_keys, on_devices_that_share_heads))
def test_nothing_is_caught_without_one(question):
    question()
    assert np.unique(CASE.inputs()["query"]).size > 1000
