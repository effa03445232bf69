"""Right value and right gradient: the whole pipeline against the float64 oracle."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, FEWER_ON_MESHES, MESHES, ONE_AXIS, slow
from features import as_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from questions import QUICK, attend, error, oracle, output_and_gradients, right_values

from jax_seqpar import (
    Blockwise,
    Dense,
    FunctionKernel,
    MeshLayout,
    Ulysses,
    dense_attention,
    dot_product_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.parity.inputs import Case
from torch_ref.dense import dense_attention as torch_dense_attention

both_kinds = pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))


# Every case where devices share KV heads and where they do not. On few devices the three ways for
# KV heads to lie: their own, divided, and shared.
FEW_DEVICES = ("grouped", "fewer KV heads than devices", "multi-query")
BY_DEGREE = (
    *((name, 4) for name in CASES),
    *((name, 8) if name in FEW_DEVICES else slow(name, 8) for name in CASES),
    *(slow(name, degree) for name in FEW_DEVICES for degree in (1, 2)),
)


@pytest.mark.parametrize(("name", "degree"), BY_DEGREE)
def test_output_and_gradients_by_degree(name, degree):
    right_values(CASES[name], ONE_AXIS[degree])


@pytest.mark.parametrize(("case", "where", "kind"), FEWER_ON_MESHES, ids=str)
def test_output_and_gradients_by_mesh(case, where, kind):
    right_values(case, where, kind)


@pytest.mark.slow  # sizes of every kind are in the table of pairs
@settings(max_examples=4)
@given(
    degree=st.sampled_from((2, 4)),
    groups=st.integers(1, 3),
    kv_heads=st.sampled_from((1, 2, 4)),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 5, 6))),
    is_causal=st.booleans(),
)
def test_any_sizes(degree, groups, kv_heads, sizes, is_causal):
    batch, tokens, head_dim = sizes
    case = Case(batch, tokens * degree, 4 * groups, kv_heads, head_dim, is_causal=is_causal)
    right_values(case, ONE_AXIS[degree])


def assert_near(ours, expected):
    """Float32 attention: 16 units in the last place of the largest entry, seen to be 2 at most."""
    for got, truth in zip(ours, expected, strict=True):
        assert error(got, truth) <= 16 * np.finfo(np.float32).eps * np.max(np.abs(truth))


MASK_CASE = Case(batch=4, tokens=24, heads=16, kv_heads=8, head_dim=6)
options_of_masks = {
    "scale": {"scale": 0.3},
    "window": {"local_window_size": (5, 0)},
    "symmetric window": {"local_window_size": 3},
    "bias": {"bias": (4, 16, 24, 24)},
    "bias of one head": {"bias": (1, 1, 24, 24)},
    "bias of each head": {"bias": (1, 16, 1, 24)},
    "mask": {"mask": (4, 16, 24, 24)},
    "mask of each entry": {"mask": (4, 1, 1, 24)},
    "all of them": {"mask": (4, 1, 24, 24), "bias": (1, 16, 24, 1), "local_window_size": (9, 2)},
}


# All of them where heads are sharded twice. Elsewhere one of each size along batch and heads.
MASKS_ON_MESHES = (
    *((name, MESHES[4], AxisType.Explicit) for name in options_of_masks),
    *(
        slow(name, MESHES[0], AxisType.Auto)
        for name in ("bias", "bias of each head", "mask of each entry", "all of them")
    ),
    *(
        (name, MESHES[7], AxisType.Explicit)
        for name in ("mask", "bias of each head", "all of them")
    ),
)


@pytest.mark.parametrize(("name", "where", "kind"), MASKS_ON_MESHES, ids=str)
def test_masks_and_biases_reach_the_right_heads(name, where, kind):
    rng, options = np.random.default_rng(1), options_of_masks[name]
    case = MASK_CASE if where.layout.tokens else Case(8, 24, 16, 8, 6)
    make = {
        "bias": lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
        "mask": lambda shape: jnp.asarray(rng.random(shape) < 0.7),
    }

    def batched(shape):
        return (case.batch if shape[0] > 1 else 1, *shape[1:])

    made = {n: make[n](batched(x)) if n in make else x for n, x in options.items()}
    ours = output_and_gradients(attend(case, where, kind, **made), QUICK)(**case.inputs())
    assert_near(ours, oracle(case, case.inputs(), **as_torch(made)))


@both_kinds
def test_lengths_are_padding(kind):
    where, case = MESHES[2], Case(batch=4, tokens=24, heads=8, kv_heads=4, head_dim=6)
    lengths = jnp.array([24, 7, 1, 0])
    inputs = case.inputs()
    function = attend(case, where, kind, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    ours = output_and_gradients(function, QUICK)(**inputs)
    valid = torch.arange(24) < numpy_to_torch(np.asarray(lengths))[:, None]
    mask = valid[:, None, :, None] & valid[:, None, None, :]
    assert_near(ours, oracle(case, inputs, mask=mask))
    assert not np.any(np.asarray(ours[0])[3]), "a query without a key gives 0"
    assert all(np.isfinite(np.asarray(x)).all() for x in ours)


def test_the_gradient_of_a_bias():
    case, where = MASK_CASE, MESHES[4]
    query, key, value, grad = map(jnp.asarray, case.inputs().values())
    bias = np.random.default_rng(2).standard_normal((1, 16, 24, 24)).astype(np.float32)

    def loss(bias):
        return jnp.vdot(attend(case, where, bias=bias)(query, key, value), grad)

    leaf = numpy_to_torch(bias).double().requires_grad_()
    out = torch_dense_attention(
        *map(numpy_to_torch, list(case.inputs().values())[:3]), is_causal=True, bias=leaf
    )
    (expected,) = torch.autograd.grad(out, leaf, numpy_to_torch(np.asarray(grad)).double())
    assert_near([jax.jit(jax.grad(loss))(jnp.asarray(bias))], [expected.numpy()])


@both_kinds
@pytest.mark.parametrize("tokens", ((8, 40), (40, 8)), ids=str)
@pytest.mark.parametrize("is_causal", (True, False))
def test_cross_attention(kind, tokens, is_causal):
    """Causal with T != S: both count from 0, the diagonal starts top left."""
    T, S = tokens
    case = Case(2, S, 16, 8, 6, is_causal=is_causal)
    inputs = case.inputs()
    inputs["query"], inputs["grad"] = (
        np.random.default_rng(3).standard_normal((2, 2, T, 16, 6)).astype(np.float32)
    )
    ours = output_and_gradients(attend(case, ONE_AXIS[4], kind), QUICK)(**inputs)
    assert_near(ours, oracle(case, inputs))


TRANSFORMED = Case(2, 16, 8, 4, 6)


def transformations():
    """Transformations by name, each as a function of the attention alone."""
    query, key, value, tangent = (jnp.asarray(x) for x in TRANSFORMED.inputs().values())

    def jvp(f):
        return jax.jvp(lambda q: f(q, key, value), (query,), (tangent,))

    def vmapped(f):
        stacked = [jnp.stack([x, -x, 2 * x]) for x in (query, key, value)]
        return jax.vmap(f)(*stacked)

    def scanned(f):
        layer = jax.checkpoint(lambda x, _: (f(x, key, value) + x, None))
        return jax.grad(lambda x: jnp.sum(jax.lax.scan(layer, x, length=3)[0] ** 2))(query)

    def second(f):
        def loss(q):
            return jnp.sum(f(q, key, value) ** 2)

        return jax.jvp(jax.grad(loss), (query,), (tangent,))[1]

    return {f.__name__: f for f in (jvp, vmapped, scanned, second)}


@cache
def transformed_on_one_device():
    """Transformed attentions on one device, in one program, to compare both kinds of axes with."""
    alone = partial(dense_attention, is_causal=True)

    def run():
        return {name: transformed(alone) for name, transformed in transformations().items()}

    return jax.jit(run, compiler_options=QUICK)()


@both_kinds
def test_under_every_transformation(kind):
    """jit of vmap, jvp, remat, scan and second derivatives, against one device in float32."""
    sharded = attend(TRANSFORMED, MESHES[2], kind)
    either_mode = partial(sharded, kernel=Blockwise(forward_mode=True))
    for name, transformed in transformations().items():
        ours = partial(transformed, either_mode if name == "jvp" else sharded)
        got = jax.jit(ours, compiler_options=QUICK)()
        expected = transformed_on_one_device()[name]
        # The same float32 arithmetic in another program: XLA may fuse it otherwise.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.max(jnp.abs(b))), rtol=0)


@both_kinds
def test_the_mesh_is_found(kind):
    """The mesh is given, from `jax.set_mesh`, or from the sharding of the query: the same bits."""
    case, where = Case(2, 16, 8, 4, 6), ONE_AXIS[4]
    mesh = where.mesh(kind)
    given = attend(case, where, kind, kernel=dense_attention)
    found = partial(dot_product_attention, is_causal=True, kernel=dense_attention)
    query, key, value, _ = map(jnp.asarray, case.inputs().values())
    sharding = jax.sharding.NamedSharding(mesh, where.layout.partition_spec)
    placed = [jax.device_put(x, sharding) for x in (query, key, value)]
    expected = jax.jit(given)(query, key, value)
    assert compare_bits(jax.jit(found)(*placed), expected).equal
    with jax.set_mesh(mesh):
        assert compare_bits(jax.jit(found)(query, key, value), expected).equal
        eager = found(*placed)
    assert compare_bits(found(*placed), eager).equal
    assert eager.sharding.is_equivalent_to(sharding, 4)


def test_inside_a_shard_map_over_other_axes():
    """Inference in a pipeline over "stage", say: manual axes nest, forward only."""
    mesh = jax.make_mesh((2, 4), ("stage", "seq"), axis_types=(AxisType.Auto,) * 2)
    case = Case(2, 16, 8, 4, 6)
    query, key, value, _ = case.inputs().values()
    spec = jax.sharding.PartitionSpec("stage")
    nested = jax.shard_map(
        partial(dot_product_attention, is_causal=True),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={"stage"},
    )
    with jax.set_mesh(mesh):
        out = jax.jit(nested)(query, key, value)
    assert_near([out], oracle(case, case.inputs())[:1])


def test_the_local_attention_is_a_function():
    """The kernel may be any attention of one device, JAX's or one that needs `check_vma=False`."""
    case, where = Case(2, 16, 8, 4, 6), ONE_AXIS[4]
    for check_vma in (True, False):
        kernel = FunctionKernel(jax.nn.dot_product_attention, check_vma)
        function = attend(case, where, kernel=kernel)
        assert_near(
            output_and_gradients(function, QUICK)(**case.inputs()), oracle(case, case.inputs())
        )


