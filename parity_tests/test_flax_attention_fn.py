"""`attention_fn=SequenceParallel()` in Flax's own layers: what they compute, over a mesh."""

import inspect
from functools import partial
from typing import Any

import flax.linen as linen
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS, slow
from flat_names import keywords_of
from flax import nnx
from jax.sharding import PartitionSpec

from jax_seqpar import MeshLayout, blockwise_attention, exact_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.flax import Attention, ParameterOptions, SequenceParallel
from jax_seqpar.plan import collectives

pytestmark = pytest.mark.usefixtures("less_optimised")

B, S, D = 4, 24, 32
EPS = np.finfo(np.float32).eps
LAYOUT = MeshLayout(batch="data")
rng = np.random.default_rng(2)
TOKENS = X = rng.standard_normal((B, S, D)).astype(np.float32)
LENGTHS = np.array([24, 7, 1, 16])
# Queries that have a key: what the others give differs by intent.
REAL = np.arange(S) < LENGTHS[:, None]
PADDING = np.asarray(linen.make_attention_mask(REAL, REAL))
CAUSAL = np.asarray(linen.make_causal_mask(np.ones((B, S))))
MASKS = {
    "none": None,
    "causal": CAUSAL,
    "padding": PADDING,
    "combined": np.asarray(linen.combine_masks(CAUSAL, PADDING)),
    "by head": rng.random((B, 8, S, S)) < 0.7,
    "of keys": (rng.random((B, 1, 1, S)) < 0.7) | (np.arange(S) == 0),
}
# Each mask on one kind of mesh, the first on both.
BY_KIND = [("none", KINDS[1]), *((name, KINDS[i % 2]) for i, name in enumerate(MASKS))]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def mesh(request):
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"), axis_types=(request.param,) * 2)):
        yield


def on_mesh(x):
    return jax.device_put(x, PartitionSpec("data", "seq"))


def assert_close(a, b, kept=None):
    """Asserts that two float32 attentions agree to the rounding of projections of `D` terms."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if kept is not None:
        a, b = a[kept], b[kept]
    # Seen to be 8 units of the largest at most.
    assert np.abs(a - b).max() <= D * EPS * np.abs(b).max()


def nnx_layer(attention_fn=nnx.dot_product_attention, **options):
    options = {"num_kv_heads": 2, "decode": False} | options
    return nnx.MultiHeadAttention(8, D, attention_fn=attention_fn, rngs=nnx.Rngs(0), **options)


def linen_layer(attention_fn=linen.dot_product_attention, **options):
    return linen.MultiHeadDotProductAttention(8, attention_fn=attention_fn, **options)


def own_layer(_, **options):
    parameters = ParameterOptions(**options)
    return Attention(D, num_heads=8, num_kv_heads=2, parameters=parameters, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("mask", "mesh"), BY_KIND, indirect=["mesh"], ids=str)
@pytest.mark.usefixtures("mesh")
def test_nnx_output_and_gradient(mask):
    is_causal = mask == "none"
    kept = REAL if mask in ("padding", "combined") else np.ones((B, S), bool)
    cotangent = np.where(kept[..., None], rng.standard_normal(X.shape), 0).astype(np.float32)

    @nnx.jit
    def run(layer, x):
        out = layer(x, mask=MASKS[mask], is_causal=is_causal)
        return out, nnx.grad(
            lambda m, x: jnp.vdot(m(x, mask=MASKS[mask], is_causal=is_causal), cotangent),
            argnums=(0, 1),
        )(layer, x)

    expected, (dw, dx) = run(nnx_layer(), X)
    got, (dw2, dx2) = run(nnx_layer(SequenceParallel(LAYOUT)), on_mesh(X))
    assert_close(got, expected, kept)
    assert_close(dx2, dx)
    for a, b in zip(jax.tree.leaves(nnx.state(dw2)), jax.tree.leaves(nnx.state(dw)), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 4 * D * EPS * max(
            np.abs(np.asarray(b)).max(), 1
        )


@pytest.mark.parametrize(("mask", "mesh"), BY_KIND, indirect=["mesh"], ids=str)
@pytest.mark.usefixtures("mesh")
def test_linen_output(mask):
    kept = REAL if mask in ("padding", "combined") else np.ones((B, S), bool)
    layer, parallel = linen_layer(), linen_layer(SequenceParallel(LAYOUT))
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    expected = jax.jit(partial(layer.apply, mask=MASKS[mask]))(variables, X)
    got = jax.jit(partial(parallel.apply, mask=MASKS[mask]))(variables, on_mesh(X))
    assert_close(got, expected, kept)


@pytest.mark.usefixtures("mesh")
def test_linen_is_causal_without_a_mask():
    layer = linen_layer()
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    expected = layer.apply(variables, X, mask=CAUSAL)
    parallel = linen_layer(SequenceParallel(LAYOUT, is_causal=True))
    got = jax.jit(parallel.apply)(variables, on_mesh(X))
    assert_close(got, expected)


@pytest.mark.usefixtures("mesh")
def test_linen_initialises_with_one_token():
    """Linen's init takes one token of one sequence, which two devices cannot share."""
    layer = linen_layer(SequenceParallel(LAYOUT))
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 1, D)))
    expected = jax.jit(linen_layer().init)(jax.random.key(0), jnp.ones((1, 1, D)))
    assert compare_bits(variables, expected).equal


