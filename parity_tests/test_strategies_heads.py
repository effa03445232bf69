"""Heads that the devices do not divide: added ones, copied ones, even parts."""

from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, MeshCase, slow
from flat_names import keywords_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from questions import QUICK, attend, compiled, right_values, sharded_inputs

from jax_seqpar import MeshLayout, blockwise_attention, dot_product_attention
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import all_to_all_bytes, collectives
from jax_seqpar.strategies.heads import plan_heads

pytestmark = pytest.mark.usefixtures("less_optimised")

# (N, K, P): query heads, KV heads, devices.
UNEVEN = (
    (6, 6, 4),  # neither divides
    (6, 3, 4),  # grouped, neither divides
    (8, 2, 8),  # fewer KV heads than devices
    (12, 3, 8),  # fewer, and they do not divide
    (12, 6, 4),  # more, and they do not divide
    (5, 5, 8),  # fewer query heads than devices
    (1, 1, 4),  # one
    (7, 1, 4),  # one KV head, a prime number of query heads
    (14, 2, 8),  # as in Qwen2-0.5B
    (28, 4, 8),  # as in Qwen2-7B
)


# More of the same.
LESS_UNEVEN = {(6, 6, 4), (12, 6, 4), (14, 2, 8)}


@pytest.mark.parametrize("sizes", [slow(x) if x in LESS_UNEVEN else x for x in UNEVEN], ids=str)
def test_output_and_gradients(sizes):
    heads, kv_heads, degree = sizes
    kind = (AxisType.Auto, AxisType.Explicit)[heads % 2]
    case = Case(batch=2, tokens=24, heads=heads, kv_heads=kv_heads, head_dim=5)
    right_values(case, ONE_AXIS[degree], kind)


# Degree, tensor-parallel shards, N and K.
TENSOR_PARALLEL = (
    (4, 2, 6, 2),  # 3 query heads of a shard on 4 devices
    (4, 2, 12, 4),
    (2, 4, 8, 2),  # each KV head is that of two neighbouring shards of four
)


@pytest.mark.parametrize("sizes", TENSOR_PARALLEL, ids=str)
def test_with_tensor_parallel_heads(sizes):
    """Each device of the sequence has an even part of the heads of a tensor-parallel shard."""
    degree, shards, heads, kv_heads = sizes
    where = MeshCase((degree, shards), ("seq", "tensor"), MeshLayout(heads="tensor"))
    right_values(Case(2, 16, heads, kv_heads, 5), where)


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
@pytest.mark.usefixtures("optimised")
def test_bytes(sizes):
    """Four all-to-alls, of even parts: ceil(N / P) query heads each way."""
    heads, kv_heads, degree = sizes
    case, where = Case(2, 24, heads, kv_heads, 5), ONE_AXIS[degree]
    *inputs, _ = sharded_inputs(case, where)
    program = compiled(attend(case, where), *inputs)
    plan = plan_heads(heads, kv_heads, degree)
    assert plan.query_heads == -(-heads // degree) * degree
    assert collectives(program) == {"all-to-all": 4}
    sent = plan.query_heads + plan.padded_kv_heads * plan.copies
    assert all_to_all_bytes(program) == 2 * sent * 2 * (24 // degree) * 5 * 4


def fewest_heads(kv_heads, group, degree, may_copy):
    """Query heads, and KV heads sent, of the best of all plans.

    Each gives every device as many: groups that are whole, or a part of one.
    """
    firsts = [n for n in range(1, group + 1) if group % n == 0] if may_copy else [1]
    return min(
        (padded * ceil(group / first / copies) * copies, padded * copies)
        for first in firsts
        for padded in range(kv_heads * first, kv_heads * first + degree)
        for copies in range(1, degree + 1)
        if (padded % degree == 0 if copies == 1 else padded * copies == degree)
    )


@settings(max_examples=25)
@given(kv_heads=st.integers(1, 9), group=st.integers(1, 9), degree=st.integers(1, 9))
def test_every_query_head_finds_its_own_keys(kv_heads, group, degree):
    """Query head n finds KV head n // (query heads / KV heads) on its device, as kernels do."""
    heads = kv_heads * group
    for may_copy in (True, False):
        plan = plan_heads(heads, kv_heads, degree, may_copy=may_copy)
        best = fewest_heads(kv_heads, group, degree, may_copy)
        assert (plan.query_heads, plan.padded_kv_heads * plan.copies) == best
        queries = np.asarray(plan.pad_queries(jnp.arange(1, heads + 1), 0))
        keys = np.asarray(
            plan.spread_keys(jnp.arange(1, kv_heads + 1)[None, None, :, None])
        ).ravel()
        assert len(queries) % degree == len(keys) % degree == 0
        assert len(queries) % len(keys) == 0
        for n, head in enumerate(queries):
            if head > 0:
                assert keys[n // (len(queries) // len(keys))] == (head - 1) // group + 1
        back = np.asarray(plan.unpad_queries(jnp.asarray(queries), 0))
        assert list(back) == list(range(1, heads + 1))
        if not may_copy:
            # All devices that have a KV head are one run of `copies`.
            where = {}
            for i, head in enumerate(keys):
                where.setdefault(int(head), set()).add(i // (len(keys) // degree))
            runs = [d for head, d in where.items() if head > 0]
            assert all(max(d) - min(d) < plan.copies and min(d) % plan.copies == 0 for d in runs)
        else:
            assert len(queries) == -(-heads // degree) * degree


PER_HEAD = {
    "heads added to all": (Case(2, 16, 6, 3, 5), ONE_AXIS[4]),
    "heads added to those of a tensor-parallel shard": (
        Case(2, 16, 6, 2, 5),
        MeshCase((2, 2), ("seq", "tensor"), MeshLayout(heads="tensor")),
    ),
}


@pytest.mark.parametrize(("case", "where"), PER_HEAD.values(), ids=PER_HEAD)
def test_arrays_of_heads_are_padded_alike(case, where):
    """A bias, slopes and sinks of every head, on devices with added ones; gradients, too."""
    rng = np.random.default_rng(0)
    q, k, v, grad = map(jnp.asarray, case.inputs().values())
    added = {
        "bias": jnp.asarray(rng.standard_normal((1, 6, 16, 16)), jnp.float32),
        "alibi_slopes": jnp.asarray(rng.random(6), jnp.float32),
        "sinks": jnp.asarray(rng.standard_normal(6), jnp.float32),
    }

    def gradients(attend):
        def loss(operands):
            q, k, v, added = operands
            return jnp.vdot(attend(q, k, v, is_causal=True, **keywords_of(**added)), grad)

        return jax.jit(jax.grad(loss), compiler_options=QUICK)((q, k, v, added))

    got = gradients(partial(dot_product_attention, layout=where.on()))
    alone = gradients(blockwise_attention)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.max(jnp.abs(b))), rtol=0)


def test_added_heads_of_a_mask_have_a_key():
    """A softmax written out gives NaN in a row without one, and its KV head is that of others."""

    def softmax(query, key, value, *, mask):
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        z = jnp.einsum("btnh,bsnh->bnts", query, key)
        p = jax.nn.softmax(jnp.where(mask, z, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", p, value)

    mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 8, n, 4), np.float32)) for n in (6, 2, 2))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((8, 8), bool)), (1, 6, 8, 8))

    def gradients(attend):
        return jax.jit(jax.grad(lambda x: (attend(*x, mask=mask) ** 2).sum()))((q, k, v))

    sharded = partial(dot_product_attention, kernel=softmax, layout=MeshLayout(mesh=mesh))
    for got, expected in zip(gradients(sharded), gradients(softmax), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
