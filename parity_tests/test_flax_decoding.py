"""Layers and decoders that decode: after any prefill, and with the bits of the training forward."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import KINDS, ONE_AXIS, slow
from decoder import Decoder, Placement
from flax import nnx
from jax.sharding import PartitionSpec
from training_in_flax import MAPPING, config_of

from jax_seqpar import (
    AllGatherKV,
    Contiguous,
    Exact,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    Ulysses,
    Zigzag,
)
from jax_seqpar.bridge import from_torch
from jax_seqpar.compare import compare_bits
from jax_seqpar.flax import Attention, ExactArithmetic
from jax_seqpar.parity.training.task import Training
from jax_seqpar.parity.training.torch_side import decoder_of
from torch_ref.exact.decoder import logits as torch_logits
from torch_ref.exact.loss import log_probabilities as torch_log_probabilities

pytestmark = pytest.mark.usefixtures("less_optimised", "unchecked_shapes")

B, S, D, N, K = 2, 24, 16, 4, 2
PROMPT, LENGTHS = 16, np.array([16, 11])
X = np.random.default_rng(0).standard_normal((B, S, D)).astype(np.float32)


def layer_of(kind: Any = KINDS[0], degree: int = 4, **options: Any) -> tuple[Attention, Any]:
    mesh = ONE_AXIS[degree].mesh(kind)
    with jax.set_mesh(mesh):
        return Attention(D, num_heads=N, num_kv_heads=K, rngs=nnx.Rngs(0), **options), mesh


def whole(**options: Any) -> np.ndarray:
    """The training forward on one device."""
    layer, mesh = layer_of(degree=1, **options)
    with jax.set_mesh(mesh):
        return np.asarray(layer(jnp.asarray(X)))


def decoded(layer: Attention, mesh: Any, **cache: Any) -> list[np.ndarray]:
    """Outputs at the positions after the prompts, which are of two lengths."""
    order, degree = layer.layout.order, mesh.shape["seq"]
    with jax.set_mesh(mesh):
        layer.init_cache(B, S, **cache)
        prompt = jax.device_put(order.reorder(X[:, :PROMPT], 1, degree), PartitionSpec(None, "seq"))
        fill = nnx.jit(lambda layer, x, lengths: layer(x, fill_cache=True, lengths=lengths))
        fill(layer, prompt, LENGTHS)
        step = nnx.jit(lambda layer, x: layer(x, decode=True))
        rows, found = np.arange(B), []
        for i in range(S - PROMPT):
            found.append(np.asarray(step(layer, X[rows, LENGTHS + i][:, None]))[:, 0])
    return found


def expected(outputs: np.ndarray) -> list[np.ndarray]:
    rows = np.arange(B)
    return [outputs[rows, LENGTHS + i] for i in range(S - PROMPT)]


PREFILLS = (
    (Ulysses(), Contiguous()),
    (Ring(), Zigzag()),
    (AllGatherKV(), Striped()),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("strategy", "order"), PREFILLS, ids=str)
def test_steps_after_a_prefill(strategy, order, kind):
    options: dict[str, Any] = {"sinks": True, "qk_norm": 1e-6}
    right = expected(whole(**options))
    for shared_by in ("sequence", "heads") if order == Zigzag() else ("sequence",):
        degree = 2 if shared_by == "heads" else 4
        where = {"strategy": strategy, "layout": MeshLayout(order=order)}
        layer, mesh = layer_of(kind, degree, **options, **where)
        found = decoded(layer, mesh, shared_by=shared_by)
        assert np.max([np.abs(a - b).max() for a, b in zip(found, right, strict=True)]) < 1e-6


@pytest.mark.parametrize("at_once", (None, 1))
def test_the_window_of_a_layer(at_once):
    """A ring buffer, and a cache of all tokens."""
    options: dict[str, Any] = {"mask": Mask(is_causal=True, local_window_size=(5, 0))}
    layer, mesh = layer_of(**options)
    found = decoded(layer, mesh, at_once=at_once)
    assert layer.cache is not None
    assert layer.cache.get_value().tokens.tokens == (24 if at_once is None else 8)
    right = expected(whole(**options))
    assert np.max([np.abs(a - b).max() for a, b in zip(found, right, strict=True)]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_steps_in_a_scan(kind):
    """A scan of one program decodes a hundred steps, and the sharding of the cache stays."""
    layer, mesh = layer_of(kind, kernel=Exact())
    x = np.random.default_rng(1).standard_normal((B, 100, D)).astype(np.float32)
    with jax.set_mesh(mesh):
        layer.init_cache(B, 100)
        graph, state = nnx.split(layer)

        def step(state: Any, x: Any) -> tuple[Any, Any]:
            layer = nnx.merge(graph, state)
            out = layer(x[:, None], decode=True)
            return nnx.state(layer), out[:, 0]

        run = jax.jit(partial(jax.lax.scan, step), donate_argnums=0)
        before = jax.tree.map(lambda x: x.sharding, state)
        state, out = run(state, jnp.swapaxes(x, 0, 1))
        after = jax.tree.map(lambda x: x.sharding, state)
        same = jax.tree.map(lambda a, b, x: a.is_equivalent_to(b, x.ndim), before, after, state)
        assert all(jax.tree.leaves(same))
    alone, one = layer_of(degree=1, kernel=Exact())
    with jax.set_mesh(one):
        right = jax.jit(lambda x: alone(x))(jnp.asarray(x))
    # Products of the layer's projections differ by the shape; the attention's bits do not.
    assert np.abs(np.swapaxes(np.asarray(out), 0, 1) - np.asarray(right)).max() < 1e-6


# ---------------------------------------------------------------- the sampler and the trainer

TRAINING = Training(
    vocabulary=64, features=32, hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8
)
WEIGHTS = {
    name.removeprefix("weight "): torch.from_numpy(x)
    for name, x in TRAINING.start().arrays.items()
    if name.startswith("weight ")
}
TOKENS = np.random.default_rng(5).integers(0, 64, (B, S)).astype(np.int32)
LABELS = np.roll(TOKENS, -1, 1)


def decoder_on(degree: int, exact: bool) -> tuple[Decoder, Any]:
    mesh = ONE_AXIS[degree].mesh(KINDS[0])
    place = Placement(arithmetic=ExactArithmetic()) if exact else Placement()
    with jax.set_mesh(mesh):
        model = Decoder(config_of(TRAINING), place, rngs=nnx.Rngs(0))
        state = nnx.state(model, nnx.Param)
        sizes = {"N": TRAINING.heads, "K": TRAINING.kv_heads}
        nnx.update(model, from_torch(WEIGHTS, MAPPING, sizes=sizes, like=state))
    return model, mesh


def trained(degree: int, exact: bool) -> np.ndarray:
    """Log-probabilities of the labels as a training step computes them."""
    model, mesh = decoder_on(degree, exact)
    arithmetic = model.place.arithmetic
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, PartitionSpec(None, "seq"))
        forward = nnx.jit(lambda model, x, y: arithmetic.log_probabilities(model(x), y))
        return np.asarray(forward(model, tokens, LABELS))


def sampled(degree: int, exact: bool) -> np.ndarray:
    """The same from a prefill of two lengths and steps of one token; NaN before."""
    model, mesh = decoder_on(degree, exact)
    arithmetic, rows = model.place.arithmetic, np.arange(B)
    found = np.full((B, S), np.nan, np.float32)
    with jax.set_mesh(mesh):
        for block in model.blocks:
            block.attention.init_cache(B, S)
        prompt = jax.device_put(TOKENS[:, :PROMPT], PartitionSpec(None, "seq"))
        fill = nnx.jit(lambda model, x, lengths: model(x, fill_cache=True, lengths=lengths))
        fill(model, prompt, LENGTHS)

        @nnx.jit
        def step(model: Any, x: Any, y: Any) -> Any:
            return arithmetic.log_probabilities(model(x, decode=True), y)

        for i in range(S - PROMPT):
            at = LENGTHS + i
            step_of = (x[rows, at][:, None] for x in (TOKENS, LABELS))
            found[rows, at] = np.asarray(step(model, *step_of))[:, 0]
    return found


@pytest.fixture(scope="module")
def sampler() -> np.ndarray:
    return sampled(4, exact=True)


@pytest.mark.parametrize("degree", (slow(1), slow(2), 8))
def test_the_sampler_is_on_the_policy_of_the_trainer(sampler, degree):
    """The sampler's log-probabilities, with a cache on four devices, are the trainer's bits."""
    taken = ~np.isnan(sampler)
    assert taken.sum() == B * (S - PROMPT)
    assert compare_bits(sampler[taken], trained(degree, exact=True)[taken]).equal


def test_and_of_the_trainer_in_pytorch(sampler):
    tokens, labels = (torch.from_numpy(x).long() for x in (TOKENS, LABELS))
    out = torch_logits(decoder_of(TRAINING), WEIGHTS, tokens)
    found = torch_log_probabilities(out, labels).numpy()
    taken = ~np.isnan(sampler)
    assert compare_bits(sampler[taken], found[taken]).equal


def test_in_float32_the_sampler_is_off_the_policy():
    """Log-probabilities without exact arithmetic differ in some bit, and by little."""
    ordinary = sampled(4, exact=False)
    taken = ~np.isnan(ordinary)
    right = trained(1, exact=False)
    assert not compare_bits(ordinary[taken], right[taken]).equal
    assert np.abs(ordinary[taken] - right[taken]).max() < 1e-4


def test_a_refused_call_leaves_the_cache_as_it_is():
    """Six queries are too many for a ring buffer of steps of two."""
    layer, mesh = layer_of(mask=Mask(is_causal=True, local_window_size=(4, 0)))
    with jax.set_mesh(mesh):
        layer.init_cache(B, 40, at_once=2, shared_by="sequence")
        assert layer.cache is not None
        layer(jnp.asarray(X[:, :8]), fill_cache=True)
        with pytest.raises(ValueError, match="6 queries at once"):
            layer(jnp.asarray(X[:, 8:14]), decode=True)
        assert layer.cache.get_value().next_position.tolist() == [8, 8]


def test_a_padded_chunk_that_fits_is_taken():
    layer, mesh = layer_of()
    with jax.set_mesh(mesh):
        layer.init_cache(B, 12)
        assert layer.cache is not None
        layer(jnp.asarray(X[:, :8]), fill_cache=True)
        layer(jnp.asarray(X[:, 8:14]), decode=True, lengths=np.array([4, 3]))
        assert layer.cache.get_value().next_position.tolist() == [12, 11]
        with pytest.raises(ValueError, match="1 tokens after 12 do not fit the cache of 12"):
            layer(jnp.asarray(X[:, :1]), decode=True)


def test_refusals():
    layer, mesh = layer_of()
    x = jnp.ones((B, 4, D))
    not_an_array: Any = [1, 1]
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"fill_cache=True needs a cache: call init_cache\(2"):
            layer(x, fill_cache=True)
        layer.init_cache(B, 8)
        for call, says in (
            (partial(layer, decode=True, fill_cache=True), "replaces it. Write one of them"),
            (partial(layer, lengths=np.array([1, 2])), "tell a cache what is padding"),
            (partial(layer, decode=True, lengths=np.ones(2)), "lengths are float64 of shape"),
            (partial(layer, fill_cache=True, lengths=np.array([5, 1])), "lengths are 0 to 5, exp"),
            (partial(layer, decode=True, lengths=np.array([-1, 1])), "lengths are -1 to 1, exp"),
            (partial(layer, decode=True, lengths=not_an_array), "lengths must be an array"),
        ):
            with pytest.raises(ValueError, match=says):
                call(x)
        layer.kernel = lambda query, key, value, **_: query
        with pytest.raises(ValueError, match="is a function, which a cache"):
            layer(x, decode=True)
