"""The platforms' own kernels: right values in interpret mode, refusals, choice, the schedule."""

import tracemalloc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS
from features import run_jax, run_torch
from flat_names import keywords_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from questions import QUICK, error

from jax_seqpar import (
    Blockwise,
    Dropout,
    Fused,
    Triton,
    dense_attention,
    dot_product_attention,
)
from jax_seqpar.kernels import choose_kernel, cudnn
from jax_seqpar.kernels.splash import SCHEDULE_BYTES, Blocks, choose_blocks, schedule
from jax_seqpar.mask import Mask
from jax_seqpar.mask.keywords import FLAT_NAMES
from torch_ref.masks import attends

pytestmark = pytest.mark.usefixtures("less_optimised")

interpreted = Fused(interpret=True)


def operands(
    T: int = 128, S: int = 128, N: int = 2, K: int = 1, H: int = 64, V: int = 64, dtype: Any = "f4"
) -> list[Any]:
    rng = np.random.default_rng(T + S)
    shapes = ((2, T, N, H), (2, S, K, H), (2, S, K, V), (2, T, N, V))
    return [rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes]


def documents(tokens: int, *starts: int) -> np.ndarray:
    """Two sequences of documents; the second is one alone."""
    first = np.searchsorted(starts, np.arange(tokens), side="right")
    return np.stack([first, np.full(tokens, 1)]).astype(np.int32)


SINKS = np.array([0.7, -1.5], np.float32)
# Sizes of the operands, and options. Tokens that are no multiple of a block, and rows without keys.
LEAST = np.int32(-(2**31))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (dict(T=200, S=150, N=4, K=2), {}),
    "bfloat16, sinks": (dict(H=128, dtype="bfloat16"), {"is_causal": True, "sinks": SINKS}),
    "causal from the end": (
        dict(T=100, S=300, H=24, V=40),
        {"is_causal": True, "query_offset": 200},
    ),
    "causal from before the keys": (
        dict(T=300, S=100),
        # One of a head without a sink, in whose first rows nothing has a weight.
        {"is_causal": True, "query_offset": -150, "sinks": np.array([-np.inf, 0.7], np.float32)},
    ),
    "window in several blocks": (
        dict(T=2100, S=1500, H=16, V=8),
        {"local_window_size": (100, 50), "query_offset": -400, "sinks": SINKS},
    ),
    "segments": (
        dict(T=200, S=200),
        {"segment_ids": documents(200, 50, 128, 170), "logits_soft_cap": 2.0, "is_causal": True},
    ),
    "two segmentations": (
        dict(T=100, S=250),
        {"segment_ids": (documents(100, 30, 60), documents(250, 90)), "sinks": SINKS},
    ),
    "lengths": (
        dict(T=150, S=200),
        {
            "query_seq_lengths": np.array([150, 70], np.int32),
            "key_value_seq_lengths": np.array([0, 90], np.int32),
            # Any number of 32 bits may be the number of a document.
            "segment_ids": (documents(150, 60) + LEAST, documents(200, 70) + LEAST),
        },
    ),
    "length of keys alone": (
        dict(T=128, S=256),
        {"key_value_seq_lengths": np.array([130, 0], np.int32), "scale": 0.3},
    ),
}


