"""Blockwise attention: its blocks, its derivatives, and what it does not compute."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import is_array, slow
from features import ADDED, KERNELS, Sizes, operands, run_jax, run_torch, split
from flat_names import keywords_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from questions import QUICK, error, output_and_gradients

from jax_seqpar import Blockwise, Logits, dense_attention, exact_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.mask import Mask, Tokens, block_ranges
from jax_seqpar.plan import temporaries
from torch_ref.dense import dense_attention as torch_dense_attention

pytestmark = pytest.mark.usefixtures("less_optimised")

SIZES = Sizes(2, 13, 17, 4, 2, 5, 3)
EPS = np.finfo(np.float32).eps
LEAST = float(np.finfo(np.float32).min)
FAR = tuple(
    np.stack([np.arange(n, dtype=np.int32)] * 2) + first for n, first in ((13, 1 << 20), (17, 0))
)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
small = Blockwise(query_chunk=4, key_chunk=5)
rng = np.random.default_rng(5)
EVERYTHING: dict[str, Any] = {
    "is_causal": True,
    "query_offset": 4,
    "bias": rng.standard_normal((1, 4, 13, 17)).astype(np.float32),
    "mask": rng.random((2, 1, 13, 17)) < 0.8,
    "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
    "logits_soft_cap": 2.0,
    "sinks": rng.standard_normal(4).astype(np.float32),
    "dropout_rate": 0.2,
    "dropout_rng": np.array([3, 5], np.uint32),
}


def assert_near(got: Any, expected: Any, units: float = 16) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b, np.float64)
        assert error(a, b) <= units * EPS * max(np.max(np.abs(b), initial=0), 1e-30)


def arrays_of(given: dict[str, Any]) -> dict[str, Any]:
    return {n: jax.tree.map(jnp.asarray, x) if is_array(x) else x for n, x in given.items()}


@pytest.mark.parametrize("chunks", ((1, 1), (4, 5), (13, 17), (100, 3), (None, None)), ids=str)
def test_blocks_of_any_size(chunks):
    inputs = operands(SIZES)
    attend = Blockwise(query_chunk=chunks[0], key_chunk=chunks[1])
    got = run_jax(attend, EVERYTHING, "blockwise", inputs, QUICK)
    truth = run_torch(EVERYTHING, "blockwise", inputs)
    assert_near([got[name] for name in truth], list(truth.values()))


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float64"))
def test_dtypes(dtype):
    """16-bit inputs add up in float32: nearer to float64 than their own rounding of the output."""
    with jax.enable_x64(dtype == "float64"):
        q, k, v, grad = (jnp.asarray(x).astype(dtype) for x in operands(SIZES))
        out, *gradients = output_and_gradients(partial(small, is_causal=True), QUICK)(q, k, v, grad)
        assert all(x.dtype == q.dtype for x in (out, *gradients))
        leaves = [numpy_to_torch(np.asarray(x)).double().requires_grad_() for x in (q, k, v)]
        expected = torch_dense_attention(*leaves, is_causal=True)
        expected_gradients = torch.autograd.grad(
            expected, leaves, numpy_to_torch(np.asarray(grad)).double()
        )
        # Weights, their gradients and the result are rounded to the dtype, each half a unit.
        eps = float(jnp.finfo(q.dtype).eps)
        for got, want in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            want = want.detach().numpy()
            assert error(got, want) <= 4 * eps * np.max(np.abs(want))


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_gradients_of_a_row_add_up_to_0_in_16_bits(dtype):
    """Slopes times distances of 1000, and a common offset of keys or values: as near as dense.

    Where the sum over keys of the logits' gradients is not 0, the gradient of slopes and dq have
    that sum times the distance or the offset as an error.
    """
    far = FAR[0] - (1 << 20) + 1000, FAR[1]
    some = {"alibi_slopes": SLOPES / 16, "positions": far}
    for offsets in ((0, 0), (8, 0), (0, 8)):
        inputs = operands(SIZES)
        for i, offset in zip((1, 2), offsets, strict=True):
            inputs[i] = inputs[i] + np.float32(offset)
        inputs = [x.astype(jnp.dtype(dtype)) for x in inputs]
        truth = run_torch(some, "dense", inputs)
        of = {"blockwise": small, "dense": dense_attention}
        got = {n: run_jax(f, some, n, inputs, QUICK) for n, f in of.items()}
        for name in ("dq", "alibi_slopes"):
            errors = {n: error(x[name], truth[name]) for n, x in got.items()}
            # A unit of the result's own rounding, which either may happen to get right.
            unit = jnp.finfo(got["dense"][name].dtype).eps * np.max(np.abs(truth[name]))
            assert errors["blockwise"] <= errors["dense"] + float(unit) / 2, (offsets, name)


@pytest.mark.parametrize("index", ("int32", "int64", "uint32"))
def test_64_bits(index):
    """Gradients where bounds of blocks come from arrays, of any integer dtype."""
    rng = np.random.default_rng(3)
    some: dict[str, Any] = {
        "segment_ids": tuple(np.sort(rng.integers(0, 3, (2, n)), axis=1) for n in (13, 17)),
        "positions": tuple(np.stack([np.arange(n), np.arange(n) + 2]) for n in (13, 17)),
        "query_seq_lengths": np.array([13, 5]),
        "key_value_seq_lengths": np.array([9, 17]),
    }
    some = jax.tree.map(lambda x: x.astype(index), some) | {"is_causal": True}
    some["bias"] = rng.standard_normal((1, 4, 13, 17))
    with jax.enable_x64(True):
        inputs = [x.astype(np.float64) for x in operands(SIZES)]
        got = run_jax(small, some, "blockwise", inputs, QUICK)
        for name, expected in run_torch(some, "blockwise", inputs).items():
            bound = 64 * np.finfo(np.float64).eps * np.max(np.abs(expected))
            assert error(got[name], expected) <= bound, name


@pytest.mark.parametrize(
    "attend",
    (small, replace(small, forward_mode=True), dense_attention, exact_attention),
    ids=("blockwise", "either mode", "dense", "exact"),
)
def test_no_inf_is_seen_in_an_eager_call(attend):
    """Output and gradients pass `jax.debug_infs` where queries have no key."""
    q, k, v, _ = map(jnp.asarray, operands(SIZES))
    mask = jnp.asarray(rng.random((2, 1, 13, 17)) < 0.5).at[:, :, 3].set(False)
    with jax.debug_infs(True), jax.debug_nans(True):
        out, pull = jax.vjp(partial(attend, mask=mask), q, k, v)
        gradients = pull(out)
    assert all(np.isfinite(np.asarray(x)).all() for x in gradients)


@pytest.mark.parametrize("kernel", ("blockwise", "blockwise, either mode", "dense"))
def test_gradients_of_16_bit_bias_slopes_and_sinks_are_rounded_once(kernel):
    """Sums over up to 2 * 4 * 13 and 2 * 13 * 17 terms, of which 16 bits would lose some."""
    numbers = np.random.default_rng(6)
    sizes = {"bias": (1, 1, 1, 17), "alibi_slopes": (4,), "sinks": (4,)}
    some = {n: numbers.standard_normal(x).astype(jnp.bfloat16) for n, x in sizes.items()}
    inputs = operands(SIZES)
    got = run_jax(KERNELS[kernel], some, kernel, inputs, QUICK)
    truth = run_torch(some, kernel, inputs)
    for name in sizes:
        assert got[name].dtype == jnp.bfloat16
        off = np.abs(np.asarray(got[name], np.float64) - truth[name])
        half_a_unit = float(jnp.finfo(jnp.bfloat16).eps) / 2 * np.abs(truth[name])
        # Sums of products of order 1, for slopes with distances up to 16.
        assert np.all(off <= half_a_unit + 64 * EPS * np.max(np.abs(truth[name]))), name


def test_the_log_of_the_sum_merges_parts_over_keys():
    """Two halves of the keys, each with its lse, give the whole; gradients through the lse, too."""
    q, k, v, grad = map(jnp.asarray, operands(SIZES))

    def merged(q, k, v):
        parts = [
            small(q, k[:, part], v[:, part], return_residual=True)
            for part in (slice(None, 9), slice(9, None))
        ]
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(out * jnp.exp(part - lse)[..., None] for out, part in parts)

    got, expected = (
        output_and_gradients(f, QUICK)(q, k, v, grad) for f in (merged, dense_attention)
    )
    assert_near(got, expected)


def test_the_lse_itself():
    q, k, v, _ = map(jnp.asarray, operands(SIZES))
    mask = jnp.asarray(rng.random((2, 4, 13, 17)) < 0.5).at[:, :, 3].set(False)
    sinks = jnp.asarray([0.5, -jnp.inf, 2.0, -1.0])
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(2, 13, 2, 2, 5), k) * 5**-0.5
    logits = jnp.where(mask, logits.reshape(2, 4, 13, 17), -jnp.inf)
    extra = jnp.broadcast_to(sinks[None, :, None, None], (2, 4, 13, 1))
    expected = jax.nn.logsumexp(jnp.concatenate([logits, extra], axis=-1), axis=-1)
    out, lse = small(q, k, v, mask=mask, logits=Logits(sinks=sinks), return_residual=True)
    assert lse[0, 3, 1] == -jnp.inf
    assert not out[:, 3].any()
    np.testing.assert_allclose(lse.swapaxes(1, 2), expected, atol=1e-5)
    # Where no block of keys is computed.
    no_keys = jnp.zeros(2, jnp.int32)
    _, lse = small(
        q, k, v, key_value_seq_lengths=no_keys, logits=Logits(sinks=sinks), return_residual=True
    )
    np.testing.assert_array_equal(lse, jnp.broadcast_to(sinks, lse.shape))

    def loss(q, sinks):
        _, lse = small(q, k, v, mask=mask, logits=Logits(sinks=sinks), return_residual=True)
        return jnp.where(lse > -jnp.inf, lse, 0).sum()

    # A row of one head has neither a key nor a sink; that of its neighbours is a sink alone.
    dq, dsinks = jax.grad(loss, argnums=(0, 1))(q, sinks)
    assert not dq[:, 3].any()
    assert dq[:, 4].all()
    weights = jnp.exp(sinks[None, :, None] - jnp.where(expected == -jnp.inf, 0, expected))
    np.testing.assert_allclose(dsinks, weights.sum((0, 2)), atol=1e-5)


def with_numbers(attend: Any) -> Any:
    """A function of everything that has a derivative, and its arguments."""
    given = arrays_of(EVERYTHING)
    added = {name: given.pop(name) for name in ADDED}
    q, k, v, grad = map(jnp.asarray, operands(SIZES))

    def loss(operands):
        q, k, v, added = operands
        return jnp.sum(attend(q, k, v, **keywords_of(**added, **given)) * grad) ** 2

    return loss, (q, k, v, added)


def norm(loss: Any, at: Any) -> Any:
    """The derivative of the gradient's norm."""
    return jax.grad(lambda x: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(x))))(at)


