"""The loss is that of one device, whatever the mesh, and so is its gradient.

Against `torch.nn.functional.cross_entropy` in float64. Named as in the reports:
https://github.com/<owner>/<repository>/issues/<number>.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import KINDS, ONE_AXIS, MeshCase
from jax.sharding import NamedSharding, PartitionSpec
from questions import compiled

from jax_seqpar import MeshLayout
from jax_seqpar.plan import collectives, temporaries
from jax_seqpar.training import IGNORE, TokenLayout, cross_entropy, map_tiles, tiled_cross_entropy

pytestmark = pytest.mark.usefixtures("less_optimised")

B, S, D, V = 4, 24, 6, 11
HALF: Any = 0.5  # of the wrong type by intent
EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(5)
HIDDEN = rng.standard_normal((B, S, D)).astype(np.float32)
KERNEL = rng.standard_normal((D, V)).astype(np.float32)
LABELS = rng.integers(0, V, (B, S))
# Uneven, and with all labels of the second of four shards ignored in every sequence.
LABELS[rng.random((B, S)) < 0.3] = IGNORE
LABELS[:, 6:12] = IGNORE
LABELS[0, 12:] = IGNORE

MESHES = [
    MeshCase((8,), ("seq",), MeshLayout()),
    MeshCase((2, 4), ("data", "seq"), MeshLayout(batch="data")),
    MeshCase((4, 2), ("data", "seq"), MeshLayout(batch="data")),
    MeshCase((2, 2, 2), ("data", "seq", "tensor"), MeshLayout(batch="data", heads="tensor")),
]
OPTIONS = {"plain": {}, "smooth": {"label_smoothing": 0.1, "z_loss": 1e-2}}


def truth(labels=LABELS, label_smoothing=0.0, z_loss=0.0):
    """Loss and gradients of hidden and kernel, in float64 by PyTorch."""
    hidden, kernel = (
        torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (HIDDEN, KERNEL)
    )
    logits, goal = (
        (hidden @ kernel).reshape(-1, V),
        torch.tensor(labels, dtype=torch.int64).reshape(-1),
    )
    loss = torch.nn.functional.cross_entropy(
        logits, goal, label_smoothing=label_smoothing, ignore_index=IGNORE
    )
    if z_loss:
        loss = loss + z_loss * (torch.logsumexp(logits[goal != IGNORE], -1) ** 2).mean()
    grads = torch.autograd.grad(loss, (hidden, kernel))
    return float(loss.detach()), *(x.numpy() for x in grads)


def assert_close(got, expected):
    """Asserts equality to the rounding of sums of at most B S V products, each exact to EPS."""
    for x, y in zip(got, expected, strict=True):
        # Seen to be 4 units of the largest at most.
        assert np.abs(np.asarray(x, np.float64) - y).max() <= 16 * EPS * np.abs(y).max()


def plain(hidden, kernel, labels, **options):
    return cross_entropy(jnp.einsum("bsd,dv->bsv", hidden, kernel), labels, **options)


@pytest.fixture(params=[(w, k) for w in MESHES for k in KINDS], ids=lambda p: f"{p[0]} {p[1].name}")
def place(request):
    where, kind = request.param
    return TokenLayout(where.on(kind))


def operands(place, labels=LABELS):
    hidden = jax.device_put(HIDDEN, place.sharding)
    kernel = jax.device_put(KERNEL, NamedSharding(place.mesh, PartitionSpec()))
    return hidden, kernel, jax.device_put(labels.astype(np.int32), place.sharding)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient_are_those_of_one_device(place, options):
    hidden, kernel, labels = operands(place)
    tiled = partial(tiled_cross_entropy, tiles=3, layout=place.layout.on(place.mesh), **options)
    for loss in (partial(plain, **options), tiled):
        value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)
        assert_close((value, *grads), truth(**options))


@pytest.mark.parametrize("tiles", (1, 2, 3, 4, 5, 6, 7, 100))
def test_any_number_of_tiles(tiles):
    place = TokenLayout(MESHES[1].on())
    hidden, kernel, labels = operands(place)
    loss = partial(tiled_cross_entropy, tiles=tiles, layout=place.layout.on(place.mesh))
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)
    assert_close((value, *grads), truth())


@pytest.mark.usefixtures("optimised")
def test_the_tiled_loss_never_holds_the_logits():
    """Memory by the compiler, and no array of all tokens and the vocabulary in the program."""
    place = TokenLayout(MESHES[1].on())
    tokens, vocabulary, width = 4 * 512, 1024, 16
    x = jax.ShapeDtypeStruct((2, tokens, width), jnp.float32, sharding=place.sharding)
    w = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    y = jax.ShapeDtypeStruct((2, tokens), jnp.int32, sharding=place.sharding)
    logits = 4 * tokens // 4 * vocabulary  # bytes of a device

    def bytes_held(loss):
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w, y).compile()
        return temporaries(program)

    tiled = partial(tiled_cross_entropy, tiles=16, layout=place.layout.on(place.mesh))
    assert bytes_held(plain) >= logits
    # Logits of a tile and their like, three at most, and the gradient of the kernel.
    assert bytes_held(tiled) <= 3 * logits / 16 + 4 * 4 * width * vocabulary


@pytest.mark.usefixtures("optimised")
def test_what_is_sent():
    """The tiled loss sends the gradient of the kernel once, and the sums; nothing for a tile."""
    place = TokenLayout(MESHES[1].on())
    loss = partial(tiled_cross_entropy, tiles=3, layout=place.layout.on(place.mesh))
    program = compiled(jax.value_and_grad(loss, (0, 1)), *operands(place))
    assert set(collectives(program)) == {"all-reduce"}
    sent = re.findall(r"= (\w+\[[\d,]*\])\S* all-reduce\(", program)
    assert [x for x in sent if not x.endswith("[]")] == [f"f32[{D},{V}]"]


@pytest.mark.parametrize("tiles", (None, 2))
def test_no_label_counts(tiles):
    """The loss is 0 and its gradient too, where a mean would be 0 / 0."""
    place = TokenLayout(MESHES[1].on())
    hidden, kernel, labels = operands(place, np.full_like(LABELS, IGNORE))
    loss = plain
    if tiles:
        loss = partial(tiled_cross_entropy, tiles=tiles, layout=place.layout.on(place.mesh))
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, kernel, labels)
    assert value == 0
    assert not any(np.asarray(g).any() for g in grads)


def test_what_does_not_count_may_be_anything():
    logits = jnp.asarray(HIDDEN @ KERNEL).at[0, 12:].set(jnp.nan).at[1, 6].set(jnp.inf)
    value, grad = jax.jit(jax.value_and_grad(cross_entropy))(logits, jnp.asarray(LABELS, jnp.int32))
    assert_close((value,), truth()[:1])
    assert np.isfinite(np.asarray(grad)).all()


@pytest.mark.parametrize("label", (-1, V, 1 << 30))
def test_a_label_outside_the_vocabulary_is_loud(label):
    labels = LABELS.astype(np.int32)
    labels[1, 3] = label
    logits, labels = jnp.asarray(HIDDEN @ KERNEL), jnp.asarray(labels)
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, labels)
    assert np.isnan(loss)
    # An optimiser that looks at the gradient alone must see it, too: in that token's row.
    rows = np.isnan(gradient).all(-1)
    assert rows.sum() == 1
    assert rows[1, 3]


def test_a_label_of_more_bits_is_loud():
    """Labels beyond 32 bits give NaN: cut to 32 bits, 2^32 - 100 would be -100, and be ignored."""
    logits = jnp.zeros((2, 4))
    assert np.isnan(cross_entropy(logits, jnp.asarray([1, 2**32 - 100], jnp.uint32)))
    with jax.enable_x64(True):
        for label in (2**32 - 100, -(2**32), 2**32 + 1):
            assert np.isnan(cross_entropy(logits, jnp.asarray([1, label], jnp.int64)))
        labels = jnp.asarray([1, IGNORE], jnp.int64)
        assert abs(float(cross_entropy(logits, labels)) - np.log(4)) < 1e-6


@pytest.mark.parametrize("dtype", (jnp.uint8, jnp.int8, jnp.uint32))
def test_narrow_labels_are_numbers(dtype):
    """Labels in uint8 are compared as numbers: -100 would be 156, and a vocabulary of 256 be 0."""
    logits = jnp.asarray(rng.standard_normal((3, 300)), jnp.float32)
    labels = jnp.asarray([100, 2, 3], dtype)
    assert cross_entropy(logits, labels) == cross_entropy(logits, labels.astype(jnp.int32))
    if dtype == jnp.uint8:
        labels = jnp.asarray([156, 2, 3], dtype)
        assert cross_entropy(logits, labels) == cross_entropy(logits, labels.astype(jnp.int32))
        assert np.isfinite(cross_entropy(logits[:, :256], labels))


def test_another_index_to_ignore():
    labels = jnp.asarray(np.where(LABELS == IGNORE, 0, LABELS), jnp.int32)
    got = cross_entropy(jnp.asarray(HIDDEN @ KERNEL), labels, ignore_index=0)
    goal = torch.tensor(np.asarray(labels), dtype=torch.int64).reshape(-1)
    logits = torch.tensor(HIDDEN @ KERNEL, dtype=torch.float64).reshape(-1, V)
    assert_close((got,), (float(torch.nn.functional.cross_entropy(logits, goal, ignore_index=0)),))


def test_large_logits_in_sixteen_bits():
    logits = jnp.asarray(300 * HIDDEN @ KERNEL, jnp.bfloat16)
    got = cross_entropy(logits, jnp.asarray(LABELS, jnp.int32))
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits, np.float64)).reshape(-1, V),
        torch.tensor(LABELS).reshape(-1),
        ignore_index=IGNORE,
    )
    assert got.dtype == jnp.float32
    assert_close((got,), (float(expected),))


def test_large_logits_of_tiles_in_sixteen_bits():
    """Products of 16-bit operands are not rounded to 16 bits."""
    place = TokenLayout(MESHES[1].on())
    hidden, kernel, labels = operands(place)
    hidden, kernel = (100 * hidden).astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    got = tiled_cross_entropy(hidden, kernel, labels, tiles=2, layout=place.layout.on(place.mesh))
    x, y = (torch.tensor(np.asarray(z, np.float64)) for z in (hidden, kernel))
    expected = torch.nn.functional.cross_entropy(
        (x @ y).reshape(-1, V), torch.tensor(LABELS).reshape(-1), ignore_index=IGNORE
    )
    assert_close((got,), (float(expected),))


def test_the_soft_cap_of_the_logits():
    place = TokenLayout(MESHES[1].on())
    hidden, kernel, labels = operands(place)
    got = tiled_cross_entropy(
        hidden, kernel, labels, tiles=2, layout=place.layout.on(place.mesh), logits_soft_cap=2.0
    )
    logits = torch.tensor(HIDDEN, dtype=torch.float64) @ torch.tensor(KERNEL, dtype=torch.float64)
    capped = 2 * torch.tanh(logits / 2).reshape(-1, V)
    goal = torch.tensor(LABELS).reshape(-1)
    expected = torch.nn.functional.cross_entropy(capped, goal, ignore_index=IGNORE)
    assert_close((got,), (float(expected),))


# Reports about the scale of loss and gradient.


def mapped(place, loss):
    """A trainer of one's own: loss and gradient inside a `jax.shard_map`."""
    spec = place.sharding.spec

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=place.mesh,
        in_specs=(spec, PartitionSpec(), spec),
        out_specs=(PartitionSpec(), (spec, PartitionSpec())),
    )
    def step(hidden, kernel, labels):
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel, labels)

    return step(*operands(place))


