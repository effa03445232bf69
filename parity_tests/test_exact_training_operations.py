"""Operations of exact training in JAX, against IEEE arithmetic, PyTorch and planted bugs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import special

from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import (
    activation,
    clip,
    dropout,
    elementary,
    embedding,
    linear,
    loss,
    norm,
    normal,
    optimizer,
    rotary,
    rounding,
    tiled_loss,
)
from jax_seqpar.exact import matmul as matmul_module
from jax_seqpar.exact.accumulation import accumulated_value_and_grad
from jax_seqpar.exact.engines import int8_products
from jax_seqpar.exact.fixed_point import exponents
from jax_seqpar.exact.narrow import narrow
from jax_seqpar.mask import head_keys
from torch_ref.exact import activation as torch_activation
from torch_ref.exact import dropout as torch_dropout
from torch_ref.exact import elementary as torch_elementary
from torch_ref.exact import embedding as torch_embedding
from torch_ref.exact import linear as torch_linear
from torch_ref.exact import loss as torch_loss
from torch_ref.exact import norm as torch_norm
from torch_ref.exact import normal as torch_normal
from torch_ref.exact import rotary as torch_rotary

pytestmark = pytest.mark.usefixtures("less_optimised")

TAU, INF, NAN = 2 * np.pi, float("inf"), float("nan")
B, S, D, F, V = 2, 64, 32, 48, 16


def wild(seed: int, *shape: int) -> np.ndarray:
    """Float32 of magnitudes 2^-20 to 2^20, with zeros, -0 and subnormals among them."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(shape) * 2.0 ** rng.integers(-20, 20, shape)).astype(np.float32)
    flat = x.reshape(-1)
    flat[::17], flat[1::170] = 0, -0.0
    flat[2::31] *= np.float32(2.0**-110)
    return x


def flushed(x: np.ndarray) -> np.ndarray:
    """x with subnormals and -0 as +0."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.float32(0), x)


BINARY: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "add": (rounding.add, np.add),
    "subtract": (rounding.subtract, np.subtract),
    "multiply": (rounding.multiply, np.multiply),
    "divide": (rounding.divide, np.divide),
}


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", BINARY)
def test_elementary_operations_are_ieee_rounded(name, jitted):
    ours, ieee = BINARY[name]
    a, b = flushed(wild(0, 10**6)), flushed(wild(1, 10**6))
    b = np.where(b == 0, np.float32(1), b) if name == "divide" else b
    with jax.enable_x64(True):
        out = (jax.jit(ours) if jitted else ours)(jnp.asarray(a), jnp.asarray(b))
    assert compare_bits(np.asarray(out), flushed(ieee(a, b))).equal


def test_square_root_is_ieee_rounded():
    x = np.abs(flushed(wild(2, 10**6)))
    with jax.enable_x64(True):
        assert compare_bits(rounding.square_root(jnp.asarray(x)), np.sqrt(x)).equal


def test_hard_cases_of_log_and_reciprocal_root():
    """Hard cases of the specification, and a million other numbers compared with PyTorch's."""
    rng = np.random.default_rng(3)
    hard = np.array([0x41178FEB, 0x4665A9A6, 0x464D5B2B, 0x3FD364D7], np.uint32).view(np.float32)
    x = np.concatenate([hard, np.exp(rng.uniform(0, 14.5, 10**6)).astype(np.float32)])
    root = np.array([0x403A18E3], np.uint32).view(np.float32)
    with jax.enable_x64(True):
        logs = np.asarray(elementary.log(jnp.asarray(x)))
        found = np.asarray(norm.reciprocal_root(jnp.asarray(root)))
    right = [0x400FE5E7, 0x41198725, 0x4117BCF1, 0x3F006EF3]
    assert logs[:4].view(np.uint32).tolist() == right
    assert found.view(np.uint32).tolist() == [0x3F16209E]
    assert compare_bits(logs, torch_elementary.log(torch.from_numpy(x))).equal


