"""The attention layer of decoders: against a layer written out in float64."""

from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import torch
from cases import KINDS
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jax_seqpar import Logits, Mask, MeshLayout, Ulysses, Zigzag, dense_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.flax import Attention, ParameterOptions, Projection, Rotary, SequenceParallel
from jax_seqpar.plan import collectives
from torch_ref.dense import dense_attention as torch_dense_attention

pytestmark = pytest.mark.usefixtures("less_optimised")

B, S, D, N, K, H = 2, 24, 20, 8, 2, 6
EPS = np.finfo(np.float32).eps
LAYOUT = MeshLayout(batch="data")
rng = np.random.default_rng(4)
X = rng.standard_normal((B, S, D)).astype(np.float32)
INDEX: Any = np.zeros((1, 1), np.int32)
SEGMENTS = np.repeat([[1, 2, 3], [1, 1, 2]], 8, axis=1).astype(np.int32)
POSITIONS = np.stack([np.r_[0:8, 0:8, 0:8], np.r_[0:16, 0:8]]).astype(np.int32)
FEATURES = {
    "plain": {},
    "everything": {
        "qk_norm": 0.3,
        "sinks": True,
        "mask": Mask(is_causal=True, local_window_size=(5, 0)),
        "logits": Logits(scale=0.3, soft_cap=3.0),
        "use_bias": True,
    },
    "all biases but the key's": {"use_bias": ("query", "value", "out")},
    "bidirectional, interleaved, half of the channels": {
        "mask": Mask(),
        "rotary": Rotary(theta=100.0, interleaved=True, fraction=0.67),
    },
    "no rotary": {"rotary": None, "num_kv_heads": None},
}