@pytest.mark.parametrize("batch", ((), (2, 2), (2, 1, 2)), ids=str)
def test_any_number_of_batch_axes(batch):
    query, key, value = rng.standard_normal((3, *batch, S, 8, 4)).astype(np.float32)
    masks = [None, CAUSAL[0, 0], rng.random((*batch, 1, S, S)) < 0.8]
    attend = jax.jit(SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",)))))
    for mask in masks:
        expected = linen.dot_product_attention(query, key, value, mask=mask)
        assert_close(attend(*map(jnp.asarray, (query, key, value)), mask=mask), expected)


@pytest.mark.parametrize("tokens", (1, 5, 23))
def test_tokens_that_the_devices_do_not_divide(tokens):
    query, key, value = map(jnp.asarray, rng.standard_normal((3, 2, tokens, 8, 4), np.float32))
    attend = jax.jit(
        SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((8,), ("seq",))), is_causal=True)
    )
    expected = nnx.dot_product_attention(query, key, value, is_causal=True)
    assert_close(attend(query, key, value), expected)


@pytest.mark.parametrize(
    ("kind", "mesh"), tuple(zip(("nnx", "linen"), KINDS, strict=True)), indirect=["mesh"]
)
@pytest.mark.usefixtures("mesh")
def test_decoding_token_by_token(kind):
    """Flax's own cache, one query at a time, against the whole sequence at once."""
    S = 5
    X, CAUSAL = TOKENS[:, :S], linen.make_causal_mask(jnp.ones((B, S)))
    attend = SequenceParallel(LAYOUT)
    if kind == "nnx":
        layer = nnx_layer(attend, decode=True)
        layer.init_cache((B, S, D))
        step = nnx.jit(lambda layer, x: layer(x))
        got = [step(layer, X[:, i : i + 1]) for i in range(S)]
        expected = nnx_layer()(jnp.asarray(X), is_causal=True)
    else:
        layer = linen_layer(attend, decode=True)
        variables = jax.jit(layer.init)(jax.random.key(0), X)
        params, cache, got = variables["params"], variables["cache"], []
        step = jax.jit(partial(layer.apply, mutable=["cache"]))
        for i in range(S):
            out, changed = step({"params": params, "cache": cache}, X[:, i : i + 1])
            cache = changed["cache"]
            got.append(out)

        def body(cache, x):
            out, changed = layer.apply({"params": params, "cache": cache}, x, mutable=["cache"])
            return changed["cache"], out

        one_by_one = jnp.swapaxes(jnp.asarray(X), 0, 1)[:, :, None]
        scanned = jax.jit(partial(jax.lax.scan, body))(variables["cache"], one_by_one)[1]
        assert_close(np.swapaxes(np.asarray(scanned)[:, :, 0], 0, 1), np.concatenate(got, axis=1))
        expected = linen_layer().apply({"params": params}, X, mask=CAUSAL)
    assert_close(np.concatenate([np.asarray(x) for x in got], axis=1), expected)