def test_bfloat16_is_rounded_half_to_even():
    x = flushed(wild(4, 10**6))
    assert compare_bits(
        jax.jit(partial(narrow, dtype=jnp.bfloat16))(x), torch.from_numpy(x).bfloat16()
    ).equal


def of_torch(function: Callable[..., Any], arrays: list[np.ndarray], cotangent: np.ndarray) -> Any:
    leaves = [torch.from_numpy(x).requires_grad_() for x in arrays]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.from_numpy(cotangent))


def of_jax(function: Callable[..., Any], arrays: list[Any], cotangent: np.ndarray) -> Any:
    @jax.jit
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(jnp.asarray(cotangent))

    return run(*arrays)


IDS = np.random.default_rng(5).integers(0, V, (B, S))
LABELS = np.where(np.arange(S) < S - 3, IDS, -100)
POSITIONS = np.arange(10**6, 10**6 + S)
OPTIONS: Any = {"label_smoothing": 0.1, "z_loss": 1e-3}
RNG = (7, 2**32 - 5)
TABLES = torch_rotary.rotary_tables(torch.from_numpy(POSITIONS), 16, 10_000.0)

BIASED = [wild(28, B, S, D), wild(29, D), wild(30, S, D)]

# A function of JAX, the same one of PyTorch, their operands, and the shape of the output.
LAYERS: dict[str, tuple[Any, Any, list[np.ndarray], tuple[int, ...]]] = {
    "linear": (
        partial(linear.linear, "BSD,DF->BSF"),
        torch_linear.linear,
        [wild(6, B, S, D), wild(7, D, F)],
        (B, S, F),
    ),
    "norm": (
        lambda x, scale: norm.rms_norm(x, scale, 1e-5),
        lambda x, scale: torch_norm.rms_norm(x, scale, 1e-5),
        [wild(8, B, S, D), wild(9, D)],
        (B, S, D),
    ),
    "layer norm": (
        lambda x, scale, bias: norm.layer_norm(x, scale, bias, 1e-5),
        lambda x, scale, bias: torch_norm.layer_norm(x, scale, bias, 1e-5),
        [wild(24, B, S, D).clip(-2, 2), wild(25, D), wild(26, D)],
        (B, S, D),
    ),
    "gelu": (
        activation.gelu,
        torch_activation.gelu,
        [8 * wild(27, B, S, 800).clip(-2, 2)],
        (B, S, 800),
    ),
    "bias of features": (linear.add_bias, torch_linear.add_bias, BIASED[:2], (B, S, D)),
    "bias of tokens": (linear.add_bias, torch_linear.add_bias, BIASED[::2], (B, S, D)),
    "swiglu": (
        activation.swiglu,
        torch_activation.swiglu,
        [8 * wild(10, B, S, D).clip(-4, 4), wild(11, B, S, D)],
        (B, S, D),
    ),
    "embedding": (
        lambda table: embedding.embed(table, jnp.asarray(IDS)),
        lambda table: torch_embedding.embedding(table, torch.from_numpy(IDS)),
        [wild(12, V, D)],
        (B, S, D),
    ),
    "loss": (
        lambda z: loss.cross_entropy(z, jnp.asarray(LABELS), **OPTIONS),
        lambda z: torch_loss.cross_entropy(z, torch.from_numpy(LABELS), **OPTIONS),
        [wild(13, B, S, V).clip(-30, 30)],
        (),
    ),
    "tiled loss": (
        partial(tiled_loss.tiled_cross_entropy, labels=jnp.asarray(LABELS), tiles=4, **OPTIONS),
        lambda x, w: torch_loss.cross_entropy(
            torch_linear.linear(x, w.T), torch.from_numpy(LABELS), **OPTIONS
        ),
        [wild(16, B, S, D).clip(-2, 2), wild(17, V, D).clip(-2, 2)],
        (),
    ),
    "dropout": (
        lambda x: dropout.dropout(x, 0.3, jnp.array(RNG, jnp.uint32), jnp.arange(S)),
        lambda x: torch_dropout.dropout(x, 0.3, torch.tensor(RNG)),
        [wild(18, B, S, D)],
        (B, S, D),
    ),
    "rotary": (
        lambda x: rotary.rotary(x, jnp.asarray(POSITIONS)[None]),
        lambda x: torch_rotary.rotary(x, *(table[:, None] for table in TABLES)),
        [wild(14, B, S, 4, 16)],
        (B, S, 4, 16),
    ),
}