WITHOUT_KEYS = {
    "causal from before the keys",
    "window in several blocks",
    "two segmentations",
    "lengths",
    "length of keys alone",
}
FLOAT32 = float(np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_splash_is_right(name):
    """Output and gradients are as near to float64 as those of the dense kernel; 0 without a key.

    The bound is twice the largest error of that, and two units in the last place of the largest
    entry: the scaled query is rounded once more than there, and so is its gradient; and four units
    of float32 of the largest number that is added up, in another order than there. The gradient of
    a sink is a sum over T V products of the output's dtype, whose roundings add up like a walk.
    """
    sizes, options = CASES[name]
    inputs = operands(**sizes)
    got = run_jax(interpreted, options, "splash", inputs, QUICK)
    alone = run_jax(dense_attention, options, "dense", inputs, QUICK)
    truth = run_torch(options, "splash", inputs)
    eps = float(jnp.finfo(inputs[0].dtype).eps)
    added_up = max(float(np.max(np.abs(x))) for x in inputs)
    assert got.keys() == truth.keys()
    for tensor, expected in truth.items():
        unit = eps * np.max(np.abs(expected))
        if tensor == "sinks":
            products = np.abs(truth["out"] * inputs[3].astype(np.float64))
            unit = eps * np.sqrt(np.sum(products**2))
        bound = 2 * error(alone[tensor], expected) + 2 * unit + 4 * FLOAT32 * added_up
        assert error(got[tensor], expected) <= bound, f"{tensor}, {bound:.3g}"
    without = ~np.asarray(truth["out"]).any((2, 3))
    assert without.any() == (name in WITHOUT_KEYS)
    assert not np.asarray(got["out"])[without].any()
    assert not np.asarray(got["dq"])[without].any()


def test_sharded_splash_has_the_bits_of_one_device(unchecked_shapes):
    inputs = operands(N=4, K=4)[:3]
    options: dict[str, Any] = {"is_causal": True, "sinks": jnp.arange(4, dtype=jnp.float32)}
    sharded = partial(
        dot_product_attention,
        kernel=interpreted,
        layout=ONE_AXIS[4].on(),
        **keywords_of(**options),
    )
    out = jax.jit(sharded)(*inputs)
    alone = partial(interpreted, **keywords_of(**options))
    assert np.array_equal(out, jax.jit(alone)(*inputs))
    heads = PartitionSpec(None, None, "seq")
    own = partial(jax.shard_map, mesh=ONE_AXIS[4].mesh(), in_specs=heads, out_specs=heads)
    with pytest.raises(ValueError, match="Write check_vma=False"):
        own(partial(interpreted, is_causal=True))(*inputs)


# What each platform's kernel is asked for that it lacks: sizes, options, and a word of the refusal.
MASKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "bias": ({}, {"bias": np.zeros((1, 1, 128, 128), np.float32)}, "bias is not"),
    "mask": ({}, {"mask": np.ones((1, 1, 128, 128), bool)}, "mask is not"),
    "positions": ({}, {"positions": np.zeros((2, 128), np.int32)}, "positions is not"),
    "ALiBi": ({}, {"alibi_slopes": np.zeros(2, np.float32)}, "alibi_slopes is not"),
    "dropout": (
        {},
        {"dropout_rate": 0.5, "dropout_rng": np.array([1, 2], np.uint32)},
        "dropout_rate is not",
    ),
}
LACKS = {
    "tpu": {
        **MASKS,
        "float16": (dict(dtype="float16"), {}, "dtype float16"),
        "H": (dict(H=1100), {}, "H = 1100"),
        "V": (dict(V=1025, H=1024), {}, "V = 1025"),
        "float32 of 1024": (dict(V=640, H=640), {}, "H = 640 and V = 640 of float32"),
        "segments of 64 bits": (
            {},
            {"segment_ids": np.zeros((2, 128), np.int64)},
            "segment_ids of 64 bits",
        ),
    },
    "gpu": {
        **{n: (dict(dtype="bfloat16"), options, word) for n, (_, options, word) in MASKS.items()},
        "float32": ({}, {}, "dtype float32"),
        "segments": (
            dict(dtype="bfloat16"),
            {"segment_ids": np.zeros((2, 128), np.int32)},
            "segment_ids is not",
        ),
        "soft cap": (dict(dtype="bfloat16"), {"logits_soft_cap": 3.0}, "logits_soft_cap is not"),
        "sinks": (dict(dtype="bfloat16"), {"sinks": SINKS}, "sinks is not"),
        "offset": (
            dict(dtype="bfloat16"),
            {"query_offset": 3, "is_causal": True},
            "query_offset is not",
        ),
        "V": (dict(dtype="float16", V=32), {}, "H = 64 and V = 32"),
        "H": (dict(dtype="float16", H=20, V=20), {}, "multiples of 8"),
        "H above 256": (dict(dtype="float16", H=264, V=264), {}, "256 here"),
        "window on both sides": (
            dict(dtype="bfloat16"),
            {"local_window_size": (5, 1)},
            r"windows of keys up to the query only",
        ),
        "window of fewer queries": (
            dict(dtype="bfloat16", T=64),
            {"local_window_size": (5, 0)},
            "T = 64 queries of S = 128",
        ),
        "window and lengths": (
            dict(dtype="bfloat16"),
            {"local_window_size": (5, 0), "key_value_seq_lengths": np.array([3, 4], np.int32)},
            "together with key_value_seq_lengths",
        ),
    },
    "cpu": {"anything": ({}, {}, "cpu has no fused kernel")},
}
TABLE = [(platform, *row) for platform, rows in LACKS.items() for row in rows.values()]
NAMES = [f"{platform}: {name}" for platform, rows in LACKS.items() for name in rows]