@pytest.mark.parametrize("broadcast", (True, slow(False)))
def test_dropout_is_the_same_at_every_degree(broadcast):
    query, key, value = map(jnp.asarray, rng.standard_normal((3, 2, S, 8, 4), np.float32))
    key_ = jax.random.key(3)
    options = {"dropout_rate": 0.5, "dropout_rng": key_, "broadcast_dropout": broadcast}

    def run(degree, **more):
        mesh = jax.make_mesh((degree,), ("seq",))
        attend = SequenceParallel(layout=MeshLayout(mesh=mesh), kernel=exact_attention)
        return jax.jit(partial(attend, **(options | more)))(query, key, value)

    out = run(1)
    assert compare_bits(out, run(8)).equal
    assert not compare_bits(out, run(1, dropout_rng=jax.random.key(4))).equal
    plain = run(8, deterministic=True)
    assert compare_bits(plain, run(8, dropout_rate=0.0)).equal
    # One mask for all heads and sequences, or one for each: with equal inputs it shows.
    same = jnp.ones_like(query)
    random = jnp.broadcast_to(value[:1, :, :1], value.shape)
    mesh = jax.make_mesh((8,), ("seq",))
    heads = jax.jit(partial(SequenceParallel(layout=MeshLayout(mesh=mesh)), **options))(
        same, same, random
    )
    assert bool((heads == heads[:1, :, :1]).all()) == broadcast


@pytest.mark.parametrize(
    ("kind", "mesh"), tuple(zip(("nnx", "linen"), KINDS, strict=True)), indirect=["mesh"]
)
@pytest.mark.usefixtures("mesh")
def test_dropout_in_a_layer(kind):
    """Dropout drops in training, the same weights for the same key, and not in evaluation."""
    attend = SequenceParallel(LAYOUT)
    if kind == "nnx":
        layer = nnx_layer(attend, dropout_rate=0.5, keep_rngs=False)

        def run(seed):
            rngs = None if seed is None else nnx.Rngs(dropout=seed)
            evaluate = seed is None
            run = nnx.jit(lambda layer, x, rngs: layer(x, rngs=rngs, deterministic=evaluate))
            return run(layer, on_mesh(X), rngs)
    else:
        layer = linen_layer(attend, dropout_rate=0.5)
        variables = jax.jit(partial(layer.init, deterministic=True))(jax.random.key(0), X)

        def run(seed):
            rngs = None if seed is None else {"dropout": jax.random.key(seed)}
            apply = jax.jit(partial(layer.apply, deterministic=seed is None))
            return apply(variables, on_mesh(X), rngs=rngs)

    assert compare_bits(run(1), run(1)).equal
    assert not compare_bits(run(1), run(2)).equal
    assert not compare_bits(run(1), run(None)).equal


def test_every_argument_of_flax_is_named():
    """Linen drops what a function does not name, so a causal model becomes bidirectional."""
    named = set(inspect.signature(SequenceParallel()).parameters)
    for contract in (nnx.dot_product_attention, linen.dot_product_attention):
        assert set(inspect.signature(contract).parameters) <= named


def test_it_is_a_value():
    """`SequenceParallel` has equality and a hash, so nnx.jit and linen compile its module once."""
    assert SequenceParallel(LAYOUT) == SequenceParallel(LAYOUT)
    assert hash(SequenceParallel(LAYOUT)) == hash(SequenceParallel(LAYOUT))
    assert SequenceParallel(LAYOUT) != SequenceParallel(LAYOUT, is_causal=True)