def forward_over_reverse(loss: Any, at: Any) -> Any:
    """The gradient's derivative in a direction."""
    return jax.jvp(jax.grad(loss), (at,), (jax.tree.map(lambda x: jnp.roll(x, 1), at),))


def in_a_direction(loss: Any, at: Any) -> Any:
    return jax.jvp(loss, (at,), (jax.tree.map(lambda x: jnp.roll(x, 1), at),))


def derived(derivative: Any, attend: Any) -> Any:
    """Derivatives, compiled: eager, each operation of each rule would be a separate program."""
    loss, at = with_numbers(attend)
    return jax.jit(partial(derivative, loss), compiler_options=QUICK)(at)


@cache
def of_dense_attention(derivative: Any) -> Any:
    return derived(derivative, dense_attention)


@pytest.mark.parametrize(
    ("derivative", "either_mode"),
    (
        (norm, False),
        (forward_over_reverse, True),
        slow(norm, True),
        slow(forward_over_reverse, False),
    ),
)
def test_second_derivatives(either_mode, derivative):
    got = derived(derivative, replace(small, forward_mode=either_mode))
    # Float32 against float32, through two derivatives of a square.
    assert_near(got, of_dense_attention(derivative), 256)


def test_forward_mode():
    got = derived(in_a_direction, replace(small, forward_mode=True))
    assert_near(got, of_dense_attention(in_a_direction), 64)
    loss, at = with_numbers(small)
    with pytest.raises(TypeError, match="custom_vjp"):
        in_a_direction(loss, at)


