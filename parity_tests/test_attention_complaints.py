"""Reports of users of other libraries, each with a test by the name of the report.

https://github.com/<owner>/<repository>/issues/<number>; a report names the symptom, its test
would have shown the bug.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS
from features import Sizes, operands, run_jax, run_torch
from flat_names import keywords_of
from jax.sharding import PartitionSpec
from questions import QUICK, error

from jax_seqpar import (
    Blockwise,
    Dropout,
    Logits,
    Mask,
    blockwise_attention,
    dense_attention,
    dot_product_attention,
    exact_attention,
    head_keys,
    heads_to_sequence,
    pad_to_degree,
    sequence_to_heads,
)
from jax_seqpar.compare import compare_bits

pytestmark = pytest.mark.usefixtures("less_optimised")

EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(11)


def sharded(degree: int, **options: Any) -> Any:
    small = Blockwise(query_chunk=5, key_chunk=7)
    return partial(
        dot_product_attention,
        layout=ONE_AXIS[degree].on(),
        **keywords_of(**{"kernel": small} | options),
    )


def assert_right(
    sizes: Sizes,
    degree: int = 4,
    given: dict[str, Any] | None = None,
    compiler_options: dict[str, Any] | None = QUICK,
) -> Any:
    """Output and gradients against float64; returns them."""
    inputs, given = operands(sizes), given or {}
    got = run_jax(sharded(degree), given, "blockwise", inputs, compiler_options)
    for name, truth in run_torch(given, "blockwise", inputs).items():
        # Seen to be 4 units at most, here as on one device.
        assert error(got[name], truth) <= 16 * EPS * np.max(np.abs(truth)), name
    return got


def differs(a: Any, b: Any) -> bool:
    """Whether the largest error is far above rounding, which shows that an option has an effect."""
    return error(a, np.asarray(b, np.float64)) > 1e-2


def test_scrambled_with_more_than_one_sequence():
    """DeepSpeed 5808, 5366, 7842: silently, with batch > 1 or with the batch in another axis."""
    assert_right(Sizes(3, 16, 16, 8, 4, 5, 5))
    labels = jnp.arange(3 * 16 * 8 * 2, dtype=jnp.float32).reshape(3, 16, 8, 2)
    spec = PartitionSpec(None, "seq")

    def there_and_back(x):
        return heads_to_sequence(sequence_to_heads(x, "seq"), "seq")

    mesh = ONE_AXIS[4].mesh()
    mapped = jax.shard_map(there_and_back, mesh=mesh, in_specs=spec, out_specs=spec)
    assert compare_bits(jax.jit(mapped)(labels), labels).equal
    # Through the identity in the middle a wrong pair of reshards can hide; through the sequence's
    # running sum on the way it cannot.
    out = sharded(4, kernel=lambda query, key, value: jnp.cumsum(query, axis=1))(
        labels, labels, labels
    )
    assert compare_bits(out, jnp.cumsum(labels, axis=1)).equal


def test_a_sequence_that_does_not_divide_is_wrong_in_silence():
    """DeepSpeed 7384."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 18, 18, 8, 4, 5, 5)))
    with pytest.raises(
        ValueError, match=r"T = 18 is not divisible by the 4 devices.*pad_to_degree"
    ):
        sharded(4)(q, k, v)
    padded = pad_to_degree(q, k, v, degree=4)
    out = padded.unpad(sharded(4)(padded.query, padded.key, padded.value, **padded.keywords))
    assert error(out, np.asarray(dense_attention(q, k, v), np.float64)) <= 16 * EPS


def test_replicas_drift_apart():
    """DeepSpeed 6868: here what every device has whole gets the same gradient on each."""
    sinks = jnp.asarray(rng.standard_normal(8), jnp.float32)
    q, k, v, grad = map(jnp.asarray, operands(Sizes(2, 16, 16, 8, 4, 5, 5)))
    whole = jax.sharding.NamedSharding(ONE_AXIS[4].mesh(), PartitionSpec())

    def loss(sinks):
        return jnp.vdot(sharded(4)(q, k, v, logits=Logits(sinks=sinks)), grad)

    dsinks = jax.jit(jax.grad(loss), out_shardings=whole)(jax.device_put(sinks, whole))
    replicas = [np.asarray(shard.data) for shard in dsinks.addressable_shards]
    assert len(replicas) == 4
    assert all(compare_bits(x, replicas[0]).equal for x in replicas)


