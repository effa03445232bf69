"""Channels far larger than the others: powers of two outside give exact attention its accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow
from exact_cases import NAMES, jax_exact, torch_exact
from torch.nn.functional import scaled_dot_product_attention

from jax_seqpar import exact_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.exact.channel_scaling import channel_scales
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from jax_seqpar.parity.inputs import Case

pytestmark = pytest.mark.usefixtures("less_optimised")

CASE = Case(batch=1, tokens=192, heads=4, kv_heads=2, head_dim=32)
# The power of the channel in each operand.
KINDS = {
    "value": {("value", 3): 1},
    "key": {("key", 3): 1, ("query", 3): -1},
    "query, key": {("query", 3): 1, ("key", 5): 1},
}


def draw(kind, times, seed):
    rng = np.random.default_rng(seed)
    inputs = {name: rng.standard_normal(x.shape) for name, x in CASE.inputs().items()}
    for (name, channel), power in KINDS[kind].items():
        inputs[name][..., channel] *= float(times) ** power
    return {name: x.astype(np.float32) for name, x in inputs.items()}


def scales_of(inputs):
    return channel_scales(*(jnp.asarray(inputs[name]) for name in INPUT_NAMES[:3]))


def scaled(attend, inputs, scales):
    """Output and gradients of the scaled operands, as the chain rule has them."""
    query, key, value, out = map(np.asarray, scales)
    factors = dict(zip(INPUT_NAMES, (query, key, value, out), strict=True))
    got = attend({name: x * factors[name] for name, x in inputs.items()}, is_causal=True)
    return {n: got[n] * x for n, x in zip(NAMES, (out, query, key, value), strict=True)}


def by_torch(inputs, dtype):
    """A float32 kernel, and float64."""
    query, key, value, grad = (numpy_to_torch(x).to(dtype) for x in inputs.values())
    leaves = [x.requires_grad_() for x in (query, key, value)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    results = (out.detach(), *torch.autograd.grad(out, leaves, grad))
    return dict(zip(NAMES, (x.numpy() for x in results), strict=True))


def errors(got, truth, kind):
    """Root mean square of the channels that are large in no operand."""
    large = [channel for _, channel in KINDS[kind]]
    parts = {n: np.delete(got[n].astype(np.float64) - truth[n], large, axis=3) for n in NAMES}
    return {n: np.sqrt(np.mean(x**2)) for n, x in parts.items()}


@pytest.mark.parametrize(
    ("kind", "times"),
    (
        *(("value", 100_000), ("key", 100_000), ("query, key", 10_000)),
        *(slow("value", 10_000), slow("key", 10_000), slow("query, key", 100_000)),
        *(slow(kind, 1_000) for kind in KINDS),
    ),
)
def test_scales_restore_the_accuracy(kind, times):
    """PyTorch's results, which have the bits of JAX, are accurate with scales of other inputs."""
    inputs = draw(kind, times, 0)
    truth, plain = by_torch(inputs, torch.float64), by_torch(inputs, torch.float32)
    float32 = errors(plain, truth, kind)
    ours = errors(scaled(torch_exact, inputs, scales_of(draw(kind, times, 1))), truth, kind)
    assert all(0 < ours[n] < 0.75 * float32[n] for n in NAMES), (ours, float32)
    if times == 100_000 and kind != "query, key":  # whose rows have nearly one key each
        without = errors(torch_exact(inputs, is_causal=True), truth, kind)
        assert max(without[n] / float32[n] for n in NAMES) > 5


def test_the_derivative_of_the_recipe():
    """JAX's derivative of the scaling equals the chain rule: products by powers of two."""
    inputs = draw("value", 1e4, 0)
    scales = scales_of(inputs)

    @jax.jit
    def run(query, key, value, grad):
        def attend(query, key, value):
            operands = query * scales.query, key * scales.key, value * scales.value
            return exact_attention(*operands, is_causal=True) * scales.out

        out, pull = jax.vjp(attend, query, key, value)
        return (out, *pull(grad))

    ours = dict(zip(NAMES, map(np.asarray, run(**inputs)), strict=True))
    report = compare_bits(ours, scaled(torch_exact, inputs, scales))
    assert report.equal, str(report)


def test_the_scales_are_constants():
    """Powers of two, whose products are 1; also of channels of zeros, NaN and infinity."""
    inputs = draw("value", 1e5, 2)
    inputs["query"][..., 0] = 0
    inputs["key"][..., 1] = np.inf
    inputs["value"][..., 2] = np.nan
    assert all(x.shape[:2] == (1, 1) for x in scales_of(inputs))
    query, key, value, out = (np.asarray(x)[0, 0] for x in scales_of(inputs))
    shapes = ((CASE.heads, 32), (CASE.kv_heads, 32), (CASE.kv_heads, 32), (CASE.heads, 32))
    assert tuple(x.shape for x in (query, key, value, out)) == shapes
    for x in (query, key, value, out):
        assert np.all(np.frexp(x)[0] == 0.5)
    assert np.all(query * np.repeat(key, 2, 0) == 1)
    assert np.all(out * np.repeat(value, 2, 0) == 1)
    assert np.all(query[:, :2] == 1)
    assert np.all(value[:, 2] == 1)
    assert np.all(out[:, 3] > 100)


def test_causality_stays():
    inputs = draw("value", 1e4, 3)
    scales = scales_of(inputs)
    later = {name: x.copy() for name, x in inputs.items()}
    for x in later.values():
        x[:, 100:] *= 1e9
    before, after = (scaled(jax_exact, x, scales)["forward"][:, :100] for x in (inputs, later))
    assert compare_bits(before, after).equal
    # Scales of a batch would not be constants of it.
    assert not compare_bits(scales.value, scales_of(later).value).equal