def test_options_of_its_own():
    """Window and soft cap, against `dot_product_attention` with the same words."""
    query, key, value = map(jnp.asarray, rng.standard_normal((3, 2, S, 8, 4), np.float32))
    options = {"is_causal": True, "local_window_size": (5, 0), "logits_soft_cap": 2.0}
    mesh = jax.make_mesh((4,), ("seq",))
    got = jax.jit(SequenceParallel(layout=MeshLayout(mesh=mesh), **options))(query, key, value)
    assert_close(got, blockwise_attention(query, key, value, **keywords_of(**options)))
    full = jax.jit(SequenceParallel(layout=MeshLayout(mesh=mesh), is_causal=True))(
        query, key, value
    )
    assert np.abs(np.asarray(got - full)).max() > 1e-2


def test_dtype_and_bias():
    query, key, value = map(jnp.asarray, rng.standard_normal((3, 2, S, 8, 4), np.float32))
    bias = jnp.asarray(rng.standard_normal((8, S, S)), jnp.float32)
    attend = SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",))))
    jitted = jax.jit(attend, static_argnames="dtype")
    assert_close(
        jitted(query, key, value, bias=bias),
        nnx.dot_product_attention(query, key, value, bias[None]),
    )
    assert jitted(query, key, value, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_a_bias_keeps_its_precision():
    """A bias of 100 keeps its float32: in 16 bits it would be off by a quarter."""
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in rng.standard_normal((3, 2, S, 8, 4)))
    bias = jnp.asarray(100 + rng.standard_normal((1, 8, S, S)), jnp.float32)
    got = jax.jit(SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",)))))(
        query, key, value, bias=bias
    )
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    expected = np.asarray(nnx.dot_product_attention(*wide, bias=bias))
    # Inputs and output of 8 bits.
    assert np.abs(np.asarray(got, np.float32) - expected).max() <= 2**-7 * np.abs(expected).max()


@pytest.mark.usefixtures("optimised")
def test_what_is_sent():
    """Four all-to-alls in a layer, and no more."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    with jax.set_mesh(mesh):
        graph, state = nnx.split(nnx_layer(SequenceParallel(LAYOUT)))
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, is_causal=True))
        program = run.lower(state, on_mesh(X)).compile().as_text()
    assert collectives(program or "") == {"all-to-all": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"precision": ("highest", "high")}, "cannot carry precision.*one jax.lax.Precision"),
        ({"precision": "exact"}, "cannot carry precision = 'exact'"),
        ({"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3}, "default_matmul_precision"),
        ({"module": object()}, "sow_weights needs the T x S weights"),
        ({"einsum_dot_general": jax.lax.dot_general}, "einsum_dot_general"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "leave qk_attn_weights_einsum_cls out|Leave"),
        ({"attn_weights_value_einsum": jnp.einsum}, "Leave attn_weights_value_einsum_cls out"),
        ({"dropout_rate": 0.5}, "needs a key"),
        ({"mask": np.ones((3, 1, S, S), bool)}, "mask"),
        ({"force_fp32_for_softmax": 3}, "force_fp32_for_softmax"),
    ),
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refusals(options, message):
    x = jnp.ones((2, S, 8, 4))
    with pytest.raises(ValueError, match=message):
        SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",))))(x, x, x, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_string_as_layout_is_refused_at_once():
    message = r"layout must be a MeshLayout, got 'seq'. Write MeshLayout\(tokens='seq'\)"
    with pytest.raises(ValueError, match=message):
        SequenceParallel("seq")  # pyright: ignore
    with pytest.raises(ValueError, match=message):
        Attention(8, num_heads=2, layout="seq", rngs=nnx.Rngs(0))  # pyright: ignore


def test_a_batch_that_does_not_divide_is_refused():
    x = jnp.ones((3, S, 8, 4))
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    with pytest.raises(ValueError, match="batch B = 3 is not divisible by the 2 devices"):
        SequenceParallel(LAYOUT.on(mesh))(x, x, x)
    with pytest.raises(ValueError, match="names axis 'seq', which the mesh does not have"):
        SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((8,), ("data",))))(x, x, x)
    with pytest.raises(ValueError, match="no mesh"):
        SequenceParallel()(x, x, x)


@pytest.mark.parametrize("options", ({"is_causal": True}, {"local_window_size": (2, 0)}), ids=str)
def test_rules_about_positions_are_refused_when_decoding(options):
    """The query of one token would be taken for the first, and see one key."""
    message = r"1 queries and 8 keys.*is not told where"
    layer = nnx_layer(
        SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",))), **options),
        decode=True,
    )
    layer.init_cache((B, 8, D))
    with pytest.raises(ValueError, match=message):
        layer(jnp.asarray(X[:, :1]))
    linen = linen_layer(layer.attention_fn, decode=True)
    variables = linen.init(jax.random.key(0), X[:, :8])
    with pytest.raises(ValueError, match=message):
        linen.apply(variables, X[:, :1], mutable=["cache"])


def test_causality_at_the_call_is_refused_when_decoding():
    """Flax before 0.12.12 passes it on, beside the mask of its cache: one key would be seen."""
    attend = SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",))))
    query, key = jnp.ones((B, 1, 8, 4)), jnp.ones((B, 8, 8, 4))
    mask = jnp.arange(8) <= 3
    with pytest.raises(ValueError, match=r"1 query and 8 keys.*write is_causal=False"):
        attend(query, key, key, mask=mask[None, None, None], is_causal=True)


@pytest.mark.parametrize("padding", (False, True))
@pytest.mark.parametrize(("queries", "keys"), ((8, 8), (2, 4), (7, 3), (1, 1)), ids=str)
def test_causality_at_the_call(queries, keys, padding):
    """Causality as of Flax's function, with a mask and without: query i sees keys 0 to i."""
    query = jnp.asarray(rng.standard_normal((2, queries, 8, 4)), jnp.float32)
    key, value = map(jnp.asarray, rng.standard_normal((2, 2, keys, 2, 4), np.float32))
    mask = jnp.asarray(rng.random((2, 1, queries, keys)) < 0.6).at[..., 0].set(True)
    mask = mask if padding else None
    attend = jax.jit(
        partial(
            SequenceParallel(layout=MeshLayout(mesh=jax.make_mesh((4,), ("seq",)))), is_causal=True
        )
    )
    expected = nnx.dot_product_attention(query, key, value, mask=mask, is_causal=True)
    assert_close(attend(query, key, value, mask=mask), expected)