@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_no_more_devices_than_key_value_heads(kv_heads):
    """verl 1226, prime-rl 3042: here K is any number, 1 included, with right gradients."""
    assert_right(Sizes(2, 16, 16, 8, kv_heads, 5, 5), 8, {"is_causal": True})


@pytest.mark.parametrize("heads", ((6, 2), (12, 12), (28, 4)), ids=str)
def test_heads_that_the_devices_do_not_divide(heads):
    """DeepSpeed 4674: uneven heads, whose groups must stay whole."""
    assert_right(Sizes(2, 16, 16, heads[0], heads[1], 5, 5), 8, {"is_causal": True})


def test_packing_merges_documents():
    """TransformerEngine 1930: here nothing of another document reaches a token."""
    sizes = Sizes(2, 16, 16, 4, 4, 5, 5)
    # Documents that start and end on the borders of 4 shards, inside them, and one of one token.
    ids = np.array([[0] * 4 + [1] * 4 + [2] * 8, [0] * 3 + [1] + [2] * 9 + [3] * 3], np.int32)
    got = assert_right(sizes, 4, {"segment_ids": ids, "is_causal": True})
    inputs = operands(sizes)
    for b in range(2):
        for document in range(ids.max() + 1):
            own = ids[b] == document
            if own.any():
                parts = [x[b : b + 1, own] for x in inputs]
                alone = run_torch({"is_causal": True}, "dense", parts)["out"]
                assert error(got["out"][b : b + 1, own], alone) <= 16 * EPS * 3


def test_packing_loses_no_tokens():
    """TransformerEngine 3331: every token of every document is in the output, in its place."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(1, 16, 16, 4, 4, 5, 5)))
    each_alone = jnp.arange(16, dtype=jnp.int32)[None]
    out = jax.jit(sharded(4))(q, k, v, mask=Mask(segment_ids=each_alone))
    assert compare_bits(out, v).equal, "a document of one token gives its own value"


def test_the_window_silently_becomes_full_attention():
    """accelerate 4177."""
    sizes = Sizes(2, 16, 16, 4, 4, 5, 5)
    got = assert_right(sizes, 4, {"is_causal": True, "local_window_size": (3, 0)})
    full = run_torch({"is_causal": True}, "blockwise", operands(sizes))
    assert differs(got["out"], full["out"])
    with pytest.raises(ValueError, match=r"does not name the parameter 'local_window_size'"):
        sharded(4, kernel=lambda query, key, value: query)(
            *map(jnp.asarray, operands(sizes)[:3]), local_window_size=3
        )


def test_sinks_are_dropped():
    """prime-rl 3397: and each device must have those of its own heads."""
    sizes = Sizes(2, 16, 16, 8, 4, 5, 5)
    sinks = np.linspace(-2, 3, 8, dtype=np.float32)
    got = assert_right(sizes, 4, {"is_causal": True, "sinks": sinks})
    without = run_torch({"is_causal": True}, "blockwise", operands(sizes))
    assert differs(got["out"], without["out"])
    assert np.asarray(got["sinks"]).all(), "every head has a gradient"


@pytest.mark.parametrize(
    "given",
    (
        {"mask": rng.random((2, 8, 16, 16)) < 0.7},
        {"mask": rng.random((2, 1, 1, 16)) < 0.7},
        {"bias": rng.standard_normal((1, 8, 16, 16)).astype(np.float32)},
        {"alibi_slopes": (0.5 ** np.arange(8)).astype(np.float32), "is_causal": True},
    ),
    ids=lambda given: " ".join(given),
)
def test_no_mask_or_alibi(given):
    """xDiT 503: masks, biases and slopes of each head, sliced to the heads of a device."""
    sizes = Sizes(2, 16, 16, 8, 4, 5, 5)
    got = assert_right(sizes, 4, given)
    plain = {name: x for name, x in given.items() if name == "is_causal"}
    assert differs(got["out"], run_torch(plain, "blockwise", operands(sizes))["out"])


def test_no_dropout():
    """ring-flash-attention 36: the same weights dropped at every degree, and a right gradient."""
    sizes = Sizes(2, 16, 16, 8, 4, 5, 5)
    given = {"dropout_rate": 0.5, "dropout_rng": np.array([1, 2], np.uint32), "is_causal": True}
    outs = [assert_right(sizes, degree, given, None) for degree in (1, 4, 8)]
    assert all(compare_bits(x["out"], outs[0]["out"]).equal for x in outs)
    q, k, v, _ = map(jnp.asarray, operands(sizes))
    rngs = [jax.random.key(i) for i in (0, 1)]
    attend = jax.jit(lambda q, k, v, rng: sharded(4)(q, k, v, dropout=Dropout(0.5, rng)))
    one, other = (attend(q, k, v, rng) for rng in rngs)
    assert differs(one, other)


def test_each_device_drops_the_same_weights():
    """Bits of one generator reused on every device make heads drop alike; of ours, none do."""
    N, S = 8, 64
    v = jnp.broadcast_to(jnp.eye(S)[None, :, None], (1, S, N, S))
    q = jnp.zeros((1, S, N, 1))
    weights = sharded(8)(q, q, v, dropout=Dropout(rate=0.5, rng=jax.random.key(0)))
    kept = np.asarray(weights != 0)[0].swapaxes(0, 1).reshape(N, -1)
    agree = (kept[:, None] == kept[None]).mean(-1)
    # 4096 independent bits of each head: 6 standard deviations of their agreement.
    assert (abs(agree - 0.5) < 6 * 0.5 / 64)[~np.eye(N, dtype=bool)].all()
    assert abs(kept.mean() - 0.5) < 6 * 0.5 / np.sqrt(N * S * S)


def test_the_error_grows_with_the_number_of_devices():
    """ring-flash-attention 42: here a head's bits are the same at every degree."""
    inputs = operands(Sizes(2, 32, 32, 8, 8, 5, 5))
    runs = [run_jax(sharded(d), {"is_causal": True}, "blockwise", inputs) for d in (1, 4, 8)]
    assert all(compare_bits(x, runs[0]).equal for x in runs)