def both(name: str) -> tuple[Any, Any]:
    ours, theirs, arrays, shape = LAYERS[name]
    cotangent: Any = wild(15, *shape) if shape else np.float32(0.7)
    return of_jax(ours, arrays, cotangent), of_torch(theirs, arrays, np.asarray(cotangent))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_bits_of_pytorch(name):
    ours, theirs = both(name)
    report = compare_bits(ours, theirs)
    assert report.equal, str(report)


def float32_total(x: Any, axis: Any) -> Any:
    return jnp.sum(x, axis=axis, keepdims=True)


def balanced_the_other_way(letters: str, x: Any, dy: Any, **options: Any) -> Any:
    """The floor of the balance is that of the gradient's exponent less the activation's."""
    first, second = letters.split("->")[0].split(",")
    swapped = f"{second},{first}->{letters.split('->')[1]}"
    return matmul_module.balanced_matmul(swapped, dy, x, **options)


def rounded_by_library(x: Any) -> Any:
    return elementary.round32(jnp.log(x.astype(jnp.float64)))


def second_head(rng: Any, batch: int, heads: int) -> Any:
    return head_keys(rng, batch, heads + 1)[:, 1:]


def tanh_cdf(x: Any) -> Any:
    x = x.astype(jnp.float64)
    inner = (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)
    return rounding.nearest(0.5 * (1 + jnp.tanh(inner)))


def root_of_epsilon(x: Any, epsilon: float) -> Any:
    """Epsilon outside of the root."""
    r = rounding.nearest(
        1 / (jnp.sqrt(rounding.flush(norm._mean(rounding.multiply(x, x)))) + epsilon)
    )
    return rounding.multiply(x, r), r


def gaussian_of_float32(a: Any) -> Any:
    return rounding.flush(rounding.nearest(jnp.exp(-0.5 * a * a)))


def mean_of_all_but_one(x: Any) -> Any:
    return rounding.divide(rounding.total(x, -1), jnp.float32(x.shape[-1] - 1))


def not_balanced(letters, *operands):
    return tuple((x, exponents(x)) for x in operands)


def test_gradients_are_those_of_float64():
    """GELU: within four roundings of its terms. LayerNorm: within 1.5 times float32's errors."""
    rng = np.random.default_rng(31)
    x, dy = rng.standard_normal((2, 1000, D)).astype(np.float32)
    dy[:, 0] *= 100
    _, dx = of_jax(activation.gelu, [x], dy)
    cdf, xpdf = special.ndtr(x.astype(float)), x * np.exp(-(x.astype(float) ** 2) / 2) / TAU**0.5
    bound = 2.0**-24 * 4 * np.abs(dy) * (cdf + np.abs(xpdf))
    assert (np.abs(dx - dy * (cdf + xpdf)) <= bound).all()

    arrays = [x, *rng.standard_normal((2, D)).astype(np.float32)]
    plain = partial(torch.nn.functional.layer_norm, eps=1e-5)
    found = of_jax(LAYERS["layer norm"][0], arrays, dy)
    truth, theirs = (
        of_torch(lambda x, *w: plain(x, (D,), *w), [a.astype(t) for a in arrays], dy.astype(t))
        for t in (np.float64, np.float32)
    )
    for ours, other, right in zip(found, theirs, truth, strict=True):
        error, allowed = (np.abs(np.asarray(y, np.float64) - right.numpy()) for y in (ours, other))
        assert error.max() <= 1.5 * allowed.max()