def test_arrays_without_a_sequence_axis():
    layout = MeshLayout(tokens=None)
    assert str(layout) == "[B, S, N, H]"
    case, where = Case(2, 15, 7, 7, 6), MESHES[2]
    function = partial(dot_product_attention, is_causal=True, layout=layout.on(where.mesh()))
    assert_near(output_and_gradients(function, QUICK)(**case.inputs()), oracle(case, case.inputs()))


@pytest.mark.parametrize("size", (0, 1))
def test_very_few_tokens(size):
    """Attention without keys gives 0, to one token its value."""
    case = Case(2, size, 8, 4, 6)
    query, key, value, _ = map(jnp.asarray, case.inputs().values())
    out = attend(case, ONE_AXIS[1])(query, key, value)
    assert out.shape == query.shape
    assert compare_bits(out, jnp.repeat(value, 2, axis=2)).equal


# Every two of them meet.
UNDER_VMAP = (
    (AxisType.Auto, Dense(), Ulysses()),
    (AxisType.Auto, Blockwise(query_chunk=2), Ulysses(2, overlap=False)),
    (AxisType.Explicit, Dense(), Ulysses(2, overlap=False)),
    (AxisType.Explicit, Blockwise(query_chunk=2), Ulysses()),
)


@pytest.mark.parametrize(("kind", "kernel", "strategy"), UNDER_VMAP, ids=str)
def test_vmap_over_a_sharded_axis(kind, kernel, strategy):
    """Output and gradients are those of `jax.nn` without a mesh."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind, kind))
    layout = MeshLayout(mesh=mesh, check_vma=False)
    rng = np.random.default_rng(5)
    shapes = ((2, 1, 8, 8, 4), (2, 1, 8, 2, 4), (2, 1, 8, 2, 4))
    operands = [rng.standard_normal(shape, np.float32) for shape in shapes]

    def loss(attend, operands):
        return (jax.vmap(attend, spmd_axis_name="data")(*operands) ** 2).sum()

    ours = partial(
        dot_product_attention, is_causal=True, kernel=kernel, strategy=strategy, layout=layout
    )
    theirs = partial(jax.nn.dot_product_attention, is_causal=True)
    spec = jax.sharding.PartitionSpec("data", None, "seq")
    sharded = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in operands]
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(partial(loss, ours)))(sharded)
    expected = jax.jit(jax.value_and_grad(partial(loss, theirs)))(operands)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (
            np.abs(np.asarray(a) - np.asarray(b)).max()
            < 64 * np.finfo(np.float32).eps * np.abs(b).max()
        )