def make(
    kind=KINDS[0], sharding=None, shape=(2, 4), parameters=ParameterOptions(), **options: Any
) -> tuple[Any, Any]:
    """A layer whose parameters are random, none of them 0 or 1, and its mesh."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("data", "seq"), axis_types=(kind,) * 2, devices=devices)
    options = {"num_heads": N, "num_kv_heads": K, "head_dim": H} | options
    with jax.set_mesh(mesh):
        parameters = replace(parameters, sharding=sharding)
        layer = Attention(D, **options, layout=LAYOUT, parameters=parameters, rngs=nnx.Rngs(0))
        numbers = np.random.default_rng(0)
        for path, x in sorted(nnx.to_flat_state(nnx.state(layer, nnx.Param)), key=str):
            random = numbers.standard_normal(x.shape).astype(np.float32) / np.sqrt(x.shape[0])
            x[...] = jax.device_put(jnp.asarray(random, x.dtype), x[...].sharding)
            assert path
    return layer, mesh


def rotate(x, rotary, positions):
    """Rotary embedding by complex numbers, in float64."""
    R = int(rotary.fraction * x.shape[-1])
    turn = positions[..., None] * rotary.theta ** (-np.arange(0, R, 2) / R)
    pairs = (
        (slice(0, R, 2), slice(1, R, 2))
        if rotary.interleaved
        else (slice(0, R // 2), slice(R // 2, R))
    )
    z = (x[..., pairs[0]] + 1j * x[..., pairs[1]]) * np.exp(1j * turn)[:, :, None]
    out = x.copy()
    out[..., pairs[0]], out[..., pairs[1]] = z.real, z.imag
    return out


def truth(layer, options, segment_ids=None, positions=None):
    wide = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    x = X.astype(np.float64)
    q, k, v = (
        np.einsum("bsd,dnh->bsnh", x, wide(p.kernel)) for p in (layer.query, layer.key, layer.value)
    )
    biased = options.get("use_bias") or ()
    biased = ("query", "key", "value", "out") if biased is True else biased
    q = q + wide(layer.query.bias) if "query" in biased else q
    k = k + wide(layer.key.bias) if "key" in biased else k
    v = v + wide(layer.value.bias) if "value" in biased else v
    if options.get("qk_norm"):
        q, k = (
            y / np.sqrt((y**2).mean(-1, keepdims=True) + options["qk_norm"]) * wide(scale)
            for y, scale in ((q, layer.query_scale), (k, layer.key_scale))
        )
    rotary = options.get("rotary", Rotary())
    if rotary is not None:
        at = np.broadcast_to(np.arange(S), (B, S)) if positions is None else positions
        q, k = rotate(q, rotary, at), rotate(k, rotary, at)
    mask, logits = options.get("mask", Mask(is_causal=True)), options.get("logits", Logits())
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(y, jnp.float64) for y in (q, k, v))
        if options.get("sinks"):
            logits = replace(logits, sinks=jnp.asarray(wide(layer.sinks)))
        if segment_ids is not None:
            mask = replace(mask, segment_ids=jnp.asarray(segment_ids))
        out = np.asarray(dense_attention(q, k, v, mask=mask, logits=logits))
    y = np.einsum("bsnh,nhd->bsd", out, wide(layer.out.kernel))
    return y + wide(layer.out.bias) if "out" in biased else y


def assert_close(got, expected, roundings=16):
    got = np.asarray(got, np.float64)
    assert np.abs(got - expected).max() <= roundings * EPS * np.abs(expected).max()


def run(layer, mesh, x=X, **arguments):
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, PartitionSpec("data", "seq"))
        return nnx.jit(lambda layer, x, a: layer(x, **a))(layer, sharded, arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", FEATURES)
def test_output(features, kind):
    layer, mesh = make(kind, **FEATURES[features])
    assert_close(run(layer, mesh), truth(layer, FEATURES[features]))
    if features in ("plain", "everything"):
        got = run(layer, mesh, segment_ids=SEGMENTS, positions=POSITIONS)
        assert_close(got, truth(layer, FEATURES[features], SEGMENTS, POSITIONS))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_one_device(kind):
    """Gradients of every parameter equal those of one device, sharding included."""
    options: Any = {**FEATURES["everything"], "kernel": dense_attention}
    grads = []
    for shape, sharding in (((1, 1), None), ((2, 4), None), ((2, 4), {"D": "data"})):
        layer, mesh = make(kind, sharding, shape, **options)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(X, PartitionSpec("data", "seq"))
            loss = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum()))
            grads.append(nnx.to_flat_state(loss(layer, sharded)))
    for other in grads[1:]:
        for (path, a), (_, b) in zip(grads[0], other, strict=True):
            a, b = np.asarray(a[...], np.float64), np.asarray(b[...], np.float64)
            # A sum of B S terms in another order.
            assert np.abs(a - b).max() <= B * S * EPS * np.abs(a).max(), path


@pytest.mark.parametrize("features", ("plain", "everything", "bidirectional"))
@pytest.mark.parametrize("kind", KINDS)
def test_decoding(features, kind):
    """A prompt of 8 tokens at once, then token by token: what the whole sequence gives."""
    options: Any = {"bidirectional": {"mask": Mask()}}.get(features) or FEATURES.get(features, {})
    layer, mesh = make(kind, **options)
    with jax.set_mesh(mesh):
        layer.init_cache(B, 12)
        step = nnx.jit(lambda layer, x: layer(x, decode=True))
        parts = [X[:, :8], *(X[:, i : i + 1] for i in range(8, 12))]
        got = np.concatenate([np.asarray(step(layer, part)) for part in parts], axis=1)
        assert np.isnan(step(layer, X[:, :1])).all(), "the cache was full"
        with pytest.raises(ValueError, match="1 tokens after 13 do not fit the cache of 12"):
            layer(jnp.asarray(X[:, :1]), decode=True)
    if features == "bidirectional":
        # Each token sees all the tokens of its own call, and of the calls before.
        end = np.maximum(np.arange(S) + 1, 8)
        options = options | {"mask": np.arange(S)[None, None, None] < end[:, None]}
    assert_close(got, truth(layer, options)[:, :12])


@pytest.mark.usefixtures("optimised")
def test_the_cache_is_shared_by_heads():
    """The cache is sharded by heads, and a step sends no keys or values but the new ones."""
    layer, mesh = make(num_kv_heads=4)
    with jax.set_mesh(mesh):
        layer.init_cache(B, 512)
        key = layer.cache.get_value().tokens.slots.key
        assert key.sharding.shard_shape((B, 512, 4, H)) == (1, 512, 1, H)
        graph, state = nnx.split(layer)

        def step(state, x):
            layer = nnx.merge(graph, state)
            return layer(x, decode=True), nnx.state(layer)

        program = jax.jit(step).lower(state, jnp.asarray(X[:, :1])).compile().as_text() or ""
    assert not {"all-to-all", "collective-permute"} & set(collectives(program))
    assert f"{B // 2},512,4,{H}]" not in program


PASSED_ON: dict[str, Any] = {
    "kernel": dense_attention,
    "strategy": Ulysses(2, overlap=False),
}


@pytest.mark.parametrize("where", ("attention", "attention_fn"))
def test_options_are_passed_on(where, monkeypatch):
    """Options are passed on, those without effect on values included: chunks and JAX's checks."""
    given = {}

    def attend(query, key, value, **options):
        given.update(options)
        return jnp.zeros_like(query)

    monkeypatch.setattr(f"jax_seqpar.flax.{where}.dot_product_attention", attend)
    layout = MeshLayout(mesh=jax.make_mesh((4,), ("seq",)))
    options: dict[str, Any] = PASSED_ON | {"layout": layout}
    if where == "attention":
        options |= {"mask": Mask(is_causal=True, local_window_size=(5, 0))}
        options |= {"logits": Logits(scale=0.3, soft_cap=3.0)}
        Attention(D, num_heads=N, head_dim=H, **options, rngs=nnx.Rngs(0))(jnp.asarray(X))
    else:
        rules = {"is_causal": True, "local_window_size": (5, 0)}
        SequenceParallel(**options, **rules, logits_soft_cap=3.0)(*jnp.ones((3, B, S, N, H)))
        options |= rules | {"logits": Logits(soft_cap=3.0)}
    assert {name: given[name] for name in options} == options


