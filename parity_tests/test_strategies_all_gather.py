"""AllGatherKV: the same attention as on one device, from a part of the queries and all the keys.

The kernels are the oracle of themselves here only in that a device has a part of the queries; that
they are right is asked elsewhere. Exact attention gives the same bits.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, MeshCase, slow
from flat_names import keywords_of
from jax.sharding import AxisType
from questions import compiled, output_and_gradients

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Fused,
    MeshLayout,
    Ulysses,
    blockwise_attention,
    dense_attention,
    dot_product_attention,
    exact_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import collectives, received_bytes

pytestmark = pytest.mark.usefixtures("less_optimised")

CASE = Case(batch=2, tokens=16, heads=6, kv_heads=2, head_dim=5)
RNG = np.random.default_rng(0)
B, T, N = CASE.batch, CASE.tokens, CASE.heads
OPTIONS = {
    "everything attends": {},
    "causal, shifted": {"is_causal": True, "query_offset": 5},
    "window": {"local_window_size": (3, 1)},
    "segments": {
        "segment_ids": np.sort(RNG.integers(0, 3, (B, T)), 1).astype(np.int32),
        "is_causal": True,
    },
    "lengths": {
        "query_seq_lengths": np.array([16, 7], np.int32),
        "key_value_seq_lengths": np.array([9, 16], np.int32),
    },
    "positions": {
        "positions": np.tile(np.arange(T, dtype=np.int32) % 7, (B, 1)),
        "is_causal": True,
    },
    "bias": {
        "bias": RNG.standard_normal((1, N, T, T)).astype(np.float32),
        "logits_soft_cap": 2.0,
        "is_causal": True,
    },
    "mask, sinks, slopes": {
        "mask": RNG.random((B, 1, T, T)) < 0.7,
        "sinks": RNG.standard_normal(N).astype(np.float32),
        "alibi_slopes": np.ones(N, np.float32),
    },
    "dropout": {
        "dropout_rate": 0.4,
        "dropout_rng": np.array([3, 5], np.uint32),
        "is_causal": True,
    },
}
KERNELS = {
    "dense": dense_attention,
    "blockwise": Blockwise(query_chunk=3, key_chunk=5),
    "exact": exact_attention,
}
WHERE = {
    "4": (ONE_AXIS[4], AxisType.Auto),
    "8 explicit": (ONE_AXIS[8], AxisType.Explicit),
    "2 x 2 x 2": (
        MeshCase((2, 2, 2), ("data", "seq", "tp"), MeshLayout(batch="data", heads="tp")),
        AxisType.Auto,
    ),
}


def pairs():
    """Every pair of two columns; a whole table on each mesh takes minutes to compile."""
    for (i, options), (j, kernel) in product(enumerate(OPTIONS), enumerate(KERNELS)):
        case = options, kernel, list(WHERE)[(i + j) % len(WHERE)]
        # Exact attention with all options but positions at once: `test_strategies_exact_ring.py`.
        often = kernel != "exact" or options in ("positions", "bias", "dropout")
        yield case if often else slow(*case)


@pytest.mark.parametrize(("options", "kernel", "where"), [*pairs()])
def test_a_part_of_the_queries(options, kernel, where):
    some = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, OPTIONS[options]
    )
    attention, (mesh, kind) = KERNELS[kernel], WHERE[where]
    inputs = CASE.inputs()
    alone = output_and_gradients(partial(attention, **keywords_of(**some)))(**inputs)
    sharded = partial(
        dot_product_attention,
        kernel=attention,
        layout=mesh.on(kind),
        strategy=AllGatherKV(),
        **keywords_of(**some),
    )
    got = output_and_gradients(sharded)(**inputs)
    if kernel == "exact":
        assert compare_bits(got, alone).equal
    for x, y in zip(got, alone, strict=True):
        # Sums over keys in other blocks, and over devices: some additions of float32 more.
        np.testing.assert_allclose(x, y, rtol=0, atol=32 * 2**-24 * float(jnp.abs(y).max()))


def test_queries_and_keys_of_two_lengths():
    q = jnp.asarray(RNG.standard_normal((2, 8, 4, 8)), jnp.float32)
    k, v = jnp.asarray(RNG.standard_normal((2, 2, 24, 2, 8)), jnp.float32)
    options = {"is_causal": True, "query_offset": 16}
    sharded = partial(dot_product_attention, layout=ONE_AXIS[4].on(), strategy=AllGatherKV())
    got = sharded(q, k, v, kernel=exact_attention, **keywords_of(**options))
    assert compare_bits(got, exact_attention(q, k, v, **keywords_of(**options))).equal


@pytest.mark.usefixtures("unchecked_shapes")
def test_exact_attention_under_vmap():
    """A loop, of which the number of the first query is an operand."""
    q, k, v = (jnp.asarray(RNG.standard_normal((2, 2, 16, 2, 4)), jnp.float32) for _ in range(3))
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        strategy=AllGatherKV(),
        layout=replace(ONE_AXIS[4].on(), check_vma=False),
        is_causal=True,
    )
    got = jax.vmap(attend)(q, k, v)
    for i in range(2):
        assert compare_bits(got[i], exact_attention(q[i], k[i], v[i], is_causal=True)).equal


def test_sums_of_a_block_on_several_devices_meet_before_they_are_cut():
    """Sums of weights 2^-50 below the others show a cut in every second element.

    A cut of sums of ordinary size is far below the last bit of a float32.
    """
    case = Case(batch=1, tokens=64, heads=1, kv_heads=1, head_dim=4)
    inputs = case.inputs()
    inputs["query"][..., 0], inputs["key"][..., 0] = 1, 0
    inputs["key"][:, 0, :, 0] = -35
    attend = partial(exact_attention, scale=1.0)
    alone = output_and_gradients(attend)(**inputs)
    sharded = partial(
        dot_product_attention,
        kernel=exact_attention,
        strategy=AllGatherKV(),
        layout=ONE_AXIS[4].on(),
        scale=1.0,
    )
    report = compare_bits(output_and_gradients(sharded)(**inputs), alone)
    assert report.equal, str(report)


@pytest.mark.parametrize("degree", (2, 4, 8))
@pytest.mark.parametrize("heads", ((8, 8), (6, 2), (16, 1), (3, 3)), ids=str)
@pytest.mark.usefixtures("optimised")
def test_bytes_sent_are_those_of_the_formula(heads, degree):
    case = Case(batch=2, tokens=16, heads=heads[0], kv_heads=heads[1], head_dim=5)
    *inputs, _ = map(jnp.asarray, case.inputs().values())
    shapes = [x.shape for x in inputs]
    mesh = ONE_AXIS[degree].mesh()
    for strategy, kinds in (
        (AllGatherKV(), {"all-gather": 2}),
        (Ulysses(), {"all-to-all": 4}),
    ):
        attend = partial(
            dot_product_attention, layout=MeshLayout(mesh=mesh), strategy=strategy, is_causal=True
        )
        program = compiled(attend, *inputs)
        assert collectives(program) == kinds
        expected = strategy.traffic(*shapes, degree=degree, itemsize=4)
        assert received_bytes(program, degree) == expected, strategy


REFUSED = {
    "a function that is told nothing": (
        {"kernel": lambda query, key, value: query},
        r"a function cannot be told that it has a part of the tokens. .*jax_seqpar.Blockwise",
    ),
    "a mask that is bound": (
        {"kernel": partial(blockwise_attention, is_causal=True)},
        r"got a function around Blockwise",
    ),
    "the TPU's kernel": (
        {"kernel": Fused(interpret=True)},
        r"a part of the queries with all keys is not supported by splash",
    ),
    "the class": (
        {"strategy": AllGatherKV},
        r"strategy must be Ulysses\(...\), AllGather",
    ),
    "a name": ({"strategy": "ulysses"}, r"strategy must be Ulysses\(...\), AllGather"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_refused(options, message):
    q, k, v, _ = map(jnp.asarray, CASE.inputs().values())
    options = {"strategy": AllGatherKV()} | options
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, k, v, layout=ONE_AXIS[4].on(), **keywords_of(**options))


def test_kernels_of_a_platform_are_not_chosen_for_a_part():
    """The default kernel for a part of the queries is the blockwise one, on every platform."""
    q, k, v, _ = map(jnp.asarray, CASE.inputs().values())
    mesh = ONE_AXIS[4].mesh()
    a, b = (
        jax.jit(
            partial(
                dot_product_attention,
                layout=MeshLayout(mesh=mesh),
                strategy=AllGatherKV(),
                **keywords_of(**some),
            )
        )(q, k, v)
        for some in ({}, {"kernel": blockwise_attention})
    )
    assert compare_bits(a, b).equal
