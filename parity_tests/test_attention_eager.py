"""Eager calls: programs are compiled once, and go when their kernel goes."""

import gc
import weakref
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS
from flat_names import keywords_of
from flax import nnx
from jax.sharding import AxisType
from questions import compilations, compiled, error, oracle

from jax_seqpar import (
    Blockwise,
    Mask,
    MeshLayout,
    blockwise_attention,
    dense_attention,
    dot_product_attention,
    exact_attention,
    pad_to_degree,
)
from jax_seqpar.flax import Attention, SequenceParallel
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import collectives

CASE = Case(batch=2, tokens=16, heads=8, kv_heads=4, head_dim=4)
QUERY, KEY, VALUE, GRAD = map(jnp.asarray, CASE.inputs().values())
SEGMENTS = jnp.zeros((2, 16), jnp.int32)
RNG = jax.random.key(0)


def own_kernel(query, key, value, is_causal):
    return query * 2


def biased_kernel(query, key, value, is_causal, bias, scale):
    return query * scale + bias.sum()


def forward(attend):
    return attend(QUERY, KEY, VALUE)


def gradient(attend):
    return jax.grad(lambda q: jnp.vdot(attend(q, KEY, VALUE), GRAD))(QUERY)


def pullback(attend):
    return jax.vjp(attend, QUERY, KEY, VALUE)[1](GRAD)


def tangent(attend):
    return jax.jvp(attend, (QUERY, KEY, VALUE), (QUERY, KEY, VALUE))


def sharded(kind=AxisType.Auto, **options):
    mesh = ONE_AXIS[4].mesh(kind)
    return partial(
        dot_product_attention,
        **keywords_of(**{"layout": MeshLayout(mesh=mesh), "is_causal": True} | options),
    )


def with_chunks(query, key, value, **options):
    """Call as inside a user's loop, with another partial and another array each time."""
    bias = jnp.zeros((1, 1, 16, 16))
    kernel = partial(partial(biased_kernel, bias=bias), scale=0.5)
    return sharded(kernel=kernel)(query, key, value, **options)


CALLS = {
    "defaults": (forward, sharded()),
    "defaults, gradient": (gradient, sharded()),
    "Explicit axes": (forward, sharded(AxisType.Explicit)),
    "Explicit axes, pullback": (pullback, sharded(AxisType.Explicit)),
    "segments and dropout": (
        forward,
        sharded(segment_ids=SEGMENTS, dropout_rate=0.5, dropout_rng=RNG),
    ),
    "dense, pullback": (pullback, sharded(kernel=dense_attention)),
    "exact, gradient": (gradient, sharded(kernel=exact_attention)),
    "a user's kernel, gradient": (gradient, sharded(kernel=own_kernel)),
    "equal partials": (forward, with_chunks),
    "equal partials, gradient": (gradient, with_chunks),
    "blockwise alone": (forward, blockwise_attention),
    "blockwise alone, pullback": (pullback, blockwise_attention),
    "blockwise alone, tangent": (tangent, Blockwise(forward_mode=True)),
    "dense alone, gradient": (gradient, dense_attention),
    "exact alone, gradient": (gradient, exact_attention),
    "padding": (lambda attend: attend(QUERY, KEY, VALUE), partial(pad_to_degree, degree=5)),
}


def decoder():
    layer = Attention(32, num_heads=8, num_kv_heads=2, qk_norm=1e-6, sinks=True, rngs=nnx.Rngs(0))
    layer.init_cache(2, 16)
    return partial(layer, decode=True)


def bidirectional_decoder():
    layer = Attention(32, num_heads=8, mask=Mask(), use_bias=True, rngs=nnx.Rngs(0))
    layer.init_cache(2, 16)
    return partial(layer, decode=True)


def flax_decoder():
    layer = nnx.MultiHeadAttention(8, 32, attention_fn=SequenceParallel(), rngs=nnx.Rngs(0))
    layer.init_cache((2, 16, 32))
    return partial(layer, decode=True)


GENERATION = {
    "Attention": decoder,
    "Attention, bidirectional": bidirectional_decoder,
    "nnx.MultiHeadAttention": flax_decoder,
}


@pytest.mark.parametrize(("ask", "attend"), CALLS.values(), ids=CALLS)
def test_the_third_equal_call_compiles_nothing(ask, attend):
    ask(attend)
    ask(attend)
    with compilations() as names:
        jax.block_until_ready(ask(attend))
    assert names == []


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize("layer", GENERATION)
def test_the_third_generated_token_compiles_nothing(layer, kind):
    """Flax layers that decode eagerly compile nothing after the second token."""
    token = jnp.ones((2, 1, 32))
    with jax.set_mesh(ONE_AXIS[4].mesh(kind)):
        generate = GENERATION[layer]()
        generate(token)
        generate(token)
        with compilations() as names:
            jax.block_until_ready(generate(token))
    assert names == []


