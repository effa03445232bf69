"""Integers beyond 32 bits mean what they say, or are refused: lengths, windows, counts, digests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jax_seqpar import (
    Blockwise,
    Dense,
    Exact,
    Fused,
    Mask,
    MeshLayout,
    dot_product_attention,
)
from jax_seqpar.flax import Attention, SequenceParallel
from jax_seqpar.training import (
    TokenLayout,
    cross_entropy,
    digest_arrays,
    tiled_cross_entropy,
)

pytestmark = pytest.mark.usefixtures("less_optimised")

KERNELS = {
    "dense": Dense(),
    "blockwise": Blockwise(3, 5),
    "exact": Exact(),
    "splash": Fused(interpret=True),
}
RNG = np.random.default_rng(0)


def operands(T=8, S=8):
    shapes = ((2, T, 4, 8), (2, S, 2, 8), (2, S, 2, 8))
    return [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in shapes]


def oracle(q, k, v, allowed):
    """Softmax attention in float64 of queries and keys that `allowed [B, T, S]` pairs."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    z = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[3])
    z = np.where(allowed[:, None], z, -np.inf)
    top = np.max(z, -1, keepdims=True, initial=-1e30)
    p = np.exp(z - top)
    total = p.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", p / np.where(total == 0, 1, total), v)