def precisions(jaxpr: Any) -> list[Any]:
    """Precision of every matrix product of a jaxpr and of the jaxprs inside it."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn.params["precision"])
        for inner in jaxprs_in_params(eqn.params):
            found += precisions(inner)
    return found


@pytest.mark.parametrize(
    "attend",
    (small, replace(small, forward_mode=True), dense_attention),
    ids=("blockwise", "blockwise, either mode", "dense"),
)
@pytest.mark.parametrize(
    "derivative", (lambda loss, at: jax.grad(loss)(at), norm), ids=("first", "second")
)
def test_products_have_the_precision_of_the_call(attend, derivative):
    """Products of derivatives have the precision, too, though JAX traces them outside the call."""

    def highest(*args: Any, **keywords: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return attend(*args, **keywords)

    plain, at = with_numbers(highest)
    # JAX traces more rules outside the context if a function is compiled before its derivative.
    for loss in (plain, jax.jit(plain), jax.checkpoint(plain)):
        found = precisions(jax.make_jaxpr(partial(derivative, loss))(at).jaxpr)
        assert len(found) >= 6
        assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_a_batch_of_attentions():
    inputs = [jnp.stack([x, 2 * x, -x]) for x in map(jnp.asarray, operands(SIZES)[:3])]
    lengths = jnp.array([[17, 3], [0, 9], [5, 17]], jnp.int32)

    def attend(f, *operands):
        *qkv, lengths = operands
        return jax.grad(lambda *x: jnp.sum(f(*x, key_value_seq_lengths=lengths) ** 2))(*qkv)

    got, expected = (
        jax.jit(jax.vmap(partial(attend, f)), compiler_options=QUICK)(*inputs, lengths)
        for f in (small, dense_attention)
    )
    assert_near(got, expected, 64)


@st.composite
def described(draw):
    """Sizes, and options that rule out keys by where tokens are."""
    # A few lengths, as every operation is compiled for each shape.
    T, S = draw(st.sampled_from((1, 7, 12))), draw(st.sampled_from((1, 5, 12)))
    B = 2
    some = {}
    if draw(st.booleans()):
        some["is_causal"] = True
    if draw(st.booleans()):
        some["local_window_size"] = draw(st.tuples(st.integers(0, 6), st.integers(0, 6)))
    kind = draw(st.sampled_from(("from 0", "offset", "positions")))

    def tokens(n, low, high):
        return np.array(
            [draw(st.lists(st.integers(low, high), min_size=n, max_size=n)) for _ in range(B)],
            np.int32,
        )

    if kind == "offset":
        some["query_offset"] = draw(st.integers(-13, 13))
    if kind == "positions":
        some["positions"] = tokens(T, -5, 15), tokens(S, -5, 15)
    if draw(st.booleans()):
        some["segment_ids"] = tokens(T, 0, 3), tokens(S, 0, 3)
    for name, n in (("query_seq_lengths", T), ("key_value_seq_lengths", S)):
        if draw(st.booleans()):
            some[name] = np.array([draw(st.integers(0, n)) for _ in range(B)], np.int32)
    return B, T, S, some


def mask_of(B: int, T: int, S: int, some: dict[str, Any]) -> Any:
    return Mask(**arrays_of(some))


@settings(max_examples=20)
@given(drawn=described(), size=st.sampled_from((1, 2, 5)))
def test_no_block_that_matters_is_left_out(drawn, size):
    B, T, S, some = drawn
    mask = mask_of(B, T, S, some)
    allowed = mask.attends(Tokens(0, T), Tokens(0, S))
    if allowed is None:
        return
    meets = np.any(np.broadcast_to(np.asarray(allowed), (B, 1, T, S)), axis=(0, 1), keepdims=True)
    meets = meets.reshape(T, S)
    for tokens, partners, bounds in ((T, S, "keys_of"), (S, T, "queries_of")):
        for start in range(0, tokens - min(size, tokens) + 1):
            block = Tokens(start, min(size, tokens))
            low, high = getattr(block_ranges, bounds)(mask, block, Tokens(0, partners))
            some_partner = meets if bounds == "keys_of" else meets.T
            met = np.flatnonzero(some_partner[start : start + block.size].any(0))
            assert 0 <= low <= high <= partners
            assert all(low <= met)
            assert all(met < high)


SKIPPED = {
    "causal": ({"is_causal": True}, lambda t, s: s <= t),
    "window": ({"local_window_size": (8, 0)}, lambda t, s: (s <= t) & (t - s <= 8)),
    "documents": (
        {"segment_ids": np.repeat(np.arange(4, dtype=np.int32), 16)[None]},
        lambda t, s: t // 16 == s // 16,
    ),
    "documents by positions": (
        {"positions": np.arange(64, dtype=np.int32)[None] + 5, "local_window_size": 3},
        lambda t, s: abs(t - s) <= 3,
    ),
    "short keys": ({"key_value_seq_lengths": np.array([9], np.int32)}, lambda t, s: s < 9),
    "short queries": ({"query_seq_lengths": np.array([9], np.int32)}, lambda t, s: t < 9),
}


@pytest.mark.parametrize(("some", "rule"), SKIPPED.values(), ids=SKIPPED)
def test_the_blocks_that_are_left_out(some, rule):
    """Every block whose pairs are all ruled out is left out: work falls with the mask."""
    n, size = 64, 8
    mask = mask_of(1, n, n, some)
    t, s = np.arange(n)[:, None], np.arange(n)[None, :]
    blocks = np.broadcast_to(rule(t, s), (n, n)).reshape(n // size, size, n // size, size)
    some_pair = blocks.sum(axis=(1, 3)) > 0
    for bounds, needed in (("keys_of", some_pair), ("queries_of", some_pair.T)):
        for i in range(n // size):
            low, high = getattr(block_ranges, bounds)(mask, Tokens(i * size, size), Tokens(0, n))
            low, high = int(low) // size, -(-int(high) // size)
            assert high - low == needed[i].sum(), f"{bounds} block {i}: {low} to {high}"


def test_memory_is_linear_in_the_tokens():
    """The compiled program, with gradients, holds no more than the arrays and a few blocks."""

    def bytes_held(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)

        def gradients(q, k, v, grad):
            attend = partial(Blockwise(query_chunk=64, key_chunk=64), is_causal=True)
            return jax.vjp(attend, q, k, v)[1](grad)

        return temporaries(jax.jit(gradients).lower(x, x, x, x).compile())

    sizes = [bytes_held(n) for n in (1024, 2048, 4096)]
    first, second = (b - a for a, b in pairwise(sizes))
    assert second <= 2.1 * first
    assert sizes[-1] < 4096 * 4096 * 4 / 8, "less than the weights of a head would take"


def test_nobody_pays_for_the_gradient_of_a_bias_that_is_not_asked_for():
    q, k, v, grad = map(jnp.asarray, operands(SIZES))
    bias = jnp.asarray(EVERYTHING["bias"])

    def loops(*wanted):
        def gradients(q, k, v, bias):
            attend = jax.vjp(lambda *x: small(*x[:3], bias=x[3]), q, k, v, bias)[1](grad)
            return [attend[i] for i in wanted]

        text = jax.jit(gradients).lower(q, k, v, bias).compile().as_text()
        assert text
        return text.count(" while(")

    assert loops(0, 1, 2) < loops(0, 1, 2, 3)


ADVERSARIAL = {
    "no key for any query": {"mask": np.zeros((1, 1, 13, 17), bool)},
    "no key for one sequence": {"key_value_seq_lengths": np.array([0, 17], np.int32)},
    "every logit -inf by bias": {"bias": np.full((1, 1, 13, 17), -np.inf, np.float32)},
    "some logits -inf by bias": {
        "bias": np.where(rng.random((2, 4, 13, 17)) < 0.5, -np.inf, 0).astype(np.float32)
    },
    "whole rows and columns -inf by bias": {
        "bias": np.where(np.arange(13) % 3 == 0, -np.inf, 0).astype(np.float32)[None, None, :, None]
    },
    "a window of one": {"local_window_size": 0},
    "a window that no key meets": {"local_window_size": 1, "query_offset": 40},
    "an offset before all keys": {"is_causal": True, "query_offset": -7},
    "sinks of -inf": {"sinks": np.full(4, -np.inf, np.float32)},
    "sinks and no key": {
        "sinks": np.ones(4, np.float32),
        "mask": np.zeros((1, 1, 13, 17), bool),
    },
    "sinks above every logit": {"sinks": np.full(4, 40.0, np.float32)},
    "large logits": {"scale": 400.0},
    "almost everything dropped": {
        "dropout_rate": 0.999,
        "dropout_rng": np.array([1, 2], np.uint32),
    },
    "segments that never meet": {
        "segment_ids": (np.zeros((2, 13), np.int32), np.ones((2, 17), np.int32))
    },
    "segments of the largest numbers": {
        "segment_ids": (
            np.full((2, 13), 2**31 - 1, np.int32),
            np.where(np.arange(17) < 5, 2**31 - 1, -(2**31)).astype(np.int32)[None].repeat(2, 0),
        )
    },
}


@pytest.mark.parametrize("some", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial(some):
    inputs = operands(SIZES)
    got = run_jax(small, some, "blockwise", inputs, QUICK)
    truth = run_torch(some, "blockwise", inputs)
    # Of all of them: the gradient of a bias that is the same for all keys is a sum to 0.
    unit = EPS * max(np.max(np.abs(x)) for x in truth.values())
    for name, expected in truth.items():
        assert np.isfinite(np.asarray(got[name])).all()
        # Where logits are large so is their rounding: relative to a weight it is the largest logit
        # times eps.
        logits = 400 * 8 if some.get("scale") == 400.0 else 16
        assert error(got[name], expected) <= logits * unit, name


def exact_logits(common: float) -> list[np.ndarray]:
    """Operands whose products are multiples of 1/4 with a common part, held exactly by float32."""
    inputs = operands(replace(SIZES, V=5))  # jax.nn has H = V
    q, k = (np.round(x * 2) / 2 for x in inputs[:2])
    q[..., 0], k[..., 0] = 512, common / 512
    return [q, k, *inputs[2:]]


BEFORE = np.arange(17) < np.array([[6], [3]])  # keys of padding on the left of each sequence
# Half of the pairs are more than 2^29 apart, which is the largest distance that counts.
FARTHEST = tuple(
    np.stack([np.arange(n, dtype=np.int32) * (1 << 25)] * 2) + first
    for n, first in ((13, -(1 << 29)), (17, 0))
)


def padding_bias(masked: float, kept: float = 0.0) -> np.ndarray:
    return np.where(BEFORE, masked, kept).astype(np.float32)[:, None, None, :]


# Common part of the dot products, options, and what the sinks are near to.
LARGE: dict[str, tuple[float, dict[str, Any], float]] = {
    "padding by finfo.min": (0.0, {"bias": padding_bias(LEAST)}, 0.0),
    "padding by -1e9": (0.0, {"bias": padding_bias(-1e9)}, 0.0),
    "rows of padding alone": (
        0.0,
        {"bias": padding_bias(LEAST), "is_causal": True},
        -1e30,
    ),
    "rows of padding by -1e9 alone": (0.0, {"bias": padding_bias(-1e9), "is_causal": True}, -1e9),
    "a bias of 1e5": (0.0, {"bias": padding_bias(1e5, 1e5 - 2)}, 1e5),
    "dot products of 2^17": (2.0**19, {}, 2.0**17),
    "ALiBi from a million positions away": (
        0.0,
        {"alibi_slopes": SLOPES, "positions": FAR},
        -(2.0**19),
    ),
    "ALiBi beyond the largest distance": (
        0.0,
        {"alibi_slopes": SLOPES * np.float32(2.0**-26), "positions": FARTHEST},
        0.0,
    ),
}
SCALE = 0.25


def in_float64(
    inputs: list[np.ndarray], some: dict[str, Any], dlse: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Results, and the sums of the sizes of the terms of each, of logits rounded to float32 once.

    That rounding belongs to every kernel: beside -1e9 float32 holds no dot product.
    """
    q, k, v, do = (x.astype(np.float64) for x in inputs)
    k, v = (x.repeat(2, axis=2) for x in (k, v))
    bias = some.get("bias", np.zeros((1, 1, 1, 1)))
    t, s = some.get("positions", (np.arange(13)[None], np.arange(17)[None]))
    apart = np.minimum(abs(t[:, None, :, None] - s[:, None, None, :]), 2**29).astype(np.float64)
    slopes = some.get("alibi_slopes", np.zeros(4))[None, :, None, None]
    z = np.einsum("btnh,bsnh->bnts", q, k) * SCALE + bias - slopes * apart
    z = z.astype(np.float32).astype(np.float64)
    z = np.where((s[:, None, None] <= t[:, None, :, None]) | ("is_causal" not in some), z, -np.inf)
    sinks = some.get("sinks", np.full(4, -np.inf)).astype(np.float64)[None, :, None, None]
    top = np.maximum(z.max(-1, keepdims=True), sinks)
    total = np.exp(z - top).sum(-1, keepdims=True) + np.exp(sinks - top)
    p, of_sink = np.exp(z - top) / total, np.exp(sinks - top) / total

    def results(q: Any, k: Any, v: Any, do: Any, dlse: Any, sign: int) -> dict[str, np.ndarray]:
        dp = np.einsum("btnv,bsnv->bnts", do, v)
        D = (p * dp).sum(-1, keepdims=True)
        by_lse = dlse.swapaxes(1, 2)[..., None]
        dz = p * (dp + sign * D + by_lse)
        made = {
            "out": np.einsum("bnts,bsnv->btnv", p, v),
            "dq": np.einsum("bnts,bsnh->btnh", dz, k) * SCALE,
            "dk": np.einsum("bnts,btnh->bsnh", dz, q).reshape(2, 17, 2, 2, 5).sum(3) * SCALE,
            "dv": np.einsum("bnts,btnv->bsnv", p, do).reshape(2, 17, 2, 2, 5).sum(3),
        }
        if "bias" in some:
            made["bias"] = dz.sum((1, 2), keepdims=True)
        if "alibi_slopes" in some:
            made["alibi_slopes"] = sign * (dz * apart).sum((0, 2, 3))
        if "sinks" in some:
            made["sinks"] = (of_sink * (by_lse + sign * D)).sum((0, 2, 3))
        return made

    exact = results(q, k, v, do, dlse, -1)
    q, k, v, do, dlse = map(np.abs, (q, k, v, do, dlse))
    sizes = results(q, k, v, do, dlse, 1)
    return {name: (x, sizes[name]) for name, x in exact.items()}