def test_parameters_have_names():
    """Parameters are named by the einsums' letters without a mesh; rules give them shardings."""
    layer = Attention(
        D, num_heads=N, num_kv_heads=K, head_dim=H, qk_norm=1e-6, sinks=True, rngs=nnx.Rngs(0)
    )
    names = {
        "/".join(map(str, path)): x.get_metadata("out_sharding")
        for path, x in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    assert names == {
        "query/kernel": ("D", "N", "H"),
        "key/kernel": ("D", "K", "H"),
        "value/kernel": ("D", "K", "H"),
        "out/kernel": ("N", "H", "D"),
        "query_scale": ("H",),
        "key_scale": ("H",),
        "sinks": ("N",),
    }
    rules = (("D", "data"), ("N", None), ("K", None), ("H", None))
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"))), nnx.logical_axis_rules(rules):
        layer = Attention(
            D, num_heads=N, num_kv_heads=K, head_dim=H, layout=LAYOUT, rngs=nnx.Rngs(0)
        )
        assert jax.typeof(layer.query.kernel[...]).sharding.spec == PartitionSpec(
            "data", None, None
        )
        assert jax.typeof(layer.out.kernel[...]).sharding.spec == PartitionSpec(None, None, "data")
    given, _ = make(sharding={"D": "data"})
    assert given.out.kernel[...].sharding.shard_shape((N, H, D)) == (N, H, D // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_that_is_given(kind):
    """A mesh that is given without `jax.set_mesh` holds, uses and gathers the parameters."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    options: Any = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "layout": LAYOUT.on(mesh)}
    parameters = ParameterOptions(sharding={"D": "data"})
    layer = Attention(D, **options, parameters=parameters, rngs=nnx.Rngs(0))
    assert layer.query.kernel[...].sharding.shard_shape((D, N, H)) == (D // 2, N, H)
    x = jax.device_put(X, NamedSharding(mesh, LAYOUT.token_spec))
    assert_close(nnx.jit(lambda layer, x: layer(x))(layer, x), truth(layer, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_positions_follow_the_order_of_the_tokens(kind):
    """Positions of a zigzag order are right, whether they are given or not."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    layout = replace(LAYOUT.on(mesh), order=Zigzag())
    options: Any = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "layout": layout}
    layer = Attention(D, **options, rngs=nnx.Rngs(0))
    x = jax.device_put(layout.order.reorder(X, 1, 4), NamedSharding(mesh, LAYOUT.token_spec))
    numbers = jnp.asarray(layout.order.permutation(S, 4), jnp.int32)[None]
    for positions in (None, numbers):
        out = nnx.jit(lambda layer, x, positions=positions: layer(x, positions=positions))(layer, x)
        out = layout.order.restore(np.asarray(out), 1, 4)
        assert_close(out, truth(layer, {}))


def test_dropout():
    layer, mesh = make(dropout_rate=0.5, kernel=dense_attention)
    drop = nnx.jit(lambda layer, x, rngs: layer(x, deterministic=False, rngs=rngs))
    with jax.set_mesh(mesh):
        outs = [drop(layer, X, nnx.Rngs(dropout=seed)) for seed in (1, 1, 2)]
        plain = nnx.jit(lambda layer, x: layer(x, deterministic=True))(layer, X)
    assert compare_bits(outs[0], outs[1]).equal
    assert not compare_bits(outs[0], outs[2]).equal
    assert not compare_bits(outs[0], plain).equal
    assert_close(plain, truth(layer, {}))


def test_sixteen_bits():
    """Layers of 16-bit activations are right to their rounding; parameters stay float32."""
    layer, mesh = make(parameters=ParameterOptions(dtype=jnp.bfloat16))
    out = run(layer, mesh)
    assert out.dtype == jnp.bfloat16
    assert layer.query.kernel[...].dtype == jnp.float32
    # Products of D, then N H terms, of numbers with 8 bits.
    assert_close(out, truth(layer, {}), roundings=4 * 2**16)


def test_the_gradient_of_16_bit_sinks_is_rounded_once():
    """Gradients of 16-bit sinks are rounded once, though two devices of the batch share the sum."""
    parameters = ParameterOptions(param_dtype=jnp.bfloat16, dtype=jnp.float32)
    layer, mesh = make(parameters=parameters, sinks=True, rotary=None)
    grad = np.random.default_rng(7).standard_normal((B, S, D)).astype(np.float32)

    def loss(layer, x):
        seen = {}
        out = layer(x, record=lambda name, y: seen.update({name: y}))
        return jnp.sum(out * grad), seen

    with jax.set_mesh(mesh):
        x = jax.device_put(X, PartitionSpec("data", "seq"))
        got, seen = nnx.jit(nnx.grad(loss, has_aux=True))(layer, x)
    q, k, v, kernel, sinks = (
        torch.from_numpy(np.asarray(y, np.float64))
        for y in (
            *(seen[name] for name in ("query", "key", "value")),
            layer.out.kernel[...],
            layer.sinks[...],
        )
    )
    out = torch_dense_attention(q, k, v, sinks=sinks.requires_grad_(), is_causal=True)
    of_out = torch.einsum("bsd,nhd->bsnh", torch.from_numpy(grad).double(), kernel)
    expected = torch.autograd.grad(out, sinks, of_out)[0].numpy()
    assert got.sinks[...].dtype == jnp.bfloat16
    off = np.abs(np.asarray(got.sinks[...], np.float64) - expected)
    half_a_unit = float(jnp.finfo(jnp.bfloat16).eps) / 2 * np.abs(expected)
    assert np.all(off <= half_a_unit + 64 * EPS * np.max(np.abs(expected)))


def test_a_layer_in_float64_is_one():
    """QK norm and sinks, too: what validates a port in float64 rounds nowhere to 32 bits."""
    with jax.enable_x64(True):
        layer, mesh = make(
            shape=(1, 1),
            parameters=ParameterOptions(param_dtype=jnp.float64),
            **(FEATURES["everything"] | {"rotary": None}),
            kernel=dense_attention,
        )
        with jax.set_mesh(mesh):
            out = np.asarray(layer(jnp.asarray(X, jnp.float64)))
    expected = truth(layer, FEATURES["everything"] | {"rotary": None})
    assert out.dtype == np.float64
    assert np.abs(out - expected).max() < 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_the_norm_of_sixteen_bits_is_computed_in_float32(dtype):
    """One rounding of query and key, also where their squares overflow float16."""
    layer, mesh = make(
        shape=(1, 1), parameters=ParameterOptions(dtype=dtype), qk_norm=1e-6, rotary=None
    )
    seen = {}
    with jax.set_mesh(mesh):
        # Eagerly: a program may leave out the rounding of the projections.
        x = jnp.asarray(1000 * X, dtype)
        layer(x, record=lambda name, y: seen.update({name: y}))
        for name, scale in (("query", layer.query_scale), ("key", layer.key_scale)):
            y = np.asarray(getattr(layer, name)(x), np.float64)
            assert np.abs(y).max() > 256, "no square overflows"
            norm = np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
            expected = y / norm * np.asarray(scale[...], np.float64)
            half_unit = float(jnp.finfo(dtype).eps) / 2 + 8 * EPS
            wrong = np.abs(np.asarray(seen[name], np.float64) - expected)
            # Below the smallest normal number the unit is absolute.
            bound = half_unit * np.maximum(np.abs(expected), float(jnp.finfo(dtype).tiny))
            assert (wrong <= bound).all()


def test_what_a_record_says():
    layer, mesh = make(shape=(1, 1))

    @nnx.jit
    def recorded(layer, x):
        seen = {}
        out = layer(x, record=lambda name, y: seen.update({name: y}))
        return out, seen, layer.out(seen["context"])

    with jax.set_mesh(mesh):
        out, seen, again = recorded(layer, X)
    assert {name: x.shape for name, x in seen.items()} == {
        "query": (B, S, N, H),
        "key": (B, S, K, H),
        "value": (B, S, K, H),
        "context": (B, S, N, H),
    }
    assert compare_bits(again, out).equal


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("start", (0, 1 << 12, 1 << 20, (1 << 30) - 40))
def test_rotary_is_right_at_every_position(start, interleaved):
    """Rotary embeddings with float32 angles would be off by 0.03 at 2^20, by anything at 2^30."""
    rotary = Rotary(interleaved=interleaved)
    x = rng.standard_normal((1, 40, 2, 64)).astype(np.float32)
    positions = np.arange(start, start + 40)[None]
    got = rotary(jnp.asarray(x), jnp.asarray(positions, jnp.int32))
    expected = rotate(x.astype(np.float64), rotary, positions)
    # cos and sin, two products and a sum, of an angle that is right to 2^-31 of a turn.
    assert np.abs(np.asarray(got) - expected).max() <= 8 * EPS * np.abs(x).max()


def exact_turn(x, frequencies, positions):
    """Half-split pairs turned by exact products: Python's integers, and pi of 100 digits."""
    with mpmath.workdps(100):
        angles = [[mpmath.mpf(float(f)) * int(p) for f in frequencies] for p in positions]
        turn = np.array([[complex(mpmath.expj(angle)) for angle in row] for row in angles])
    half = len(frequencies)
    z = (x[..., :half] + 1j * x[..., half:]) * turn[None, :, None]
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("dtype", [f"{u}int{bits}" for bits in (8, 16, 32, 64) for u in ("", "u")])
def test_rotary_of_every_integer_dtype(dtype):
    """Positions at both ends of every integer dtype, as of padding on the left, and 2^32."""
    info = np.iinfo(dtype)
    ends = [info.min, info.min + 1, info.max - 1, info.max, 0, 1, -1, -5, 127, 128, 65535, 65536]
    wide = [(1 << 32) - 1, 1 << 32, (1 << 32) + 1, -(1 << 32) - 7, 0x0123_4567_89AB_CDEF]
    inside = [p for p in ends + wide if info.min <= p <= info.max]
    x = rng.standard_normal((1, len(inside), 1, 8)).astype(np.float32)
    frequencies = 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    positions = np.array(inside, dtype)[None]
    # In NumPy they are of 64 bits whether JAX has those switched on or not.
    results = [Rotary()(jnp.asarray(x), positions)]
    for x64 in (True,) if info.bits == 64 else (False, True) if info.bits == 32 else (False,):
        with jax.enable_x64(x64):
            assert jnp.asarray(positions).dtype == dtype
            results.append(jax.jit(Rotary())(jnp.asarray(x), jnp.asarray(positions)))
    expected = exact_turn(x.astype(np.float64), frequencies, inside)
    for got in results:
        assert got.dtype == jnp.float32
        assert np.abs(np.asarray(got) - expected).max() <= 8 * EPS * np.abs(x).max()


SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 1.5, 2.0, 4.0],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", SCALED)
def test_rotary_of_scaled_variants(kind):
    """Scaled rotary embeddings have the frequencies, factor and products of `transformers`."""
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": kind, "rope_theta": 10_000.0} | SCALED[kind],
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=256)
    assert (factor != 1) == (kind in ("yarn", "longrope"))
    x = rng.standard_normal((1, 256, 2, 8)).astype(np.float32)
    positions = torch.arange(256)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.asarray(x), positions)
    if kind == "longrope":  # its module takes the long factors beyond the original length only
        angles = positions[..., None] * torch.cat([frequencies, frequencies])
        cos, sin = angles.cos() * factor, angles.sin() * factor
    expected, _ = apply_rotary_pos_emb(
        torch.asarray(x), torch.asarray(x), cos, sin, unsqueeze_dim=2
    )
    rotary = Rotary(frequencies=tuple(frequencies.tolist()), attention_factor=factor)
    got = jax.jit(rotary)(jnp.asarray(x), jnp.asarray(positions.numpy(), jnp.int32))
    # `transformers` multiplies in float32: angles of 256 radians are wrong by 256 EPS / 2.
    assert np.abs(np.asarray(got) - expected.numpy()).max() <= 256 * EPS * np.abs(x).max()