LENGTHS = {
    "int64 of NumPy": np.array([np.iinfo(np.int64).max, 3]),
    "uint32 of NumPy": np.array([2**32 - 1, 3], np.uint32),
    "uint32 of JAX": jnp.array([2**31, 3], jnp.uint32),
    "below everything": np.array([-(2**40), 3]),
    "uint8": np.array([200, 3], np.uint8),
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", ("query_seq_lengths", "key_value_seq_lengths"))
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_lengths_that_int32_does_not_hold(kernel, name, lengths):
    q, k, v = operands()
    inside = np.arange(8)[None] < np.asarray(lengths).astype(object)[:, None]
    allowed = inside[:, :, None] if name.startswith("query") else inside[:, None]
    expected = oracle(q, k, v, np.broadcast_to(allowed.astype(bool), (2, 8, 8)))
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    calls = [kernel]
    if not isinstance(kernel, Fused):
        layout = MeshLayout(mesh=mesh)
        calls.append(lambda *x, **y: dot_product_attention(*x, **y, kernel=kernel, layout=layout))
    for call in calls:
        out = call(q, k, v, **{name: lengths})
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kernel", list(KERNELS.values())[:3], ids=list(KERNELS)[:3])
@pytest.mark.parametrize(
    "window", ((None, 0), (-1, 0), (0, None), (1 << 40, 0)), ids=("None", "-1", "right", "wide")
)
@pytest.mark.usefixtures("unchecked_shapes")  # arrays of NumPy, in an eager call
def test_an_open_side_of_a_window_is_open_at_any_distance(kernel, window):
    q, k, v = operands(1, 2)
    there, here = [[10**9, 10**9 + 5]] * 2, [[-(10**9) + 5, 10**9]] * 2
    of_query = np.array(there, np.int32)[:, :1] * (-1 if window[0] == 0 else 1)
    of_key = np.array(here, np.int32)
    before, after = ((1 << 62 if n in (None, -1) else n) for n in window)
    t, s = (x.astype(np.int64) for x in (of_query[:, :, None], of_key[:, None]))
    allowed = (s >= t - before) & (s <= t + after)
    assert allowed.any(), "a case in which something attends"
    mask = Mask(positions=(of_query, of_key), local_window_size=window)
    out = kernel(q, k, v, mask=mask)
    np.testing.assert_allclose(out, oracle(q, k, v, allowed), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_positions_that_leave_32_bits_are_refused():
    q, k, v = operands(1, 20)
    q = jnp.concatenate([q] * 20, 1)
    seconds = np.broadcast_to(1_700_000_000 + np.arange(20), (2, 20))
    for positions in (seconds, -seconds, (seconds - seconds.min(), seconds.astype(np.int32))):
        mask = Mask(positions=positions, local_window_size=(3, 500_000_000))
        with pytest.raises(ValueError, match=r"positions has numbers from .*positions\.min\(\)"):
            Blockwise()(q, k, v, mask=mask)


def test_a_count_of_labels_beyond_int32():
    logits, labels = jnp.asarray(RNG.standard_normal((5, 7)), jnp.float32), jnp.arange(5)
    total = 5 * float(cross_entropy(logits, labels))
    hidden, kernel = jnp.ones((1, 5, 2)), jnp.ones((2, 7))
    layout = MeshLayout(None)
    mesh = jax.make_mesh((1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    tiled = 5 * float(
        tiled_cross_entropy(hidden, kernel, labels[None], tiles=1, layout=layout.on(mesh))
    )
    for count in (2**31, np.int64(2**31 + 5), np.array(2**32 + 2), np.uint64(2**63)):
        got = cross_entropy(logits, labels, normaliser=count)
        np.testing.assert_allclose(got, total / int(count), rtol=1e-6)
        got = tiled_cross_entropy(
            hidden, kernel, labels[None], tiles=1, normaliser=count, layout=layout.on(mesh)
        )
        np.testing.assert_allclose(got, tiled / int(count), rtol=1e-6)
    assert cross_entropy(logits, labels, normaliser=0) == pytest.approx(total)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("count", (-5, True, 2.0, np.array([3, 4]), jnp.array([3]), "5"))
def test_what_is_no_count_of_labels(count):
    with pytest.raises(ValueError, match="normaliser must be one integer"):
        cross_entropy(jnp.zeros((5, 7)), jnp.arange(5), normaliser=count)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("index", (None, 2.5, True, 2**31, np.array([1, 2]), np.int64(2**32 + 2)))
def test_what_is_no_label_to_ignore(index):
    with pytest.raises(ValueError, match="ignore_index must be a Python integer of 32 bits"):
        cross_entropy(jnp.zeros((5, 7)), jnp.arange(5), ignore_index=index)


@pytest.mark.parametrize("index", (2**31 - 1, -100))
def test_a_label_beyond_32_bits_is_never_ignored(index):
    with jax.enable_x64(True):
        labels = jnp.array([1, 2**31 + 5], jnp.int64)
        assert np.isnan(cross_entropy(jnp.zeros((2, 4), jnp.float32), labels, ignore_index=index))


def test_complex_numbers_have_one_digest_in_numpy_and_in_jax():
    for dtype in (np.complex64, np.complex128):
        x = (RNG.standard_normal((3, 4)) + 1j * RNG.standard_normal((3, 4))).astype(dtype)
        with jax.enable_x64(True):
            assert digest_arrays(x) == digest_arrays(jnp.asarray(x))
        assert digest_arrays(x) != digest_arrays(x.conj())
        with jax.enable_x64(True):
            assert digest_arrays(x[1, 2]) == digest_arrays(jnp.asarray(x[1, 2]))
    for empty in (np.zeros(0), np.zeros((3, 0), np.int64), np.zeros((0, 2), np.complex128)):
        assert digest_arrays(empty)[""].startswith(f"{empty.dtype}{list(empty.shape)} ")
    native = np.arange(6.0, dtype=np.float32)
    assert digest_arrays(native) == digest_arrays(native.astype(">f4"))


class Tensor:
    shape, dtype = (2,), np.dtype("float32")


@pytest.mark.parametrize(
    "leaf",
    (
        "text",
        np.array(["text"]),
        np.array([1], "datetime64[s]"),
        np.zeros(2, [("a", "f4")]),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.ones(2, np.longdouble),
        np.zeros(2, jax.dtypes.float0),
        Tensor(),
    ),
    ids=lambda leaf: type(leaf).__name__,
)
def test_what_has_no_digest(leaf):
    with pytest.raises(ValueError, match=r"\['a'\] is no array of numbers, but .* Leave it out"):
        digest_arrays({"a": leaf})


@pytest.mark.usefixtures("unchecked_shapes")
def test_tokens_that_would_be_lost():
    place = TokenLayout(MeshLayout(mesh=jax.make_mesh((2,), ("seq",))))
    tokens = np.arange(8).reshape(2, 4)
    masked = np.ma.masked_array(tokens, tokens > 5)
    for given in (
        {"tokens": masked},
        {"tokens": tokens, "labels": masked},
        {"tokens": tokens, "segment_ids": masked},
        {"tokens": tokens, "lengths": np.ma.masked_array([4, 3], [True, False])},
    ):
        with pytest.raises(ValueError, match="is a masked array, and its mask would be lost"):
            place.shard(**given)
    with pytest.raises(ValueError, match=r"the token at \[1, 0\] is -100, which as a label"):
        place.shard(np.where(tokens == 4, -100, tokens))
    place.shard(np.where(tokens == 4, -100, tokens), segment_ids=np.where(tokens < 4, 1, 0))


@pytest.mark.usefixtures("unchecked_shapes")
def test_masks_of_more_axes_than_the_attention():
    mesh = jax.make_mesh((2,), ("seq",))
    attend = SequenceParallel(MeshLayout(mesh=mesh))
    x = jnp.ones((2, 6, 4, 4))
    for name, shape in (
        ("mask", (2, 1, 1, 6, 6)),
        ("bias", (1, 2, 1, 1, 6, 6)),
        ("mask", (3, 1, 6, 6)),
    ):
        given: Any = {name: jnp.ones(shape)}
        with pytest.raises(ValueError, match=rf"{name} must broadcast to \[\*batch, N, T, S\]"):
            attend(x, x, x, **given)
    layer = linen.MultiHeadDotProductAttention(4, attention_fn=attend)
    inputs = jnp.ones((2, 6, 16))
    with pytest.raises(ValueError, match=r"mask must broadcast"):
        layer.init(jax.random.key(0), inputs, mask=jnp.ones((2, 1, 1, 6, 6), bool))


def test_nothing_to_attend_in_flax():
    attend = SequenceParallel(MeshLayout(mesh=jax.make_mesh((2,), ("seq",))))
    for shape in ((0, 6, 4, 4), (2, 0, 4, 4)):
        x = jnp.ones(shape)
        assert attend(x, x, x).shape == shape


def test_a_cache_of_a_batch_that_the_devices_do_not_divide():
    mesh = jax.make_mesh((2, 2), ("data", "seq"))
    layer = Attention(16, num_heads=4, layout=MeshLayout(batch="data", mesh=mesh), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"batch = 1 sequences, which the 2 devices"):
        layer.init_cache(1, 6)
