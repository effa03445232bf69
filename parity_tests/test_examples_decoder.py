"""A decoder over meshes: one loss, one gradient, the same steps, without Adam to hide a scale.

Adam divides a gradient by its own size; plain steps, clipped by the global norm, show every factor.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import KINDS, MeshCase, slow
from decoder import FSDP, FSDP_AND_TENSOR, Config, Decoder, Placement
from flax import nnx

from jax_seqpar import Blockwise, Exact, MeshLayout, Ring, Zigzag, dense_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.flax import ExactArithmetic
from jax_seqpar.plan import collectives
from jax_seqpar.plan.count import count
from jax_seqpar.training import TokenLayout

pytestmark = pytest.mark.usefixtures("less_optimised")

SIZES: Any = {
    "features": 24,
    "hidden": 40,
    "vocabulary": 31,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 6,
}
CONFIG = Config(**SIZES, layers=2, qk_norm=True)
EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(7)
TOKENS = rng.integers(1, 31, (4, 30))
SEGMENTS = np.sort(rng.integers(0, 4, (4, 30)), axis=1)
SEGMENTS[1] = 1
DATA = MeshLayout(batch="data")
ALONE: Any = (MeshCase((1, 1), ("data", "seq"), DATA), {})
PLACES: dict[str, Any] = {
    "degree 8": (MeshCase((1, 8), ("data", "seq"), DATA), {}),
    "data 2, degree 4, FSDP": (MeshCase((2, 4), ("data", "seq"), DATA), {"sharding": FSDP}),
    "data 2, degree 4, tiles, remat": (
        MeshCase((2, 4), ("data", "seq"), DATA),
        {"tiles": 3, "remat": True},
    ),
    "data 2, degree 4, a ring in zigzag": (
        MeshCase((2, 4), ("data", "seq"), replace(DATA, order=Zigzag())),
        {"strategy": Ring(), "kernel": Blockwise()},
    ),
    "data 2, degree 2, tensor 2, FSDP, tiles": (
        MeshCase((2, 2, 2), ("data", "seq", "tensor"), MeshLayout(batch="data", heads="tensor")),
        {"sharding": FSDP_AND_TENSOR, "tiles": 2},
    ),
}


class Trainer:
    """A decoder on a mesh, its batch, and steps of clipped gradient descent."""

    def __init__(self, place: Any, kind: Any, config: Config = CONFIG) -> None:
        where, options = place
        devices = jax.devices()[: np.prod(where.shape)]
        kinds = (kind,) * len(where.axes)
        self.mesh = jax.make_mesh(where.shape, where.axes, axis_types=kinds, devices=devices)
        # Dense, so that the kernel compiles fast; its numbers are asked elsewhere.
        options = {"sharding": {}, "kernel": dense_attention} | options
        placement = Placement(where.layout, **options)
        with jax.set_mesh(self.mesh):
            self.graph, self.params = nnx.split(Decoder(config, placement, rngs=nnx.Rngs(0)))
        self.batch = TokenLayout(where.layout.on(self.mesh)).shard(TOKENS, segment_ids=SEGMENTS)
        self.dropout_rng = jax.random.key(5) if config.dropout else None
        self.optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.3))
        self.update = jax.jit(self.step)
        self.gradient = jax.jit(jax.value_and_grad(self.loss))

    def loss(self, params, batch):
        return nnx.merge(self.graph, params).loss(batch, dropout_rng=self.dropout_rng)

    def step(self, grads, moments, params):
        updates, moments = self.optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    def run(self, steps, params=None):
        params = self.params if params is None else params
        losses = []
        with jax.set_mesh(self.mesh), jax.numpy_dtype_promotion("standard"):
            moments = self.optimizer.init(params)
            for _ in range(steps):
                loss, grads = self.gradient(params, self.batch)
                params, moments = self.update(grads, moments, params)
                losses.append(float(loss))
        return params, losses


def flat(params):
    return {path: np.asarray(x, np.float64) for path, x in jax.tree.leaves_with_path(params)}


@pytest.fixture(scope="module")
def alone():
    trainer = Trainer(ALONE, KINDS[0])
    with jax.set_mesh(trainer.mesh):
        loss, grads = trainer.gradient(trainer.params, trainer.batch)
    return trainer, float(loss), flat(grads), trainer.run(5)


def assert_close(got, expected, roundings):
    for path, x in expected.items():
        assert np.abs(got[path] - x).max() <= roundings * EPS * np.abs(x).max(), path


@pytest.mark.parametrize("token", (-1, SIZES["vocabulary"]))
def test_a_token_outside_of_the_vocabulary_is_seen(alone, token):
    """A token outside of the vocabulary gives NaN; JAX's lookup would take the last row."""
    trainer, *_ = alone
    tokens = jnp.full((1, 4), SIZES["vocabulary"] - 1)
    with jax.set_mesh(trainer.mesh):
        hidden = nnx.merge(trainer.graph, trainer.params).hidden
        assert np.isfinite(hidden(tokens)).all()
        assert np.isnan(hidden(tokens.at[0, 2].set(token))[0, 2]).all()