def test_how_to_use_it_outside_one_trainer():
    """DeepSpeed 6708, 7695: a function of arrays, inside a shard_map of one's own."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 16, 16, 8, 4, 5, 5)))
    spec = PartitionSpec(None, "seq")
    own = jax.shard_map(
        partial(dot_product_attention, kernel=blockwise_attention, is_causal=True),
        mesh=ONE_AXIS[4].mesh(),
        in_specs=spec,
        out_specs=spec,
    )
    expected = dense_attention(q, k, v, is_causal=True)
    assert error(jax.jit(own)(q, k, v), np.asarray(expected, np.float64)) <= 16 * EPS


@pytest.mark.parametrize(
    "kernel", (blockwise_attention, exact_attention), ids=lambda f: type(f).__name__
)
def test_padding_is_attended_to(kernel):
    """MaxDiffusion pads the keys to the degree, and then attends to them."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(2, 13, 13, 4, 4, 5, 5)))
    padded = pad_to_degree(q, k, v, degree=4)
    filled = padded.value.at[:, 13:].set(1e3)
    out = sharded(4, kernel=kernel)(padded.query, padded.key, filled, **padded.keywords)
    alone = jax.jit(kernel)(q, k, v)
    assert error(padded.unpad(out), np.asarray(alone, np.float64)) <= 16 * EPS


def test_dropout_in_a_shard_map_of_ones_own():
    """The keys of heads are of the whole attention, on every shard of the batch, too."""
    q, k, v, _ = map(jnp.asarray, operands(Sizes(4, 16, 16, 6, 3, 5, 5)))
    rng = jax.random.key(5)
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = PartitionSpec("data", "seq")

    def layer(q, k, v, keys):
        dropout = Dropout(0.5, keys)
        return dot_product_attention(q, k, v, kernel=blockwise_attention, dropout=dropout)

    own = jax.shard_map(
        layer, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec("data")), out_specs=spec
    )
    out = jax.jit(own)(q, k, v, head_keys(rng, 4, 6))
    expected = jax.jit(partial(blockwise_attention, dropout=Dropout(0.5, rng)))(q, k, v)
    assert compare_bits(out, expected).equal
