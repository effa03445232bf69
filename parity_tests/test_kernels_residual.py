"""`return_residual`: the log of the sum of exp, as in `jax.nn`, on a mesh as on one device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, MeshCase
from jax.sharding import AxisType

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Dense,
    Logits,
    Mask,
    MeshLayout,
    Ulysses,
    dot_product_attention,
)

pytestmark = pytest.mark.usefixtures("less_optimised")

RNG = np.random.default_rng(0)
B, T, N, K, H = 2, 16, 6, 2, 8
Q = jnp.asarray(RNG.standard_normal((B, T, N, H)), jnp.float32)
KEY, VALUE = jnp.asarray(RNG.standard_normal((2, B, T, K, H)), jnp.float32)
GRAD = jnp.asarray(RNG.standard_normal((B, T, N)), jnp.float32)
SINKS = jnp.asarray(RNG.standard_normal(N), jnp.float32)
LENGTHS = jnp.array([0, 9], jnp.int32)  # the first sequence has no key


def truth(q: Any, k: Any) -> np.ndarray:
    """`[B, T, N]` in float64, causal, of keys within their lengths, with sinks."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    z = np.einsum("btnh,bsnh->btns", q, np.repeat(k, N // K, axis=2)) / np.sqrt(H)
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    allowed = (s <= t)[None] & (s[None] < np.asarray(LENGTHS)[:, None, None])
    z = np.where(allowed[:, :, None], z, -np.inf)
    sinks = np.broadcast_to(np.asarray(SINKS, np.float64)[None, None, :, None], (B, T, N, 1))
    return np.log(np.exp(np.concatenate([z, sinks], axis=-1)).sum(-1))


OPTIONS = {
    "mask": Mask(is_causal=True, key_value_seq_lengths=LENGTHS),
    "logits": Logits(sinks=SINKS),
}
WHERE = {
    "4": (ONE_AXIS[4], AxisType.Auto, Ulysses()),
    "8 in chunks": (ONE_AXIS[2], AxisType.Explicit, Ulysses(3, overlap=False)),
    "heads over two axes": (
        MeshCase((2, 2, 2), ("data", "seq", "tp"), MeshLayout(batch="data", heads="tp")),
        AxisType.Auto,
        Ulysses(),
    ),
    "all-gather": (ONE_AXIS[8], AxisType.Auto, AllGatherKV()),
}


@pytest.mark.parametrize("kernel", (Dense(), Blockwise(5, 7)), ids=("dense", "blockwise"))
@pytest.mark.parametrize("where", WHERE)
def test_it_is_that_of_one_device_and_has_a_gradient(where, kernel):
    mesh, kind, strategy = WHERE[where]
    sharded = partial(
        dot_product_attention,
        kernel=kernel,
        strategy=strategy,
        layout=mesh.on(kind),
        return_residual=True,
        **OPTIONS,
    )
    results = []
    for attend in (partial(kernel, return_residual=True, **OPTIONS), sharded):

        @jax.jit
        def run(q, k, v, attend=attend):
            (out, lse), pull = jax.vjp(attend, q, k, v)
            return out, lse, *pull((jnp.ones_like(out), GRAD))

        results.append(run(Q, KEY, VALUE))
    alone, got = results
    assert got[1].dtype == jnp.float32
    np.testing.assert_allclose(got[1], truth(Q, KEY), rtol=0, atol=4e-6)
    for x, y in zip(got, alone, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=64 * 2**-24 * float(jnp.abs(y).max()))
    assert "seq" in jax.tree.leaves(tuple(got[1].sharding.spec)), "sharded as the tokens"


def test_it_is_what_jax_nn_returns():
    call = partial(jax.nn.dot_product_attention, Q, KEY, VALUE, is_causal=True)
    _, theirs = call(return_residual=True)
    _, ours = Dense()(Q, KEY, VALUE, is_causal=True, return_residual=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", ("bfloat16", "float32", "float64"))
def test_of_nothing_it_is_minus_infinity(dtype):
    with jax.enable_x64(dtype == "float64"):
        q = jnp.ones((2, 8, 4, 2), dtype)
        empty = jnp.ones((2, 0, 4, 2), dtype)
        _, lse = dot_product_attention(
            q, empty, empty, layout=ONE_AXIS[4].on(), kernel=Dense(), return_residual=True
        )
    assert lse.shape == (2, 8, 4)
    assert lse.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    assert np.all(np.isneginf(lse))


def test_of_values_without_channels_it_is_refused():
    for attend in (Dense(), partial(dot_product_attention, layout=ONE_AXIS[4].on())):
        with pytest.raises(ValueError, match=r"a value without channels, \(2, 16, 2, 0\)"):
            attend(Q, KEY, VALUE[..., :0], return_residual=True)


@pytest.mark.usefixtures("optimised")
def test_without_it_nothing_more_travels():
    texts = [
        jax.jit(
            partial(
                dot_product_attention,
                kernel=Dense(),
                layout=ONE_AXIS[4].on(),
                return_residual=asked,
            )
        )
        .lower(Q, KEY, VALUE)
        .compile()
        .as_text()
        for asked in (False, True)
    ]
    assert [str(text).count(" all-to-all(") for text in texts] == [4, 5]