# FSDP alone is part of the last one.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (slow if n == "data 2, degree 4, FSDP" else pytest.param)(n, KINDS[i % 2])
        for i, n in enumerate(PLACES)
    ],
)
def test_loss_gradient_and_steps_are_those_of_one_device(alone, name, kind):
    trainer = Trainer(PLACES[name], kind)
    with jax.set_mesh(trainer.mesh):
        loss, grads = trainer.gradient(trainer.params, trainer.batch)
    _, expected_loss, expected_grads, (expected_params, expected_losses) = alone
    # Sums over 120 tokens in another order, through two layers: seen to be 12 units at most. A
    # missing or doubled division by a number of devices is 10^6 units.
    assert abs(float(loss) - expected_loss) <= 16 * EPS * expected_loss
    assert_close(flat(grads), expected_grads, 120)
    params, losses = trainer.run(5)
    assert np.abs(np.subtract(losses, expected_losses)).max() <= 120 * EPS * expected_loss
    assert losses[-1] < losses[0]
    assert_close(flat(params), flat(expected_params), 1200)
    for x in jax.tree.leaves(params):
        copies: dict[Any, Any] = {}
        for shard in x.addressable_shards:
            first = copies.setdefault(str(shard.index), shard.data)
            # To the last bit, after five steps: what devices have in common does not drift apart.
            assert compare_bits(np.asarray(first), np.asarray(shard.data)).equal


def test_the_untied_vocabulary_a_window_and_the_options_of_a_training():
    """Gradients with untied tables, a window and dropout, which drops the same on every mesh."""
    config = replace(CONFIG, tied=False, local_window_size=(6, 0), dropout=0.2)
    config = replace(config, label_smoothing=0.1, z_loss=1e-2)
    one = Trainer(ALONE, KINDS[0], config)
    many = Trainer(PLACES["data 2, degree 4, FSDP"], KINDS[1], config)
    results = []
    for trainer in (one, many):
        with jax.set_mesh(trainer.mesh):
            results.append(trainer.gradient(trainer.params, trainer.batch))
    assert_close(flat(results[1][1]), flat(results[0][1]), 120)
    assert any("unembedding" in str(path) for path in flat(results[0][1]))


@pytest.mark.filterwarnings("ignore:offloaded")
def test_offloading_changes_no_bit():
    """Each device writes the input of every block to the host, and reads it back."""
    where, options = PLACES["data 2, degree 4, tiles, remat"]
    results = []
    for offload in (False, True):
        trainer = Trainer((where, options | {"sharding": FSDP, "offload": offload}), KINDS[1])
        with jax.set_mesh(trainer.mesh):
            traced = trainer.gradient.trace(trainer.params, trainer.batch)
            results.append(trainer.gradient(trainer.params, trainer.batch))
        moved = count(traced.jaxpr, trainer.mesh.shape).to_host
        block = 4 * 32 * SIZES["features"] * 4 // 8  # of a device, the 30 tokens padded
        assert moved == (CONFIG.layers * block if offload else 0)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert compare_bits(np.asarray(a), np.asarray(b)).equal


def test_offloading_is_of_what_is_computed_again():
    with pytest.raises(ValueError, match=r"remat = False computes none. Write remat=True"):
        Placement(offload=True)


def test_computing_again_changes_no_bit_of_exact_arithmetic():
    """A loop over stacked blocks, on a mesh, whose dropout keys are those of blocks in turn."""
    options = {"kernel": Exact(), "arithmetic": ExactArithmetic()}
    on_mesh, _ = PLACES["data 2, degree 4, FSDP"]
    again = {"remat": True, "sharding": FSDP}
    results = []
    for where, more in ((ALONE[0], {}), (on_mesh, again)):
        config = Config(**SIZES, layers=2, dropout=0.1)
        trainer = Trainer((where, options | more), KINDS[0], config)
        with jax.set_mesh(trainer.mesh):
            results.append(trainer.gradient(trainer.params, trainer.batch))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert compare_bits(np.asarray(a), np.asarray(b)).equal