@pytest.fixture
def hopper(monkeypatch):
    """Pretends that JAX sees one NVIDIA GPU of compute capability 9.0."""
    monkeypatch.setattr(cudnn, "compute_capability", lambda: (9, 0))


@pytest.mark.parametrize(("platform", "sizes", "options", "word"), TABLE, ids=NAMES)
def test_what_a_kernel_lacks_is_refused_and_another_chosen(
    platform, sizes, options: Any, word, hopper, unchecked_shapes
):
    query, key, value, _ = map(jnp.asarray, operands(**sizes))
    with jax.enable_x64(True):
        options = {
            n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()
        }
    with pytest.raises(ValueError, match=word) as refusal:
        Fused(platform=platform)(query, key, value, **keywords_of(**options))
    assert "Write kernel=jax_seqpar.Blockwise()" in str(refusal.value)
    choice = choose_kernel(query, key, value, platform=platform, **keywords_of(**options))
    if platform == "gpu" and not options.keys() & {"bias", "mask"} and query.shape[3] <= 256:
        assert (choice.kernel, choice.name) == (Triton(platform="gpu"), "triton")
        reason, _, other = choice.reason.partition("; Triton")
        assert other == " supports all that is asked"
    else:
        on_gpu = platform == "gpu"  # where none of these leaves blocks out
        assert choice.kernel == (Blockwise(1024, 1024) if on_gpu else Blockwise())
        assert choice.name == "blockwise"
        reason = choice.reason
    assert reason in str(refusal.value)


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_every_keyword_is_supported_or_refused(platform, hopper):
    """Every keyword is in the tables of unsupported ones above, or of supported ones."""
    supported = {"scale", "is_causal", "query_seq_lengths", "key_value_seq_lengths"}
    supported |= {"local_window_size", "dropout_rng"}  # a key alone drops nothing
    if platform == "tpu":
        supported |= {"query_offset", "segment_ids", "logits_soft_cap", "sinks"}
    lacking = {name for _, options, _ in LACKS[platform].values() for name in options}
    assert supported | lacking >= {*FLAT_NAMES}


