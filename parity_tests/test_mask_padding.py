"""Tokens that the devices do not divide: padded in a segment of their own, and cut again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, slow
from features import Sizes, exact_by_torch, operands, run_jax, run_torch
from flat_names import keywords_of
from jax.sharding import AxisType
from questions import QUICK, error

from jax_seqpar import (
    Blockwise,
    Logits,
    Mask,
    MeshLayout,
    dot_product_attention,
    exact_attention,
    pad_to_degree,
)
from jax_seqpar.compare import compare_bits

pytestmark = pytest.mark.usefixtures("less_optimised")

KERNELS = {
    "blockwise": Blockwise(query_chunk=4, key_chunk=5),
    "exact": exact_attention,
}
rng = np.random.default_rng(0)
CASES = {
    "self": (Sizes(2, 13, 13, 8, 4, 5, 5), {"is_causal": True}),
    "cross": (Sizes(2, 7, 18, 8, 8, 5, 3), {"is_causal": True, "query_offset": 11}),
    "only queries": (Sizes(2, 7, 16, 8, 8, 5, 3), {"local_window_size": (3, 9)}),
    "heads that do not divide": (Sizes(2, 9, 9, 6, 3, 5, 5), {"is_causal": True}),
    "documents": (
        Sizes(2, 13, 13, 4, 4, 5, 5),
        {"segment_ids": np.sort(rng.integers(0, 3, (2, 13)), axis=1).astype(np.int32)},
    ),
    "documents numbered to the last": (
        Sizes(2, 5, 5, 4, 4, 5, 5),
        {"segment_ids": np.array([[2**31 - 1] * 3 + [0] * 2] * 2, np.int32)},
    ),
    "documents of 8 bits": (
        Sizes(2, 5, 5, 4, 4, 5, 5),
        {"segment_ids": np.array([[127] * 3 + [-128] * 2] * 2, np.int8)},
    ),
    "masks": (
        Sizes(2, 13, 10, 4, 4, 5, 5),
        {
            "mask": rng.random((2, 1, 13, 10)) < 0.7,
            "bias": rng.standard_normal((1, 4, 13, 1)).astype(np.float32),
        },
    ),
    "positions": (
        Sizes(2, 13, 13, 4, 4, 5, 5),
        {"positions": np.arange(13, dtype=np.int32)[None].repeat(2, 0) % 5, "is_causal": True},
    ),
    "lengths, sinks and dropout": (
        Sizes(2, 13, 13, 4, 4, 5, 5),
        {
            "query_seq_lengths": np.array([13, 6], np.int32),
            "key_value_seq_lengths": np.array([4, 13], np.int32),
            "sinks": np.linspace(-1, 1, 4, dtype=np.float32),
            "dropout_rate": 0.3,
            "dropout_rng": np.array([1, 2], np.uint32),
        },
    ),
    "nothing to pad": (Sizes(2, 8, 8, 4, 4, 5, 5), {"is_causal": True}),
}
PADDED = ("bias", "mask", "positions", "segment_ids")


@pytest.mark.parametrize(
    ("name", "kernel"),
    # Exact attention, whose programs are large, where something is new to it.
    [
        slow(n, k) if (n, k) == ("cross", "exact") else (n, k)
        for n in CASES
        for k in KERNELS
        if k == "blockwise" or n in ("cross", "masks")
    ],
)
def test_as_without(name, kernel):
    """Output and gradients are those on one device; of exact attention, in every bit."""
    sizes, given = CASES[name]
    kind = (AxisType.Auto, AxisType.Explicit)[sizes.T % 2]
    mesh = ONE_AXIS[4].mesh(kind)
    attend = KERNELS[kernel]

    def padded(query, key, value, **options):
        given = keywords_of(**options)
        own = {name: given.pop(name) for name in ("bias", "mask", "logits") if name in given}
        p = pad_to_degree(query, key, value, degree=4, **own)
        assert p.query.shape[1] % 4 == p.key.shape[1] % 4 == 0
        out = dot_product_attention(
            p.query,
            p.key,
            p.value,
            **p.keywords,
            **given,
            kernel=attend,
            layout=MeshLayout(mesh=mesh),
        )
        return p.unpad(out)

    inputs = operands(sizes)
    if kernel == "exact":
        got, alone = run_jax(padded, given, kernel, inputs), exact_by_torch(given, inputs)
    else:
        got, alone = (run_jax(f, given, kernel, inputs, QUICK) for f in (padded, attend))
    for name, truth in run_torch(given, kernel, inputs).items():
        assert got[name].shape == truth.shape
        if kernel == "exact":
            assert compare_bits(got[name], alone[name]).equal
        unit = np.finfo(np.float32).eps * np.max(np.abs(truth), initial=0)
        assert error(got[name], truth) <= 2 * max(error(alone[name], truth), unit), name


def test_nothing_is_added_where_nothing_is_missing():
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 8, 12, 4, 4, 5, 5)))
    padded = pad_to_degree(q, k, v, degree=4)
    assert padded.keywords == {"mask": Mask(), "logits": Logits()}
    assert (padded.query, padded.key, padded.value) == (q, k, v)
    assert padded.unpad(q) is q


def test_what_is_added_belongs_to_nobody():
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 5, 6, 4, 4, 5, 5)))
    ids = jnp.array([[0, 0, 3, 3, 3]] * 2), jnp.array([[0, 0, 0, 5, 5, 5]] * 2)
    padded = pad_to_degree(q, k, v, degree=4, mask=Mask(segment_ids=ids))
    queries, keys = padded.keywords["mask"].segment_ids
    (of_queries,), (of_keys,) = ({*x.ravel().tolist()} for x in (queries[:, 5:], keys[:, 6:]))
    assert len({0, 3, 5, of_queries, of_keys}) == 5
    assert not padded.query[:, 5:].any()


@pytest.mark.parametrize(
    ("dtype", "some"),
    (
        ("uint8", (0, 1, 255)),
        ("int8", (-128, 1, 127)),
        ("int32", (0, 1, 2**31 - 1)),
        ("int32", (-(2**31), -1, 2**31 - 1)),
        ("uint32", (0, 1, 2**32 - 1)),
        ("uint32", (2**31 - 1, 2**31, 2**28)),
    ),
)
def test_what_is_added_is_in_no_segment_that_is_there(dtype, some):
    """Segments of padding are new, also beside the least and largest number of the dtype."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 5, 6, 4, 4, 5, 5)))
    ids = jnp.asarray(np.array([some], dtype)).repeat(2, axis=1).repeat(2, axis=0)
    padded = pad_to_degree(q, k, v, degree=4, mask=Mask(segment_ids=(ids[:, :5], ids)))
    queries, keys = padded.keywords["mask"].segment_ids
    given = {*queries[:, :5].ravel().tolist(), *keys[:, :6].ravel().tolist()}
    added = {*queries[:, 5:].ravel().tolist()}, {*keys[:, 6:].ravel().tolist()}
    assert len(given) == 3
    assert len(added[0]) == len(added[1]) == 1
    assert not given & (added[0] | added[1])
    assert not added[0] & added[1]