OF_LARGE: dict[str, Any] = {
    "blockwise": partial(small, return_residual=True),
    "blockwise, either mode": partial(replace(small, forward_mode=True), return_residual=True),
    "dense": dense_attention,
    "jax.nn": jax.nn.dot_product_attention,
}


@pytest.mark.parametrize(
    ("kernel", "name"),
    (
        *(("blockwise", name) for name in LARGE),
        *(slow("dense", name) for name in LARGE),
        ("dense", "rows of padding alone"),
        ("blockwise, either mode", "padding by -1e9"),
        ("jax.nn", "padding by finfo.min"),
        ("jax.nn", "a bias of 1e5"),
    ),
)
def test_logits_with_a_large_common_part(kernel, name):
    """Output and gradients, through the lse as well, as if the common part was not there."""
    common, some, near = LARGE[name]
    q, k, v, do = map(jnp.asarray, inputs := exact_logits(common))
    dlse = np.zeros((2, 13, 4), np.float32)
    if kernel != "jax.nn":
        sinks = np.array([0.5, -1, 2, -np.inf], np.float32)
        some = some | {"sinks": np.float32(near) + sinks, "scale": SCALE}
    else:
        some = some | {"scale": SCALE}
    cotangent: Any = do
    if kernel.startswith("blockwise"):
        dlse = np.random.default_rng(1).standard_normal(dlse.shape).astype(np.float32)
        cotangent = do, jnp.asarray(dlse)
    added, rest = map(arrays_of, split(some, kernel))

    @partial(jax.jit, compiler_options=QUICK)
    def run(*operands: Any) -> Any:
        results, pull = jax.vjp(
            lambda q, k, v, added: OF_LARGE[kernel](q, k, v, **keywords_of(**added, **rest)),
            *operands,
        )
        return jax.tree.leaves(results)[0], *pull(cotangent)

    with jax.numpy_dtype_promotion("standard" if kernel == "jax.nn" else "strict"):
        *got, more = run(q, k, v, added)
    got = dict(zip(("out", "dq", "dk", "dv"), got, strict=True)) | more
    expected = in_float64(inputs, some, dlse)
    assert got.keys() == expected.keys()
    for tensor, (want, size) in expected.items():
        off = np.max(np.abs(np.asarray(got[tensor], np.float64) - want) / (size + 1e-30))
        assert off <= 16 * EPS, f"{tensor}: {off / EPS:.3g} units"


