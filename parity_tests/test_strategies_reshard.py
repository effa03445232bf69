"""Right element: each reshard alone, label by label, shapes too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import DEGREES
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from questions import RESHARDS, adjoint, compiled, reshard, right_element

from jax_seqpar.compare import compare_bits
from jax_seqpar.parity.checks.reshard import DTYPES, reshard_checks

pytestmark = pytest.mark.usefixtures("less_optimised")

both_reshards = pytest.mark.parametrize("name", RESHARDS)


@both_reshards
@pytest.mark.parametrize("degree", DEGREES)
def test_every_device_holds_what_the_oracle_says(name, degree):
    right_element(name, degree, (2, 3 * degree, 5 * degree, 7))


@both_reshards
@settings(max_examples=15)
@given(
    degree=st.sampled_from((2, 4)),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 4, 4, 3))),
)
def test_any_sizes(name, degree, sizes):
    b, s, n, h = sizes
    right_element(name, degree, (b, s * degree, n * degree, h))


@both_reshards
@pytest.mark.parametrize("degree", (2, 4))
def test_the_index_formula(name, degree):
    """The specification spelled out: out_q[b, r*s+t, j] = in_r[b, t, q*n+j], and its inverse."""
    b, s, n = 2, 3, 5
    labels = np.arange(b * s * degree * n * degree).reshape(b, s * degree, n * degree, 1)
    out = jax.jit(reshard(name, degree))(labels.astype(np.int32))
    shards = sorted(out.addressable_shards, key=lambda shard: shard.device.id)
    held = np.stack([np.asarray(shard.data) for shard in shards])
    to_heads = name == "sequence_to_heads"
    for r in range(degree):
        for q in range(degree):
            for t in range(s):
                for j in range(n):
                    label = labels[:, r * s + t, q * n + j]
                    there = held[q][:, r * s + t, j] if to_heads else held[r][:, t, q * n + j]
                    assert np.array_equal(there, label)


@both_reshards
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("degree", DEGREES)
def test_the_derivative_is_the_adjoint(name, degree, dtype):
    adjoint(name, degree, (2, 3 * degree, 5 * degree, 7), dtype)


@both_reshards
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_dtype(name, dtype):
    """Random bits, so NaNs of every payload, infinities, subnormals and -0 are among them."""
    (check,) = (c for c in reshard_checks(4, (2, 12, 20, 7)) if c.op == name)
    x = check.inputs[f"x {dtype}"]
    with jax.enable_x64(True):
        out = jax.jit(reshard(name, 4))(x)
        report = compare_bits(out, x)
    assert report.equal, str(report)


@both_reshards
@pytest.mark.parametrize("dtype", ("int4", "uint4", "float8_e3m4", "float8_e8m0fnu"))
def test_dtypes_that_only_jax_has(name, dtype):
    bits = np.random.default_rng(0).integers(0, 256, (2, 12, 20, 7), dtype=np.uint8)
    x = (bits & 7).astype(jnp.dtype(dtype)) if "int" in dtype else bits.view(jnp.dtype(dtype))
    report = compare_bits(jax.jit(reshard(name, 4))(x), x)
    assert report.equal, str(report)


def test_narrow_floats_travel_at_their_own_width():
    """XLA:CPU would widen a bfloat16 all-to-all to float32."""
    x = jnp.ones((2, 8, 8, 16), jnp.bfloat16)
    text = compiled(reshard("sequence_to_heads", 4), x)
    (line,) = (line for line in text.splitlines() if " all-to-all(" in line)
    assert "u16[" in line
    assert "f32[" not in line


@both_reshards
@pytest.mark.parametrize(
    ("dtype", "kind"), ((jnp.float32, AxisType.Auto), (jnp.bfloat16, AxisType.Explicit))
)
def test_under_every_transformation(name, kind, dtype):
    f = reshard(name, 4, kind)
    x = jax.random.normal(jax.random.key(0), (3, 8, 12, 5), dtype)
    tangent = jax.random.normal(jax.random.key(1), x.shape, dtype)
    assert compare_bits(f(x), x).equal
    out, moved = jax.jvp(jax.jit(f), (x,), (tangent,))
    assert compare_bits((out, moved), (x, tangent)).equal
    stacked = jnp.stack([x, tangent])
    assert compare_bits(jax.jit(jax.vmap(f))(stacked), stacked).equal
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda c, y: (c, jax.checkpoint(f)(y)), 0, xs)[1])
    assert compare_bits(scanned(stacked), stacked).equal

    # So few and so small that no sum rounds, in bfloat16 either.
    small = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (2, 4, 8, 3)), dtype)
    places = jnp.asarray(np.arange(small.size).reshape(small.shape) % 2, dtype)

    def squares(scale):
        return jnp.sum(places * f(scale * small) ** 2)

    second = jax.jit(jax.hessian(squares))(jnp.ones((), dtype))
    assert float(second) == 2 * np.sum(np.asarray(places * small**2, np.float64))


def test_the_two_oracles_undo_each_other():
    x = torch.arange(4 * 2 * 3 * 20 * 5).reshape(4, 2, 3, 20, 5)
    to_heads, to_sequence = (oracle for oracle, _, _ in RESHARDS.values())
    assert torch.equal(to_sequence(to_heads(x)), x)
    assert not torch.equal(to_heads(x).flatten(), x.flatten())