SUPPORTED: dict[str, dict[str, Any]] = {
    "tpu": {
        "scale": 0.2,
        "is_causal": True,
        "query_offset": 5,
        "local_window_size": (3, 1),
        "logits_soft_cap": 2.0,
        "sinks": jax.ShapeDtypeStruct((2,), jnp.float32),
        "segment_ids": jax.ShapeDtypeStruct((2, 128), jnp.int32),
        "query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    },
    "gpu": {
        "is_causal": True,
        "scale": 0.2,
        "query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    },
}


@pytest.mark.parametrize(("platform", "name"), (("tpu", "splash"), ("gpu", "cuDNN")))
def test_the_fused_kernel_is_chosen_where_it_can_do_all(platform, name, hopper):
    shapes = [jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)] * 3
    choice: Any = choose_kernel(*shapes, platform=platform, **keywords_of(**SUPPORTED[platform]))
    assert choice.name == name
    assert choice.reason == f"{platform}: {name} supports all that is asked"
    assert choice.kernel == Fused(platform)


def test_choices_without_a_fused_kernel(monkeypatch):
    inputs = operands(dtype="bfloat16")[:3]
    choice = choose_kernel(*inputs, is_causal=True, platform="cpu")
    assert choice.reason == "cpu has no fused kernel"
    assert jax.jit(partial(choice.kernel, is_causal=True))(*inputs).shape == (2, 128, 2, 64)
    monkeypatch.setattr(cudnn, "compute_capability", lambda: None)
    assert "JAX sees none" in choose_kernel(*inputs, platform="gpu").reason


@pytest.mark.parametrize(("capability", "most"), (((8, 0), 128), ((8, 9), 128), ((9, 0), 256)))
def test_head_dimensions_of_cudnn(monkeypatch, capability, most):
    """The largest that `jax.nn` hands to cuDNN, and the next multiple of 8."""
    monkeypatch.setattr(cudnn, "compute_capability", lambda: capability)
    inputs = operands(H=most, V=most, dtype="float16")[:3]
    assert choose_kernel(*inputs, platform="gpu").name == "cuDNN"
    inputs = operands(H=most + 8, V=most + 8, dtype="float16")[:3]
    assert f"which has {most} here" in choose_kernel(*inputs, platform="gpu").reason


def test_a_choice_is_made_of_shapes_alone():
    shapes = [jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)] * 3
    keys = (jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((2,), jnp.uint32))
    for key in keys:
        choice = choose_kernel(*shapes, platform="tpu", dropout=Dropout(rate=0.1, rng=key))
        assert (
            choice.reason == "tpu: dropout_rate is not supported by splash: its kernel drops none"
        )
    wrong = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="rng must be one key"):
        choose_kernel(*shapes, dropout=Dropout(rate=0.1, rng=wrong))


def test_choices_that_do_not_fit(unchecked_shapes):
    inputs = operands()[:3]
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        choose_kernel(*inputs, causal=True)
    with pytest.raises(ValueError, match="bias must have 4 axes"):
        choose_kernel(*inputs, bias=np.zeros((128, 128), np.float32))
    with pytest.raises(ValueError, match=r"platform must be one of .*got 'cuda'"):
        choose_kernel(*inputs, platform="cuda")
    with pytest.raises(ValueError, match=r"platform must be one of .*got 'cuda'"):
        Fused(platform="cuda")
    with pytest.raises(ValueError, match="interpret=True runs the TPU's kernel"):
        Fused(platform="gpu", interpret=True)


CUDNN_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (dict(N=4, K=2), {}),
    "causal, fewer queries": (dict(T=100, S=150), {"is_causal": True, "scale": 0.3}),
    "window": ({}, {"local_window_size": (20, 0)}),
    "causal window": ({}, {"local_window_size": (1 << 40, 9), "is_causal": True}),
    "lengths": (
        dict(T=128, S=160),
        {
            "query_seq_lengths": np.array([100, 0], np.int8),
            "key_value_seq_lengths": np.array([0, 90], np.int32),
        },
    ),
    "lengths, causal": (
        dict(T=128, S=96),
        {"key_value_seq_lengths": np.array([1 << 20, 50], np.int32), "is_causal": True},
    ),
}


def assert_right_on_gpu(sizes, options, dtype):
    """The bound: three roundings of 16 bits, of weights, of their gradient and of the result, whose
    sums are not above the largest entry by more than a factor of 4."""
    inputs = operands(**sizes, dtype=dtype)
    got = run_jax(Fused(platform="gpu"), options, "cuDNN", inputs)
    for name, expected in run_torch(options, "cuDNN", inputs).items():
        bound = 12 * float(jnp.finfo(dtype).eps) * np.max(np.abs(expected))
        assert error(got[name], expected) <= bound, f"{name}: {error(got[name], expected)} {bound}"