@pytest.mark.parametrize("kind", ("nnx", "linen"))
def test_the_class_in_place_of_an_instance(kind):
    call: Any = nnx_layer(SequenceParallel)
    if kind == "linen":
        call = partial(linen_layer(SequenceParallel).init, jax.random.key(0))
    with pytest.raises(TypeError, match=r"Write attention_fn=SequenceParallel\(\)"):
        call(X)


def products(jaxpr):
    """The precision of every dot_general, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


DEFAULT, HIGH, HIGHEST = jax.lax.Precision
PRECISIONS = {
    "none": (None, None),
    "default": (DEFAULT, DEFAULT),
    "high": (HIGH, HIGH),
    "highest": (HIGHEST, HIGHEST),
    "a name": ("highest", HIGHEST),
    "a pair": ((HIGH, HIGH), HIGH),
    "a pair of names": (("float32", "highest"), HIGHEST),
}


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("kind", ("nnx", "linen", "ours"))
def test_precision(kind, name):
    """Every product of the layer carries it, forward and backward, as with Flax's own function."""
    given, expected = PRECISIONS[name]
    make: Any = {"nnx": nnx_layer, "linen": linen_layer, "ours": own_layer}[kind]
    x = jnp.asarray(X[:, :8])
    with jax.set_mesh(jax.make_mesh((4,), ("seq",))):
        layer = make(SequenceParallel(), precision=given)
        if kind != "linen":
            graph, variables = nnx.split(layer)

            def run(variables, x):
                return nnx.merge(graph, variables)(x)
        else:
            variables, run = make(precision=given).init(jax.random.key(0), x), layer.apply

        def loss(variables, x):
            return (run(variables, x) ** 2).sum()

        for function in (run, jax.grad(loss)):
            found = set(products(jax.make_jaxpr(function)(variables, x).jaxpr))
            assert found == {None if expected is None else (expected, expected)}