@pytest.mark.parametrize("degree", (0, -2, 2.0, "seq", True))
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_degree(degree):
    q, k, v, _ = map(jnp.asarray, operands(Sizes(1, 5, 5, 1, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"degree must be a positive Python integer, got"):
        pad_to_degree(q, k, v, degree=degree)


@pytest.mark.usefixtures("unchecked_shapes")
def test_arrays_that_do_not_fit():
    q, k, v, _ = map(jnp.asarray, operands(Sizes(1, 5, 5, 1, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"segment_ids must be integers of shape"):
        pad_to_degree(q, k, v, degree=4, mask=Mask(segment_ids=jnp.zeros((1, 8), jnp.int32)))


def test_the_refusal_names_what_helps():
    q, k, v, _ = map(jnp.asarray, operands(Sizes(1, 5, 5, 4, 4, 2, 2)))
    with pytest.raises(ValueError, match=r"pad_to_degree\(query, key, value, degree=4\)"):
        dot_product_attention(q, k, v, layout=ONE_AXIS[4].on())


def test_padding_is_compiled_too():
    """`pad_to_degree` under `jax.jit` returns a padding that can unpad."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 5, 6, 4, 4, 5, 5)))
    padded = jax.jit(lambda *x: pad_to_degree(*x, degree=4))(q, k, v)
    assert padded.query.shape[1] == padded.key.shape[1] == 8
    assert padded.unpad(padded.query).shape == q.shape


@pytest.mark.parametrize("widths", (("int64", "int32"), ("int32", "int64"), ("uint8", "int64")))
def test_documents_of_two_widths(widths):
    """The added tokens are in segments of their own, whichever side has the wider numbers."""
    with jax.enable_x64(True):
        q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in operands(Sizes(1, 6, 6, 4, 4, 5, 5)))
        ids: Any = tuple(jnp.zeros((1, 6), width) for width in widths)
        padded = pad_to_degree(q, k, v, degree=4, mask=Mask(segment_ids=ids))
        queries, keys = (np.asarray(x)[0] for x in padded.keywords["mask"].segment_ids)
        assert not queries[:6].any()
        assert not keys[:6].any()
        assert len({0, *queries[6:], *keys[6:]}) == 3


def test_documents_of_64_bits():
    with jax.enable_x64(True):
        q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in operands(Sizes(1, 5, 5, 4, 4, 5, 5)))
        ids = jnp.array([[0, 1 << 32, 2 << 32, 2 << 32, 3 << 32]])
        padded = pad_to_degree(q, k, v, degree=4, mask=Mask(segment_ids=ids))
        queries, _ = padded.keywords["mask"].segment_ids
        assert queries[:, :5].tolist() == ids.tolist()
        (added,) = {*queries[0, 5:].tolist()}
        assert added not in ids.ravel().tolist()