MUTATIONS = {
    "a sum in float32": ("norm", norm, "total", float32_total),
    "the balance rounded up": ("linear", linear, "balanced_matmul", balanced_the_other_way),
    "operands of 22 bits": ("linear", matmul_module, "OPERAND_BITS", 22),
    "a mean without its rounding": ("loss", loss, "divide", lambda a, b: a / b + a * 0 + 1e-7),
    "a slope without 1 +": ("swiglu", activation, "add", lambda a, b: a - b),
    "a mean of D - 1": ("layer norm", norm, "_mean", mean_of_all_but_one),
    "epsilon outside of the root": ("layer norm", norm, "_normal", root_of_epsilon),
    "a bias summed on 20 bits": ("bias of features", rounding, "TOTAL_BITS", 20),
    "GELU by tanh": ("gelu", activation, "normal_cdf", tanh_cdf),
    "a density of float32": ("gelu", normal, "_gaussian", gaussian_of_float32),
    "angles of 23 bits": ("rotary", rotary, "ANGLE_BITS", 23),
    "rows summed on 31 bits": ("embedding", embedding, "TOTAL_BITS", 31),
    "a mean of logits in float32": ("loss", loss, "total", float32_total),
    "exponents of the last tile": ("tiled loss", tiled_loss, "_met", lambda _, own: own),
    "a tile that is not balanced": ("tiled loss", tiled_loss, "balanced", not_balanced),
    "another head of dropout": ("dropout", dropout.threefry, "head_keys", second_head),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation, monkeypatch):
    name, module, attribute, wrong = MUTATIONS[mutation]
    monkeypatch.setattr(module, attribute, wrong)
    jax.clear_caches()
    ours, theirs = both(name)
    assert not compare_bits(ours, theirs).equal
    jax.clear_caches()


@pytest.mark.parametrize(
    ("tiles", "options", "message"),
    [
        (3, {}, "tiles = 3 must divide the tokens S"),
        (4, {"z_loss": -1.0}, "z_loss must be from 0 to 2.126, got -1.0. Write 0 for none"),
        (4, {"z_loss": INF}, "z_loss must be from 0 to 2.126, got inf. Write 0 for none"),
        (4, {"z_loss": 2.0**127}, "z_loss must be from 0"),
        (4, {"z_loss": NAN}, "z_loss must be from 0"),
        (4, {"label_smoothing": NAN}, "label_smoothing must be from 0 to 1, got nan. Write 0"),
    ],
)
def test_a_loss_that_is_none_is_refused(tiles, options, message):
    hidden, table = (jnp.asarray(x) for x in LAYERS["tiled loss"][2])
    with pytest.raises(ValueError, match=message):
        tiled_loss.tiled_cross_entropy(hidden, table, jnp.asarray(LABELS), tiles=tiles, **options)