def test_compilations_are_seen():
    with compilations() as names:
        jax.jit(lambda x: x + 3)(QUERY)
    assert len(names) == 1


def test_values_and_gradients_of_an_eager_call():
    """Eager calls agree with float64; on Explicit axes with a cotangent on one device, too."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        out, pull = jax.vjp(sharded(kind), QUERY, KEY, VALUE)
        expected = oracle(CASE, CASE.inputs())
        for got, truth in zip((out, *pull(GRAD)), expected, strict=True):
            bound = 16 * np.finfo(np.float32).eps * np.max(np.abs(truth))
            assert error(got, truth) <= bound


def test_what_is_bound_to_a_partial_is_heard():
    """Static values are compared with their types, arrays are operands."""
    spy = []

    def kernel(query, key, value, factor, shift):
        spy.append(factor)
        return query * float(factor) + shift

    run = sharded(is_causal=False)
    for factor in (1, 1.0, True, 2, 2, 1.0):
        for shift in (jnp.float32(3), jnp.float32(4)):
            out = run(QUERY, KEY, VALUE, kernel=partial(kernel, factor=factor, shift=shift))
            np.testing.assert_allclose(out, QUERY * float(factor) + shift, rtol=1e-6)
    assert [(type(x), x) for x in spy] == [(int, 1), (float, 1.0), (bool, True), (int, 2)]


def test_a_sign_of_zero_that_is_bound_to_a_partial():
    def kernel(query, key, value, zero):
        return query * 0 + 1 / np.float32(zero)

    run = sharded(is_causal=False)
    with np.errstate(divide="ignore"):
        for zero in (0.0, -0.0, np.float32(-0.0), 0.0):
            out = run(QUERY, KEY, VALUE, kernel=partial(kernel, zero=zero))
            np.testing.assert_array_equal(out, 1 / np.float32(zero))


def test_a_kernel_made_in_a_loop_is_collected():
    """The kernel and the arrays in its closure are collected."""
    large = np.ones(3)
    seen = weakref.ref(large)

    def kernel(query, key, value, large=large):
        return query * float(large[0])

    kept = weakref.ref(kernel)
    sharded(is_causal=False)(QUERY, KEY, VALUE, kernel=kernel)
    gradient(sharded(is_causal=False, kernel=kernel))
    del kernel, large
    gc.collect()
    assert kept() is None
    assert seen() is None


def test_kernels_that_cannot_be_kept():
    """Kernels without a hash are called as they are."""

    class Kernel:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, query, key, value):
            return query * 2

    out = sharded(is_causal=False)(QUERY, KEY, VALUE, kernel=Kernel())
    np.testing.assert_array_equal(out, QUERY * 2)


@pytest.mark.parametrize("bound", (False, True))
def test_a_traced_array_in_a_closure_or_bound_to_a_partial(bound):
    run = sharded(is_causal=False)

    def loss(bias):
        def biased(query, key, value, bias=bias):
            return dense_attention(query, key, value, bias=bias)

        kernel = partial(biased, bias=bias) if bound else biased
        return jnp.sum(run(QUERY, KEY, VALUE, kernel=kernel) ** 2)

    bias = jnp.zeros((1, 1, 16, 16))
    jitted = jax.jit(jax.grad(loss))(bias)
    alone = jax.jit(jax.grad(lambda b: jnp.sum(dense_attention(QUERY, KEY, VALUE, bias=b) ** 2)))
    for got in (jitted, jax.grad(loss)(bias)):
        np.testing.assert_allclose(got, alone(bias), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_inside_a_callers_jit_the_same_program(kind):
    """The compiled text has four all-to-alls, and no call is left."""
    spec = jax.NamedSharding(ONE_AXIS[4].mesh(kind), MeshLayout().partition_spec)
    inputs = [jax.device_put(x, spec) for x in (QUERY, KEY, VALUE)]
    program = compiled(sharded(kind), *inputs)
    assert collectives(program) == {"all-to-all": 4}
    assert " call(" not in program


@dataclass(frozen=True)
class Scaled:
    """Kernel that compares equal to another of the same name with another factor."""

    name: str
    factor: jax.Array = field(compare=False)

    def __call__(self, query, key, value):
        return self.factor * query


def test_equal_functions_that_compute_different_things():
    one, two = (Scaled("scaled", jnp.float32(n)) for n in (1, 2))
    mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
    x = jnp.ones((1, 4, 4, 2))
    for kernel, expected in ((one, 1), (two, 2), (one, 1)):
        out = dot_product_attention(x, x, x, kernel=kernel, layout=MeshLayout(mesh=mesh))
        assert np.asarray(out)[0, 0, 0, 0] == expected