@pytest.mark.usefixtures("optimised")
def test_what_is_sent():
    """All-to-alls of attention, sums of gradients, and one gather, of the segments."""
    where, options = PLACES["degree 8"]
    trainer = Trainer((where, options), KINDS[0])
    with jax.set_mesh(trainer.mesh):
        program = trainer.gradient.lower(trainer.params, trainer.batch).compile().as_text() or ""
    counts = collectives(program)
    assert counts["all-to-all"] == 8 * CONFIG.layers
    assert set(counts) <= {"all-to-all", "all-reduce", "all-gather"}
    assert counts["all-gather"] == 1


def test_checkpoints_are_of_no_degree(tmp_path):
    """Checkpoints of degree 1 are read at degree 4, sharded, and written back with equal bits."""
    one = Trainer(ALONE, KINDS[0])
    many = Trainer(PLACES["data 2, degree 4, FSDP"], KINDS[0])
    params, _ = one.run(2)
    with ocp.StandardCheckpointer() as files:
        files.save(tmp_path / "one", params)
        files.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, many.params)
        restored = files.restore(tmp_path / "one", like)
        files.save(tmp_path / "many", restored)
        files.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, one.params)
        back = files.restore(tmp_path / "many", like)
    for a, b, c, d in zip(
        *map(jax.tree.leaves, (params, restored, back, many.params)), strict=True
    ):
        assert compare_bits(np.asarray(a), np.asarray(b)).equal
        assert compare_bits(np.asarray(a), np.asarray(c)).equal
        assert b.sharding.is_equivalent_to(d.sharding, b.ndim)
    _, losses = many.run(2, restored)
    _, expected = one.run(2, params)
    assert np.abs(np.subtract(losses, expected)).max() <= 120 * EPS * expected[0]


@pytest.mark.parametrize("name", ("degree 8", "data 2, degree 4, tiles, remat"))
def test_decoding_is_what_the_whole_sequence_gives(name):
    trainer = Trainer(PLACES[name], KINDS[0])
    with jax.set_mesh(trainer.mesh):
        model = nnx.merge(trainer.graph, trainer.params)
        tokens = jnp.asarray(TOKENS[:, :24])
        whole = nnx.jit(lambda model, t: model(t, decode=False))(model, tokens)
        for block in model.blocks:
            block.attention.init_cache(4, 24)
        step = nnx.jit(lambda model, t: model(t, decode=True))
        # A prompt that the devices do not divide, one token, the rest.
        parts = [step(model, tokens[:, a:b]) for a, b in ((0, 15), (15, 16), (16, 24))]
        for block in model.blocks:
            block.attention.init_cache(4, 24)
        fill = nnx.jit(lambda model, t: model(t, fill_cache=True))
        filled = [fill(model, tokens[:, :16]), step(model, tokens[:, 16:])]
    for made in (parts, filled):
        got = np.concatenate([np.asarray(x) for x in made], axis=1)
        assert np.abs(got - np.asarray(whole)).max() <= 64 * EPS * np.abs(np.asarray(whole)).max()


def test_sixteen_bits_and_what_is_recorded():
    seen, tokens = [], jnp.asarray(TOKENS)
    where, _ = ALONE

    def record(name, x):
        seen.append(name)

    trainer = Trainer((where, {"dtype": jnp.bfloat16}), KINDS[0])
    # Flax's own norm multiplies float32 by bfloat16.
    with jax.set_mesh(trainer.mesh), jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda params: nnx.merge(trainer.graph, params)(tokens, record=record))
        logits = run(trainer.params)
    assert logits.dtype == jnp.float32
    rounded = np.asarray(logits).astype(jnp.bfloat16).astype(np.float32)
    assert (np.asarray(logits) != rounded).any(), "rounded before the loss"
    losses = []
    for tiles in (1, 4):
        trainer = Trainer((where, {"dtype": jnp.bfloat16, "tiles": tiles}), KINDS[0])
        with jax.set_mesh(trainer.mesh), jax.numpy_dtype_promotion("standard"):
            losses.append(float(jax.jit(trainer.loss)(trainer.params, trainer.batch)))
    assert abs(losses[0] - losses[1]) < 8 * EPS * losses[0], "tiles round no logits"
    names = ("attention_norm", "query", "key", "value", "context", "attention", "mlp", "output")
    layers = [f"layers.{i}/{name}" for i in range(2) for name in names]
    assert seen == ["embedding", *layers, "norm", "logits"]