@pytest.mark.parametrize(("sizes", "options"), CUDNN_CASES.values(), ids=CUDNN_CASES)
def test_what_cudnn_is_asked_for(sizes, options, hopper, monkeypatch):
    """The call that is made of it, which `jax.nn` answers by its own kernel of the same meaning.

    What cuDNN makes of a length of 0, or beyond the keys, is not documented: it gets neither.
    Windows it has with causality alone.
    """
    attend, lengths = jax.nn.dot_product_attention, []

    def by_xla(*args: Any, implementation: str, **keywords: Any) -> Any:
        assert implementation == "cudnn"
        assert keywords["is_causal"] or keywords["local_window_size"] is None
        if keywords["key_value_seq_lengths"] is not None:
            jax.debug.callback(lengths.append, keywords["key_value_seq_lengths"])
        return attend(*args, implementation="xla", **keywords)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    with jax.numpy_dtype_promotion("standard"):  # which that kernel relies on
        assert_right_on_gpu(sizes, options, "bfloat16")
    jax.effects_barrier()
    assert bool(lengths) == ("key_value_seq_lengths" in options)
    assert all(np.all((x >= 1) & (x <= sizes["S"])) for x in lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize(("sizes", "options"), CUDNN_CASES.values(), ids=CUDNN_CASES)
def test_cudnn_is_right(sizes, options, dtype):
    with jax.default_device(jax.local_devices(backend="cuda")[0]):
        assert_right_on_gpu(sizes, options, dtype)


numbers = st.integers(0, 40)


@settings(max_examples=200)
@given(
    tokens=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.none() | st.tuples(numbers, numbers),
    is_causal=st.booleans(),
    offset=st.integers(-80, 80),
    side=st.integers(0, 1),
)
@example((60, 60), (7, 9), (0, 0), False, 80, 1)
def test_the_schedule_is_that_of_the_mask(tokens, sizes, window, is_causal, offset, side):
    """A block meets those with which it has a pair that attends, each once, and no others."""
    T, S = tokens
    band = Mask(is_causal=is_causal, query_offset=offset, local_window_size=window)
    found = schedule(band, Blocks(sizes[0], sizes[1], sizes[1]), T, S, side)
    mask = attends(T, S, is_causal=is_causal, query_offset=offset, local_window_size=window)
    if found is None:
        assert mask is None
        return
    assert mask is not None
    grid = np.zeros((-(-T // sizes[0]), -(-S // sizes[1])), bool)
    for t, s in np.argwhere(mask.numpy().reshape(T, S)):
        grid[t // sizes[0], s // sizes[1]] = True
    expected = grid.T if side else grid
    assert found.partner.min() >= 0
    assert found.partner.max() < expected.shape[1]
    assert len(found.partner) == len(expected)
    for row, partner, meets in zip(expected, found.partner, found.meets, strict=True):
        assert partner[meets == 1].tolist() == np.flatnonzero(row).tolist()


@pytest.mark.parametrize("tokens", (1 << 20, 1_000_000))
@pytest.mark.parametrize("window", (None, (4095, 0)), ids=("causal", "window"))
def test_a_million_tokens_lower_without_a_mask(tokens, window):
    """The host makes the schedule alone, not the S x S mask of a terabyte."""
    mask = Mask(is_causal=True, local_window_size=window)
    wide, _ = choose_blocks(mask, tokens, tokens)
    for side in (0, 1):
        found = schedule(mask, wide, tokens, tokens, side)
        assert found is not None
        assert found.nbytes <= SCHEDULE_BYTES
    attend = partial(Fused(platform="tpu"), is_causal=True, local_window_size=window)
    query = jax.ShapeDtypeStruct((1, tokens, 2, 128), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, tokens, 1, 128), jnp.bfloat16)

    def gradients(query: Any, key: Any, value: Any, grad: Any) -> Any:
        return jax.vjp(attend, query, key, value)[1](grad)

    tracemalloc.start()
    lowered = jax.jit(gradients).trace(query, key, key, query)
    program = lowered.lower(lowering_platforms=("tpu",)).as_text()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert program.count("tpu_custom_call") == 3
    # Three schedules, their positions `[T]`, and what tracing takes.
    assert most <= 3 * SCHEDULE_BYTES + 4 * tokens + (64 << 20)
    assert len(program) <= 8 * SCHEDULE_BYTES + (1 << 20)


@pytest.mark.parametrize("size", ((0, 128), (128, 0)))
def test_nothing_to_attend(size):
    query, key, value, _ = map(jnp.asarray, operands(T=size[0], S=size[1]))
    out = interpreted(query, key, value)
    assert out.shape == query.shape
    assert not np.asarray(out).any()