@pytest.mark.parametrize("sizes", (Sizes(1, 1, 1, 1, 1, 1, 1), Sizes(1, 1, 9, 3, 1, 4, 2)), ids=str)
def test_one_of_each(sizes):
    inputs = operands(sizes)
    truth = run_torch({}, "blockwise", inputs)
    got = run_jax(small, {}, "blockwise", inputs, QUICK)
    for name, expected in truth.items():
        # Of one key the gradient of the query is a difference of equals.
        assert error(got[name], expected) <= 16 * EPS


@pytest.mark.parametrize("shape", ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)), ids=str)
def test_nothing_to_do(shape):
    B, T, S, N = shape
    q, k = jnp.zeros((B, T, N, 5)), jnp.ones((B, S, N, 5))
    out, lse = small(q, k, k, return_residual=True)
    assert out.shape == (B, T, N, 5)
    assert not out.any()
    assert (lse == -jnp.inf).all()
    assert jax.grad(lambda q: small(q, k, k).sum())(q).shape == q.shape


def test_values_of_no_channels():
    q, v = jnp.ones((2, 3, 4, 5)), jnp.zeros((2, 3, 4, 0))
    dq, dv = jax.grad(lambda q, v: small(q, q, v).sum(), (0, 1))(q, v)
    assert (dq.shape, dv.shape) == (q.shape, v.shape)
    assert not dq.any()


def test_a_head_has_its_bits_whatever_others_are_beside_it():
    q, k, v, grad = map(jnp.asarray, operands(Sizes(2, 13, 17, 8, 4, 5, 3)))

    @jax.jit
    def run(q, k, v, grad):
        out, pull = jax.vjp(partial(small, is_causal=True), q, k, v)
        return out, *pull(grad)

    whole = run(q, k, v, grad)
    part = run(q[:, :, 2:4], k[:, :, 1:2], v[:, :, 1:2], grad[:, :, 2:4])
    for a, b, heads in zip(whole, part, (slice(2, 4), *(slice(1, 2),) * 3), strict=True):
        heads = slice(2, 4) if a.shape[2] == 8 else heads
        assert compare_bits(a[:, :, heads], b).equal