def test_gradients_are_scaled_by_the_degree():
    """DeepSpeed 5248: the gradient is that of one device, also inside one's own shard_map."""
    for where in MESHES[:3]:
        place = TokenLayout(where.on())
        axes = tuple(where.axes)
        value, grads = mapped(place, partial(plain, axis_name=axes))
        assert_close((value, *grads), truth())


def test_the_loss_is_a_mean_of_means():
    """DeepSpeed 5419: with labels masked unevenly that is another number, and NaN here."""
    place = TokenLayout(MESHES[1].on())

    def mean_of_means(hidden, kernel, labels):
        logits = jnp.einsum("bsd,dv->bsv", hidden, kernel)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
        counts = (labels != IGNORE).astype(jnp.float32)
        mean = jnp.where(labels != IGNORE, losses, 0).sum() / counts.sum()
        return jax.lax.pmean(mean, ("data", "seq"))

    wrong, _ = mapped(place, mean_of_means)
    assert np.isnan(wrong)
    right, grads = mapped(place, partial(plain, axis_name=("data", "seq")))
    assert_close((right, *grads), truth())


def test_labels_shifted_after_sharding():
    """DeepSpeed 6841: the last token of each shard then predicts nothing, or the wrong token."""
    place = TokenLayout(MESHES[1].on())
    tokens = rng.integers(0, V, (B, S))
    labels = np.asarray(place.shard(tokens).labels)
    assert np.array_equal(labels[:, :-1], tokens[:, 1:])
    assert (labels[:, -1] == IGNORE).all()
    by_shard = tokens.reshape(B, 4, S // 4)
    wrong = np.full_like(by_shard, IGNORE)
    wrong[:, :, :-1] = by_shard[:, :, 1:]
    assert abs(truth(wrong.reshape(B, S))[0] - truth(labels)[0]) > 1e-3


def test_micro_batches_are_not_averaged_by_their_number():
    """verl 2857: with the normaliser of the whole batch the parts add up, gradient included."""
    logits = jnp.asarray(HIDDEN @ KERNEL)
    labels = jnp.asarray(LABELS, jnp.int32)
    count = (labels != IGNORE).sum()
    parts = [
        jax.value_and_grad(plain, (0, 1))(
            jnp.asarray(HIDDEN[i : i + 1]), jnp.asarray(KERNEL), labels[i : i + 1], normaliser=count
        )
        for i in range(B)
    ]
    value, kernel = sum(v for v, _ in parts), sum(g[1] for _, g in parts)
    hidden = np.concatenate([np.asarray(g[0]) for _, g in parts])
    assert_close((value, hidden, kernel), truth())
    mean_of_means = np.mean([cross_entropy(logits[i], labels[i]) for i in range(B)])
    assert abs(mean_of_means - truth()[0]) > 1e-2


# Tiles of anything else.


def mlp(w, x):
    return jnp.einsum("bsf,fd->bsd", jax.nn.silu(jnp.einsum("bsd,df->bsf", x, w["up"])), w["down"])


@pytest.mark.parametrize("tiles", (1, 4, 5))
def test_a_tiled_mlp(place, tiles):
    w = {"up": KERNEL, "down": KERNEL.T}
    w = jax.device_put(w, NamedSharding(place.mesh, PartitionSpec()))
    x = jax.device_put(HIDDEN, place.sharding)

    def loss(f, w, x):
        return (f(w, x) ** 2).sum()

    tiled = partial(map_tiles, mlp, tiles=tiles, layout=place.layout.on(place.mesh))
    got = jax.jit(jax.grad(partial(loss, tiled), (0, 1)))(w, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), (w, x))
        expected = jax.grad(partial(loss, mlp), (0, 1))(*wide)
    assert_close(jax.tree.leaves(got), [np.asarray(x) for x in jax.tree.leaves(expected)])