ONES = jnp.ones(4)
OUT_OF_RANGE = {
    "epsilon": (lambda x: norm.rms_norm(ONES, ONES, x), (NAN, INF, -1.0, 1e39)),
    "epsilon of LayerNorm": (lambda x: norm.layer_norm(ONES, ONES, ONES, x), (NAN, INF, -1.0)),
    "theta": (lambda x: rotary.frequencies(x, 4), (NAN, INF, 0.0)),
    "limit": (clip.clip_by_global_norm, (NAN, -1.0, 0.0, 1e-50)),
    "learning_rate": (optimizer.adamw, (NAN, INF, -1.0)),
    "learning_rate of SGD": (optimizer.sgd, (NAN, INF, -1.0)),
    "b1": (lambda x: optimizer.adamw(1e-3, x), (NAN, INF, 1e39, -0.1, 1.0, 1 - 2.0**-25)),
    "b2": (lambda x: optimizer.adamw(1e-3, 0.9, x), (NAN, INF, -0.1, 1.0)),
    "momentum": (lambda x: optimizer.sgd(1e-3, x), (NAN, INF, -0.1)),
    "epsilon of AdamW": (lambda x: optimizer.adamw(1e-3, epsilon=x), (NAN, INF, 0.0, 1e-39)),
    "weight_decay": (lambda x: optimizer.adamw(1e-3, weight_decay=x), (NAN, INF, -0.1)),
    "weight_decay of SGD": (lambda x: optimizer.sgd(1e-3, weight_decay=x), (NAN, INF, -0.1)),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(name):
    call, numbers = OUT_OF_RANGE[name]
    for number in numbers:
        with pytest.raises(ValueError, match=rf"{name.split()[0]} must be .*Write"):
            call(number)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.filterwarnings("error")
def test_a_number_of_numpy_is_taken():
    plain, given = (norm.rms_norm(ONES, ONES, x) for x in (1e-5, np.float32(1e-5)))
    assert compare_bits(plain, given).equal


def test_tiles_of_int8_products_have_the_same_bits():
    """Tiles of int8 products have the bits of one product: their carries are added up."""
    ours, _, arrays, _ = LAYERS["tiled loss"]
    cotangent: Any = np.float32(0.7)
    found = of_jax(partial(ours, engine=int8_products), arrays, cotangent)
    assert compare_bits(found, of_jax(ours, arrays, cotangent)).equal


def test_gradients_of_several_batches_are_added_in_order():
    given = [flushed(wild(seed, 1000)) for seed in (20, 21, 22)]

    def sums(batches: Any) -> Any:
        loss = accumulated_value_and_grad(lambda x, batch: (x * batch).sum() * 0 + batch[0])
        gradient = accumulated_value_and_grad(lambda x, batch: (x * batch).sum())
        return loss(jnp.zeros(1000), batches)[0], gradient(jnp.zeros(1000), batches)[1]

    a, b, c = given
    total, other = flushed(flushed(a + b) + c), flushed(a + flushed(b + c))
    loss, gradient = jax.jit(sums)(jnp.asarray(given))
    assert compare_bits((loss, gradient), (total[0], total)).equal
    assert not compare_bits(gradient, other).equal


def test_gradients_of_several_uses_are_added_in_order():
    x = jnp.zeros(1000)
    _, pull = jax.vjp(lambda x: linear.fork(x, 3), x)
    a, b, c = (jnp.asarray(flushed(wild(seed, 1000))) for seed in (20, 21, 22))
    assert compare_bits(pull((a, b, c))[0], flushed(flushed(np.add(a, b)) + np.asarray(c))).equal
    assert not compare_bits(
        pull((a, b, c))[0], flushed(np.asarray(a) + flushed(np.add(b, c)))
    ).equal


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "norm",
        "layer norm",
        "gelu",
        "bias of features",
        "bias of tokens",
        "embedding",
        "loss",
        "tiled loss",
        "dropout",
    ],
)
def test_layers_have_the_same_bits_on_a_mesh(name, kind):
    """Layers on a mesh of four token and two batch devices have the bits of one device."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), (kind,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    whole = NamedSharding(mesh, PartitionSpec())
    ids, labels = (jax.device_put(jnp.asarray(x), sharding) for x in (IDS, LABELS))
    functions = {
        "embedding": lambda table: embedding.embed(table, ids),
        "loss": lambda z: loss.cross_entropy(z, labels, **OPTIONS),
        "tiled loss": partial(tiled_loss.tiled_cross_entropy, labels=labels, tiles=4, **OPTIONS),
    }
    ours, _, arrays, shape = LAYERS[name]
    cotangent: Any = wild(15, *shape) if shape else np.float32(0.7)
    alone = of_jax(ours, arrays, cotangent)
    placed = [jax.device_put(x, sharding if x.ndim == 3 else whole) for x in arrays]
    if shape:
        cotangent = jax.device_put(cotangent, sharding)
    with jax.set_mesh(mesh):
        spread = of_jax(functions.get(name, ours), placed, cotangent)
    assert compare_bits(jax.device_get(alone), jax.device_get(spread)).equal


WHOLE, FEATURES = PartitionSpec(), PartitionSpec(None, None, "seq")


def norm_of_rows(x, scale):
    return norm.rms_norm(x, scale, 1e-5)


def layer_norm_of_rows(x, scale, bias):
    return norm.layer_norm(x, scale, bias, 1e-5)


@pytest.mark.parametrize(
    ("function", "arrays", "specs"),
    [
        (linear.add, [BIASED[0], wild(39, B, S, D)], (WHOLE, PartitionSpec("data", "seq"))),
        (linear.add, [BIASED[0], wild(39, B, S, D)], (PartitionSpec("data"), FEATURES)),
        (linear.add_bias, BIASED[:2], (WHOLE, PartitionSpec("seq"))),
        (linear.add_bias, BIASED[::2], (FEATURES, PartitionSpec("data"))),
        (norm_of_rows, [BIASED[0], wild(38, D)], (FEATURES, WHOLE)),
        (layer_norm_of_rows, [BIASED[0], wild(38, D), wild(37, D)], (FEATURES, WHOLE, WHOLE)),
        (activation.swiglu, [BIASED[0], wild(39, B, S, D)], (WHOLE, FEATURES)),
    ],
)
def test_gradients_have_the_shardings_of_their_operands(function, arrays, specs):
    """Operands with other Explicit shardings than the result's, which has those of all."""
    mesh = jax.make_mesh((2, 4), ("data", "seq"), (AxisType.Explicit,) * 2)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]

    @jax.jit
    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(out)

    with jax.set_mesh(mesh):
        spread = run(*placed)
    assert compare_bits(jax.device_get(run(*arrays)), jax.device_get(spread)).equal
    assert list(map(jax.typeof, spread[1:])) == list(map(jax.typeof, placed))