def test_rotary_with_frequencies_of_its_own():
    x = rng.standard_normal((1, 9, 2, 4)).astype(np.float32)
    own = Rotary(frequencies=(0.5, 0.25 * 100.0 ** (-1 / 2)))
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    z = x[..., :2] + 1j * x[..., 2:]
    z = z * np.exp(1j * np.arange(9)[:, None] * np.asarray(own.frequencies))[None, :, None]
    got = own(jnp.asarray(x), positions)
    assert_close(got, np.concatenate([z.real, z.imag], -1))


def test_rotary_on_a_shard_uses_global_positions():
    """The layer gives each token its position in the sequence, not in its shard."""
    layer, mesh = make(shape=(1, 8))
    one, alone = make(shape=(1, 1))
    assert_close(run(layer, mesh), np.asarray(run(one, alone), np.float64))


def test_linen_by_the_bridge_of_flax():
    """The layer is a linen module, too: `nnx.bridge.to_linen`."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    with jax.set_mesh(mesh):
        linen = nnx.bridge.to_linen(
            Attention, D, num_heads=N, num_kv_heads=K, layout=LAYOUT, head_dim=H
        )
        x = jax.device_put(X, PartitionSpec("data", "seq"))
        variables = jax.jit(linen.init)(jax.random.key(0), x)
        out = jax.jit(linen.apply)(variables, x)
    assert out.shape == (B, S, D)
    assert np.isfinite(np.asarray(out)).all()
    kernel = jax.tree.leaves(variables["params"]["query"]["kernel"])[0]
    assert kernel.shape == (D, N, H)


def attention(**options: Any) -> Attention:
    options = {"num_heads": N, "num_kv_heads": K, "head_dim": H} | options
    return Attention(D, **options, rngs=nnx.Rngs(0))


def decoder(**options):
    layer, mesh = make(**options)
    with jax.set_mesh(mesh):
        layer.init_cache(B, 4)
    return layer


SMALL = {"D": 2, "F": 3}


def attention_of(layer: Attention) -> Any:
    return lambda x: layer(x, decode=True)


def on(layer: Any, shape: tuple[int, int], call: Any) -> Any:
    with jax.set_mesh(jax.make_mesh(shape, ("data", "seq"))):
        return call(layer)


def wrong(x: Any) -> Any:
    """An argument that type checkers would find before a test does."""
    return x


def test_layers_stacked_by_vmap_train_as_they_do_apart():
    """The names of the axes gain one for the layers, so an optimiser's moments lie as these do."""
    layers = 2
    named: dict[str, Any] = {"transform_metadata": {nnx.PARTITION_NAME: None}}
    options: Any = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "layout": LAYOUT}

    def make_layer(rngs):
        parameters = ParameterOptions(sharding={"D": "seq"})
        return Attention(D, **options, parameters=parameters, rngs=rngs)

    def one_layer(layer, x):
        return x + layer(x)

    in_turn: Any = nnx.scan(one_layer, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, **named)

    def apart(kernels):
        x = jnp.asarray(X)
        for i in range(layers):
            x = x + nnx.merge(one, jax.tree.map(itemgetter(i), kernels))(x)
        return (x**2).mean()

    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"), axis_types=(KINDS[0],) * 2)):
        one = nnx.split(make_layer(nnx.Rngs(0)))[0]
        make_all = nnx.vmap(make_layer, in_axes=0, out_axes=0, **named)
        model: Any = nnx.split_rngs(splits=layers)(make_all)(nnx.Rngs(0))
        kernels: Any = nnx.to_pure_dict(nnx.state(model))
        expected: Any = jax.grad(apart)(kernels)
        optimizer = nnx.Optimizer(model, optax.sgd(1.0, momentum=0.9), wrt=nnx.Param)
        gradient: Any = nnx.grad(lambda model: (in_turn(model, X) ** 2).mean())
        optimizer.update(model, gradient(model))
        trained: Any = nnx.to_pure_dict(nnx.state(model))
        states: Any = nnx.to_pure_dict(nnx.state(optimizer, nnx.OptState))
        moments = states["opt_state"][0]["trace"]
    for path, kernel in jax.tree.leaves_with_path(kernels):
        grad, after, moment = (_at(tree, path) for tree in (expected, trained, moments))
        assert np.abs(kernel - grad - after).max() < 1e-6
        assert np.abs(grad).max() > 1e-4
        assert moment.sharding.is_equivalent_to(kernel.sharding, kernel.ndim), path


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (
            lambda: attention(parameters=ParameterOptions(sharding={"features": "data"})),
            "sharding has the key 'features', .*Write 'D'",
        ),
        (
            lambda: attention(parameters=ParameterOptions(sharding={"d": "data"})),
            r"key 'd', and the axes of the kernel are {'D': 20.*Write 'D'",
        ),
        (lambda: attention(dropout_rate=-0.1), "rate must be a Python number.*got -0.1"),
        (lambda: attention(mask=wrong(True)), r"must be a jax_seqpar.Mask, got True"),
        (
            lambda: attention(mask=Mask(segment_ids=jnp.ones((B, S), int))),
            r"segment_ids=\(int32\[2, 24\], int32\[2, 24\]\)\) has arrays.*at the call",
        ),
        (lambda: attention(logits=Logits(sinks=jnp.ones(N))), "sinks=True for learned sinks"),
        (lambda: attention(qk_norm=wrong(True)), "epsilon of the norm.*got True.*1e-6"),
        (lambda: attention(use_bias="query"), "use_bias must be True, False, or some of"),
        (lambda: attention(use_bias=("out", "norm")), r"got \('out', 'norm'\)"),
        (lambda: attention(num_kv_heads=3), "must be a multiple of num_kv_heads = 3"),
        (lambda: attention(head_dim=None, num_heads=3, num_kv_heads=3), "give head_dim"),
        (lambda: attention()(jnp.ones((S, D))), r"write x\[None\]"),
        (lambda: attention()(jnp.ones((B, S, D + 1))), r"x must be \[B, T, 20\]"),
        (
            lambda: attention()(jnp.ones((B, S, D)), positions=jnp.zeros((B, 6), jnp.int32)),
            "Positions and segments are global",
        ),
        (
            lambda: attention()(jnp.ones((B, S, D)), positions=jnp.zeros((3, S), jnp.int32)),
            r"positions must be \[B, T\]",
        ),
        (
            lambda: attention()(jnp.ones((B, S, D)), positions=jnp.zeros((B, S))),
            "positions must be integers, got float32",
        ),
        (
            lambda: Rotary()(jnp.ones((B, S, N, H)), jnp.zeros((B, S))),
            "positions must be integers",
        ),
        (
            lambda: attention(dropout_rate=0.1)(jnp.ones((B, S, D))),
            r"say deterministic=.*model.eval\(\) or model.train",
        ),
        (
            lambda: attention(dropout_rate=0.1)(jnp.ones((B, S, D)), deterministic=False),
            "needs rngs",
        ),
        (lambda: attention()(jnp.ones((B, 1, D)), decode=True), "call init_cache"),
        (lambda: decoder()(jnp.ones((B, 5, D)), decode=True), "do not fit the cache of 4"),
        (
            lambda: decoder()(
                jnp.ones((B, 1, D)), decode=True, segment_ids=jnp.zeros((B, 1), jnp.int32)
            ),
            "leave segment_ids out",
        ),
        (
            lambda: decoder(dropout_rate=0.1)(
                jnp.ones((B, 1, D)), decode=True, deterministic=False
            ),
            "decode=True has no dropout",
        ),
        (
            lambda: attention()(wrong([[[1.0] * D]])),
            r"x must be an array of JAX or NumPy, got list",
        ),
        (
            lambda: attention()(wrong(jax.ShapeDtypeStruct((B, S, D), jnp.float32))),
            r"x has a shape and no numbers. Write jax.eval_shape",
        ),
        (lambda: attention()(jnp.ones((B, S, D), jnp.int32)), "floating dtype, got int32"),
        (
            lambda: attention()(jnp.ones((B, S, D)), positions=wrong([[0] * S])),
            "positions must be an array of",
        ),
        (lambda: decoder()(jnp.ones((1, 1, D)), decode=True), r"B = 1, but the cache is of 2"),
        (
            lambda: on(attention_of(decoder()), (8, 1), lambda f: f(jnp.ones((B, 1, D)))),
            r"the cache is on a mesh .*'seq': 4.*call on .*'data': 8",
        ),
        (lambda: attention().init_cache(wrong(2.0), 4), "positive integer of batch, got 2.0"),
        (lambda: attention().init_cache(2, 4, jnp.int8), "floating dtype, got .*int8"),
        (
            lambda: Projection("SD,DF->SF", SMALL, rngs=nnx.Rngs(0))(wrong([[1.0, 2.0]])),
            "x must be an",
        ),
        (
            lambda: Projection("SD,DF->SF", SMALL, rngs=nnx.Rngs(0))(jnp.ones((1, 5, 2))),
            r"axes 'SD' of 'SD,DF->SF', with .* got shape \(1, 5, 2\)",
        ),
        (
            lambda: Projection("SD,DF->SF", SMALL, rngs=nnx.Rngs(0))(jnp.ones((5, 3))),
            r"got shape \(5, 3\)",
        ),
        (lambda: Rotary()(jnp.ones((1, 1, 4)), INDEX), r"x must be \[B, T, N, H\]"),
        (lambda: Rotary()(jnp.ones((2, 3, 1, 4)), INDEX), r"positions \[B, T\] or \[1, T\]"),
        (
            lambda: Rotary()(jnp.ones((1, 1, 1, 4)), wrong([[0]])),
            "positions must be an array of",
        ),
        (
            lambda: SequenceParallel()(*wrong([[[1.0]]] * 3)),
            "query must be an array of",
        ),
        (
            lambda: on(
                attention(), (1, 4), lambda layer: layer.init_cache(2, 4, shared_by="heads")
            ),
            'num_kv_heads = 2 is not divisible by the 4 .*Write shared_by="sequence"',
        ),
        (
            lambda: attention().init_cache(2, 4, shared_by=wrong("tokens")),
            "None, 'heads' or 'sequence', got 'tokens'",
        ),
        (lambda: attention(head_dim=5)(jnp.ones((B, S, D))), "Rotary turns an even number"),
        (lambda: attention(rotary=Rotary(frequencies=(1.0,)))(jnp.ones((B, S, D))), "needs a freq"),
        (
            lambda: Rotary(frequencies=(1.0, np.nan))(jnp.ones((1, 1, 1, 4)), INDEX),
            "finite frequencies",
        ),
        (
            lambda: Rotary(attention_factor=0.0)(jnp.ones((1, 1, 1, 4)), INDEX),
            "attention_factor must be a positive",
        ),
        (lambda: attention(rotary=Rotary(fraction=0.0))(jnp.ones((B, S, D))), "fraction"),
        (lambda: attention()(jnp.ones((B, S, D))), "no mesh"),
        (lambda: Projection("BSD,DF", {"D": 2, "F": 3}, rngs=nnx.Rngs(0)), "must be an einsum"),
        (lambda: Projection("BSD,FD->BSF", {"D": 2, "F": 3}, rngs=nnx.Rngs(0)), "come first"),
        (lambda: Projection("BSD,DF->BSF", {"D": 2}, rngs=nnx.Rngs(0)), "axis 'F'.*has no size"),
        (
            lambda: SequenceParallel()(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(3)),
            "with the same batch",
        ),
    ),
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_advice_for_tokens_that_do_not_divide():
    """Padded tokens, told apart by their segment, against one device without them."""
    options = {"mask": Mask(), "rotary": None}
    (layer, mesh), (alone, one) = make(**options), make(shape=(1, 1), **options)
    more = 2
    x, ids = jnp.asarray(X[:, :-more]), np.ones((B, S), np.int32)
    ids[:, -more:] = 0
    padded = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
    with jax.set_mesh(one):
        expected = alone(x)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=rf"Pad x to {S} tokens, with segment_ids .*\.shard"):
            layer(x)
        told, untold = layer(padded, segment_ids=jnp.asarray(ids)), layer(padded)
    told, untold, expected = (np.asarray(y, np.float64) for y in (told, untold, expected))
    assert np.abs(told[:, :-more] - expected).max() < 1e-5
    assert np.abs(untold[:, :-more] - expected).max() > 1e-2
