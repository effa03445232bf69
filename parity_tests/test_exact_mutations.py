"""The comparisons of exact attention see what they are for: each mutation is caught."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, is_array
from exact_cases import (
    CROSS,
    CROSS_OPTIONS,
    KEY,
    NAMES,
    Cross,
    jax_exact,
    torch_exact,
)
from flat import nouns
from questions import output_and_gradients

import torch_ref.exact
from jax_seqpar import dot_product_attention, exact_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import arithmetic, backward, forward, problem
from jax_seqpar.exact.kv_replicas import SharedHeads
from jax_seqpar.mask import Dropout, threefry
from jax_seqpar.parity.cases import Case, adversarial
from jax_seqpar.strategies import ulysses
from torch_ref.dropout import gain, is_kept
from torch_ref.masks import places

pytestmark = pytest.mark.usefixtures("less_optimised")

CASE = Case(batch=1, tokens=29, heads=4, kv_heads=2, head_dim=16)
SHARED = Case(batch=1, tokens=16, heads=8, kv_heads=2, head_dim=6)
FEW = {"dropout_rate": 0.3, "dropout_rng": KEY, "sinks": CROSS.sinks()}


def alone():
    """One device, blocks that overlap, numbers of every magnitude."""
    for inputs in (CASE.inputs(), adversarial(CASE.inputs())):
        ours = jax_exact(inputs, is_causal=True, query_chunk=3, key_chunk=5)
        report = compare_bits(ours, torch_exact(inputs, is_causal=True))
        assert report.equal, str(report)


def on_devices_that_share_heads():
    inputs = SHARED.inputs()
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=ONE_AXIS[8].on(),
        is_causal=True,
    )
    ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
    report = compare_bits(ours, torch_exact(inputs, is_causal=True))
    assert report.equal, str(report)


def with_dropout_and_sinks():
    """Blocks that overlap."""
    inputs = CROSS.inputs()
    ours = jax_exact(inputs, **FEW, query_chunk=3, key_chunk=5)
    report = compare_bits(ours, torch_exact(inputs, **FEW))
    assert report.equal, str(report)


def with_dropout_and_sinks_on_devices():
    """Groups of query heads that the devices do not divide."""
    case = Cross(N=6, K=2)
    options = FEW | {"sinks": case.sinks()}
    arrays = {name: jnp.asarray(x) if is_array(x) else x for name, x in options.items()}
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=ONE_AXIS[4].on(),
        **nouns(**arrays),
    )
    inputs = case.inputs()
    ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
    report = compare_bits(ours, torch_exact(inputs, **options))
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


def keys_of_the_first_device(x, axes, *, axis_name, true=ulysses._own_heads, **plan):
    own = true(x, axes, axis_name=axis_name, **plan)
    return jax.lax.all_gather(own, axis_name)[0] if x.dtype == jnp.uint32 else own


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
    "tokens of two blocks counted twice": (
        alone,
        forward,
        "mask_overlap",
        lambda x, fresh, axis: x,
    ),
    "queries of two blocks counted twice": (
        alone,
        backward,
        "mask_overlap",
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
    "sinks left out of the gradients": (
        with_dropout_and_sinks,
        backward,
        "sink_weight",
        lambda problem, top: 0.0,
    ),
    "dropout by the tokens of a block": (
        with_dropout_and_sinks,
        Dropout,
        "keep",
        lambda self, queries, keys: threefry.keep(
            self.rng, self.rate, jnp.arange(queries.size), jnp.arange(keys.size)
        ),
    ),
    "dropout by the heads of a device": (
        with_dropout_and_sinks_on_devices,
        ulysses,
        "_own_heads",
        keys_of_the_first_device,
    ),
    "sinks and keys of other heads": (
        with_dropout_and_sinks_on_devices,
        ulysses,
        "_with_added_heads",
        lambda x, axes, *, plan, heads: jnp.pad(
            x, [(0, plan.query_heads - heads if n == heads else 0) for n in x.shape]
        ),
    ),
}


def without(**changes):
    """PyTorch's backward pass for a head of other rows or options."""
    true = torch_ref.exact._weights_of_sums

    def mutant(head, do, o, options):
        rows = {name: x for name, x in changes.items() if name in head.rows._fields}
        rest = {name: x for name, x in changes.items() if name not in rows}
        head = head._replace(rows=head.rows._replace(**rows))
        return true(head, do, o, options._replace(**rest))

    return mutant


# An entry of CROSS_OPTIONS, and what to put in place of what in `torch_ref.exact`.
TORCH_MUTATIONS = {
    "sinks left out of the gradients": ("sinks", "_weights_of_sums", without(sink=None)),
    "dropout left out of the gradients": ("dropout", "_weights_of_sums", without(rng=None)),
    "gradients of dropout not scaled": ("dropout", "_weights_of_sums", without(rate=0.0)),
    "dropout scaled twice": ("dropout", "gain", lambda rate: gain(rate) ** 2),
    "dropout of keys by queries": (
        "dropout",
        "is_kept",
        lambda keys, rate, t, s: is_kept(keys, rate, s, t),
    ),
    "slopes on both sides": ("slopes", "distance", lambda t, s: t - s),
    "slopes for any distance": (
        "slopes, positions far apart",
        "distance",
        lambda t, s: (t - s).abs(),
    ),
    "slopes by number": (
        "slopes, positions",
        "places",
        lambda T, S, offset, positions, device: places(T, S, 0, None, device),
    ),
}


@pytest.fixture
def compiled_anew():
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize(("question", "owner", "name", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_is_caught(monkeypatch, question, owner, name, mutant):
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError, match="elements differ"):
        question()


@pytest.mark.parametrize(
    ("options", "name", "mutant"), TORCH_MUTATIONS.values(), ids=TORCH_MUTATIONS
)
def test_a_mutation_of_pytorch_is_caught(monkeypatch, options, name, mutant):
    """In the bits that `test_exact_oracle` compares with those of JAX and of the integers."""
    expected = torch_exact(CROSS.inputs(), **CROSS_OPTIONS[options])
    monkeypatch.setattr(torch_ref.exact, name, mutant)
    assert not compare_bits(torch_exact(CROSS.inputs(), **CROSS_OPTIONS[options]), expected).equal


QUESTIONS = (
    alone,
    subnormal_keys,
    on_devices_that_share_heads,
    with_dropout_and_sinks,
    with_dropout_and_sinks_on_devices,
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_nothing_is_caught_without_one(question):
    question()
    assert np.unique(CASE.inputs()["query"]).size > 1000