def test_no_tile_is_wrong_for_being_made_up():
    """A function that is not finite at 0 keeps its gradient finite."""
    mesh = MESHES[0].mesh()
    x = jnp.asarray(HIDDEN)

    def norm(scale, x):
        return scale * x / jnp.sqrt((x**2).sum(-1, keepdims=True))

    grad = jax.jit(
        jax.grad(
            lambda s, x: map_tiles(norm, s, x, tiles=2, layout=MeshLayout(mesh=mesh)).sum(), (0, 1)
        )
    )
    assert all(np.isfinite(np.asarray(g)).all() for g in grad(jnp.float32(2), x))


@pytest.mark.parametrize("tiled", ("map_tiles", "tiled_cross_entropy"))
def test_gradients_of_tiles_add_up_in_float32(tiled):
    """512 tiles in bfloat16 that have one gradient: a sum in bfloat16 would stop at 256."""
    tokens = 1024
    mesh = ONE_AXIS[2].mesh()
    x = jnp.ones((1, tokens, 1), jnp.bfloat16)

    def by_map(kernel):
        def product(kernel, x):
            return x * kernel.astype(x.dtype)[None, None]

        return (
            map_tiles(product, kernel[0, :1], x, tiles=512, layout=MeshLayout(mesh=mesh))
            .astype(jnp.float32)
            .sum()
        )

    def by_loss(kernel):
        labels = jnp.zeros((1, tokens), jnp.int32)
        return tiled_cross_entropy(
            x, kernel, labels, tiles=512, normaliser=jnp.int32(1), layout=MeshLayout(mesh=mesh)
        )

    kernel = jnp.zeros((1, 2), jnp.float32)
    gradient = jax.jit(jax.grad(by_map if tiled == "map_tiles" else by_loss))(kernel)
    # Of two equal logits, the label's has the probability 1/2 too little.
    expected = [tokens, 0] if tiled == "map_tiles" else [-tokens / 2, tokens / 2]
    assert gradient.dtype == jnp.float32
    assert gradient[0].tolist() == expected


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: cross_entropy(jnp.ones((2, 3, V)), jnp.ones((2, 2), jnp.int32)), "do not cut log"),
        (lambda: cross_entropy(jnp.ones((2, 3, V)), jnp.ones((2, 3))), "not probabilities"),
        (
            lambda: cross_entropy(jnp.ones((2, V)), jnp.ones(2, jnp.int32), normaliser=HALF),
            "normaliser must be one integer",
        ),
        (
            lambda: cross_entropy(jnp.ones((2, V)), jnp.ones(2, jnp.int32), label_smoothing=2.0),
            "label_smoothing must be from 0 to 1",
        ),
        *(
            (
                lambda z_loss=z_loss: cross_entropy(
                    jnp.ones((2, V)), jnp.ones(2, jnp.int32), z_loss=z_loss
                ),
                "z_loss must be from 0 to",
            )
            for z_loss in (-1.0, float("inf"), float("nan"))
        ),
        (
            lambda: tiled_cross_entropy(
                jnp.ones((2, 8, D)), jnp.ones((V, D)), jnp.ones((2, 8), jnp.int32), tiles=2
            ),
            r"embedding\.T",
        ),
        (
            lambda: tiled_cross_entropy(
                jnp.ones((2, 8, D)),
                jnp.ones((D, V)),
                jnp.ones((2, 8), jnp.int32),
                tiles=2,
                logits_soft_cap=0.0,
            ),
            "logits_soft_cap must be a Python number.*None, and not 0",
        ),
        (lambda: cross_entropy(jnp.ones((1, V)), [0]), r"labels must be an array of JAX or"),  # pyright: ignore
        (lambda: cross_entropy([[0.0]], jnp.zeros(1, int)), r"logits must be an array of JAX"),  # pyright: ignore
        (lambda: map_tiles(mlp, {}, jnp.ones((2, 8)), tiles=0), "tiles must be a positive integer"),
        (
            lambda: map_tiles(mlp, {}, jnp.ones((2, 8)), jnp.ones((2, 4)), tiles=2),
            "of the same tokens",
        ),
        (
            lambda: map_tiles(mlp, {}, jnp.ones((2, 9)), tiles=2, layout=MESHES[0].on()),
            "S = 9 is not divisible by the 8 devices",
        ),
        (
            lambda: map_tiles(
                mlp, {}, jnp.ones((2, 8)), tiles=2, layout=MeshLayout("x").on(MESHES[0].mesh())
            ),
            "names axis 'x'",
        ),
    ),
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_axis_whose_devices_have_the_same_tokens():
    """An axis with the same tokens on its devices raises: each token would count twice."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec(None, "seq")

    @jax.shard_map(mesh=mesh, in_specs=(spec, spec), out_specs=jax.sharding.PartitionSpec())
    def loss(logits, labels):
        return cross_entropy(logits, labels, normaliser=16, axis_name=("data", "seq"))

    with pytest.raises(ValueError, match=r"axis_name has 'data', .* over \['seq'\]. Name the"):
        loss(jnp.zeros((2, 8, V)), jnp.zeros((2, 8), jnp.int32))


def test_axes_whose_devices_all_have_the_same_tokens():
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.PartitionSpec()

    @jax.shard_map(mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    def loss(logits, labels):
        return cross_entropy(logits, labels, normaliser=16, axis_name="seq")

    with pytest.raises(ValueError, match=r"axis_name has 'seq', .* over no axis. Name the"):
        loss(jnp.zeros((2, 8, V)), jnp.zeros((2, 8), jnp.int32))