def test_a_bias_broadcasts_to_y_and_y_not_to_it():
    y = wild(32, 1, 4)
    for shape in ((3, 4), (3,), (1, 1, 4)):
        frameworks: Any = (linear, jnp.asarray), (torch_linear, torch.tensor)
        for of, array in frameworks:
            with pytest.raises(ValueError, match=rf"bias \({shape[0]},.* y \(1, 4\)\. Write"):
                of.add_bias(array(y), array(np.ones(shape, np.float32)))


ROW, ROWS = wild(33, D).clip(-2, 2), [wild(34, D), wild(35, D)]
OF_ONE_TOKEN: dict[str, tuple[str, list[np.ndarray]]] = {
    "layer norm": ("layer norm", [ROW, *ROWS]),
    "norm": ("norm", [ROW, ROWS[0]]),
    "bias of every number": ("bias of features", [ROW, ROWS[0]]),
    "bias of sequences": ("bias of features", [BIASED[0], wild(36, B, 1, D)]),
    "bias of one number": ("bias of features", [BIASED[0], wild(37, 1, 1)]),
}


@pytest.mark.parametrize("name", OF_ONE_TOKEN)
def test_other_shapes_have_the_bits_of_pytorch(name):
    layer, arrays = OF_ONE_TOKEN[name]
    ours, theirs, *_ = LAYERS[layer]
    cotangent = wild(38, *arrays[0].shape)
    assert compare_bits(of_jax(ours, arrays, cotangent), of_torch(theirs, arrays, cotangent)).equal


def test_the_ends_of_the_normal_distribution():
    """Phi of infinity is 1, and GELU infinite; Phi of -infinity is 0, and GELU NaN."""
    x, nan = np.array([np.inf, -np.inf, np.nan, 3e38, -3e38], np.float32), np.nan
    cdf, gelu = (np.array(y, np.float32) for y in ([1, 0, nan, 1, 0], [np.inf, nan, nan, 3e38, 0]))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(normal.normal_cdf(jnp.asarray(x)), cdf)
    np.testing.assert_array_equal(torch_normal.normal_cdf(torch.tensor(x)), cdf)
    np.testing.assert_array_equal(activation.gelu(jnp.asarray(x)), gelu)
    np.testing.assert_array_equal(torch_activation.gelu(torch.tensor(x)), gelu)
