"""Every operation of exact training in PyTorch against Python integers, bit for bit."""

import exact_training_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from exact_training_inputs import numbers, rows, tails

from jax_seqpar.compare import compare_bits
from torch_ref.exact import (
    arithmetic,
    clip,
    elementary,
    exact_attention,
    matmul,
    normal,
    optimizer,
    rounding,
    sums,
)
from torch_ref.exact.activation import gelu, swiglu
from torch_ref.exact.dropout import dropout, fold
from torch_ref.exact.embedding import embedding
from torch_ref.exact.linear import add_bias, linears
from torch_ref.exact.loss import count_labels, cross_entropy
from torch_ref.exact.norm import layer_norm, rms_norm
from torch_ref.exact.residual import fork, residual
from torch_ref.exact.rotary import cos_and_sin, frequencies, rotary, rotary_tables

pytestmark = pytest.mark.usefixtures("one_torch_thread")

INF, NAN = float("inf"), float("nan")


def tensors(*arrays):
    return [torch.from_numpy(np.array(x)) for x in arrays]


def assert_bits(got, expected):
    """Each tensor has the bits of its array; some number of it is not 0."""
    for x, truth in zip(got, expected, strict=True):
        report = compare_bits(x.detach().numpy(), np.asarray(truth))
        assert report.equal, str(report)
        assert np.any(truth)


def run(function, inputs, dy):
    """The outputs of a function of float32 arrays, and the gradients of these."""
    leaves = [x.requires_grad_() for x in tensors(*inputs)]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, leaves, tensors(*dy))]


# Rounding and elementary functions.


def test_rounding_of_a_million_numbers_is_that_of_numpy():
    x = tails(1_000_000, 0)
    with np.errstate(over="ignore"):
        expected = np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float32)
    assert_bits([rounding.R(torch.from_numpy(x))], [expected])


def test_rounding_is_that_of_fractions():
    x = tails(10_000, 1)
    x = x[np.abs(x) < 2.0**127]
    assert_bits([rounding.R(torch.from_numpy(x))], [oracle.round_float64(x)])


def test_rounding_keeps_what_is_no_number():
    x = torch.tensor([np.inf, -np.inf, np.nan, 1e300], dtype=torch.float64)
    assert str(rounding.R(x).tolist()) == "[inf, -inf, nan, inf]"


BINARY = ("add", "subtract", "multiply", "divide")


@pytest.mark.parametrize("name", BINARY)
def test_operations_of_two_numbers(name):
    a, b = numbers(20_000, 2), numbers(20_000, 3)
    if name == "divide":
        b = np.where(np.abs(b) < 2.0**-100, np.float32(3), b)
    got = getattr(rounding, name)(*tensors(a, b))
    assert_bits([got], [getattr(oracle, name)(a, b)])


@pytest.mark.parametrize("name", BINARY)
def test_a_million_operations_are_those_of_numpy(name):
    """Hardware rounds once; magnitudes here keep clear of 2^-126."""
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal(1_000_000).astype(np.float32) for _ in range(2))
    expected = getattr(np, name)(a, b)
    assert_bits([getattr(rounding, name)(*tensors(a, b))], [expected])


def test_roots():
    x = np.abs(numbers(10_000, 5))
    x[np.abs(x) < 2.0**-126] = 1.5
    # The nearest approach of rsqrt to a tie.
    x[0] = np.uint32(0x403A18E3).view(np.float32)
    (given,) = tensors(x)
    got = [elementary.rsqrt(given), rounding.square_root(given)]
    assert_bits(got, [oracle.rsqrt(x), oracle.square_root(x)])
    assert got[0][:1].view(torch.int32).item() == 0x3F16209E


HARD_LOGARITHMS = {
    0x41178FEB: 0x400FE5E7,
    0x4665A9A6: 0x41198725,
    0x464D5B2B: 0x4117BCF1,
    0x3FD364D7: 0x3F006EF3,
}


def test_logarithms():
    rng = np.random.default_rng(6)
    hard = np.array([*HARD_LOGARITHMS], np.uint32).view(np.float32)
    x = np.concatenate((hard, [1, 2**21], 2 ** (21 * rng.random(3_000)), 1 + rng.random(3_000)))
    x = x.astype(np.float32)
    got = elementary.log(torch.from_numpy(x))
    assert_bits([got], [oracle.log(x)])
    assert got[:4].view(torch.int32).tolist() == [*HARD_LOGARITHMS.values()]


def test_exponentials():
    rng = np.random.default_rng(7)
    x = np.concatenate((-(2 ** (rng.random(10_000) * 40 - 33)), [0, -80, -80.1, -1e30]))
    x = x.astype(np.float32)
    assert_bits([arithmetic.exp(torch.from_numpy(x).double()).float()], [oracle.exp(x)])


HARD_NORMALS = {  # of Phi, and of phi
    0x33A06C99: (0x3F000001, 0x3ECC422A),
    0xB3206C99: (0x3EFFFFFF, 0x3ECC422A),
    0xBE7CD341: (0x3ECE138E, 0x3EC6206B),
    0xBB7FD5FA: (0x3EFF33E0, 0x3ECC41C4),
    0x3E48A98A: (0x3F13E2C5, 0x3EC85FC4),
}


def test_the_normal_distribution():
    rng = np.random.default_rng(8)
    hard = np.array([*HARD_NORMALS], np.uint32).view(np.float32)
    x = np.concatenate(
        (hard, rng.uniform(-13.5, 6, 700), rng.standard_normal(300), [0, -0.0, 1e-40])
    )
    x = np.concatenate((x, 2 ** rng.uniform(-30, 0, 300))).astype(np.float32)
    given = torch.from_numpy(x)
    got = [normal.normal_cdf(given), normal.normal_pdf(given)]
    assert_bits(got, [oracle.normal_cdf(x), oracle.normal_pdf(x)])
    found = zip(*(y[:5].view(torch.int32).tolist() for y in got), strict=True)
    assert [*found] == [*HARD_NORMALS.values()]


def test_bfloat16_is_the_nearest():
    x = numbers(10_000, 8)
    x[:3000] = (x.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)[:3000]
    x = oracle.add(x, np.zeros_like(x))
    got = rounding.narrow(torch.from_numpy(x), torch.bfloat16)
    assert torch.equal(got, torch.from_numpy(x).bfloat16())
    assert_bits([got.float()], [oracle.bfloat16(x).astype(np.float32)])


def test_activations_of_float16_are_an_error():
    with pytest.raises(ValueError, match=r"got torch.float16. Write torch.bfloat16"):
        rounding.narrow(torch.ones(2), torch.float16)


# Sums.


@pytest.mark.parametrize("axis", (0, 1))
def test_totals(axis):
    for x in (numbers((40, 250), 9), rows((100, 100), 10)):
        assert_bits([sums.total(torch.from_numpy(x), axis)], [oracle.total(x, axis)])


def test_products():
    """Products of numbers whose magnitudes differ in a row, and from row to row."""
    for a, b in (
        (numbers((12, 70), 11), numbers((70, 13), 12)),
        (rows((15, 64), 13), rows((14, 64), 14).T),
    ):
        got = matmul.mm(*(arithmetic.flush(x) for x in tensors(a, b)))
        assert_bits([got], [oracle.mm(a, b)])


def test_products_in_pieces(monkeypatch):
    a, b = numbers((5, 100), 15), numbers((100, 6), 16)
    monkeypatch.setattr(matmul, "PIECE", 7)
    got = matmul.mm(*(arithmetic.flush(x) for x in tensors(a, b)))
    assert_bits([got], [oracle.mm(a, b)])


def test_the_longest_sum_of_the_largest_integers():
    """K = 2^17 and more, of integers up to 2^24 - 1: sums up to 2^65, against Python integers."""
    rng = np.random.default_rng(17)
    for K in (2**17, 2**17 + 300):
        A, B = (rng.integers(2**24 - 9, 2**24, K) for _ in range(2))
        a, b = (torch.from_numpy(x).double() * 2.0**-24 for x in (A, B))
        got = matmul.mm(a[None], b[:, None])
        S = sum(x * y for x, y in zip(A.tolist(), B.tolist(), strict=True))
        assert_bits([got[0]], [oracle.round_float64(np.array([float(S) * 2.0**-48]))])
        assert S > 2**64


def test_integers_of_75_bits_are_rounded_once():
    rng = np.random.default_rng(18)
    high = rng.integers(-(2**62), 2**62, 20_000) >> rng.integers(0, 62, 20_000)
    low = rng.integers(-(2**62), 2**62, 20_000) >> rng.integers(0, 62, 20_000)
    # On the middle of two float64, and next to it.
    high[:5000] = (1 << 53) + rng.integers(0, 1 << 52, 5000)
    low[:5000] = 2048 + rng.integers(-1, 2, 5000)
    got = matmul._joined(*tensors(high, low))
    pairs = zip(high.tolist(), low.tolist(), strict=True)
    expected = [float(upper * 2**12 + lower) for upper, lower in pairs]
    assert got.tolist() == expected


def test_too_many_terms_are_an_error():
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"fewer than 134217728 terms. Got 134217728 on each of 1"):
        matmul.mm(x.expand(1, 2**27), x.expand(2**27, 1))


def test_gradients_of_weights_are_balanced():
    x, dy = rows((60, 9), 19), rows((60, 8), 20)
    got = matmul.mmT(*(arithmetic.flush(x) for x in tensors(x, dy)))
    assert_bits([got], [oracle.weight_gradient(x, dy)])


# Layers, forward and backward.


def test_linear_layers_of_one_input():
    x, w = numbers((30, 16), 21), [numbers((16, n), 22 + n) for n in (8, 4, 5)]
    dy = [rows((30, n), 32 + n) for n in (8, 4, 5)]
    got = run(linears, (x, *w), dy)
    dx, dw = oracle.linears_backward(x, w, dy)
    assert_bits(got, [*(oracle.mm(x, each) for each in w), dx, *dw])


def test_rms_norm():
    for x in (numbers((40, 24), 40), rows((40, 24), 41)):
        gamma, dy = numbers(24, 42, wide=False), rows((40, 24), 43)
        got = run(lambda x, gamma: rms_norm(x, gamma, 1e-6), (x, gamma), (dy,))
        expected = oracle.rms_norm(x, gamma, 1e-6)
        assert_bits(got, [expected, *oracle.rms_norm_backward(x, gamma, 1e-6, dy)])


def test_layer_norm():
    for x in (numbers((40, 24), 40), rows((40, 24), 41)):
        (gamma, beta), dy = numbers((2, 24), 42, wide=False), rows((40, 24), 43)
        got = run(lambda x, g, b: layer_norm(x, g, b, 1e-12), (x, gamma, beta), (dy,))
        expected = oracle.layer_norm(x, gamma, beta, 1e-12)
        assert_bits(got, [expected, *oracle.layer_norm_backward(x, gamma, 1e-12, dy)])


@pytest.mark.parametrize(("channels", "theta"), ((32, 10_000), (64, 500_000), (2, 10_000)))
def test_frequencies_of_the_rotary_embedding(channels, theta):
    assert frequencies(channels, theta) == oracle.frequencies(channels, theta)


def test_cosines_and_sines():
    rng = np.random.default_rng(44)
    # Eighths of a turn, their neighbours, and any.
    eighths = (np.arange(8) << 21)[:, None] + np.arange(-2, 3)
    angles = np.concatenate((eighths.ravel() % 2**24, rng.integers(0, 2**24, 3000)))
    expected = [oracle.out(f(angles.astype(object))) for f in (oracle.cosine, oracle.sine)]
    assert_bits(cos_and_sin(torch.from_numpy(angles)), expected)


def test_rotary_embedding():
    positions = np.array([0, 1, 2, 3, 1000, 123_456_789, 2**31 - 1])
    cos, sin = rotary_tables(torch.from_numpy(positions), 8, 10_000)
    expected = oracle.rotary_tables(positions, 8, 10_000)
    assert_bits((cos, sin), expected)
    x, dy = numbers((2, 7, 3, 10), 45), numbers((2, 7, 3, 10), 46)
    got = run(lambda x: rotary(x, cos[:, None], sin[:, None]), (x,), (dy,))
    c, s = (np.broadcast_to(x[:, None], (2, 7, 3, 4)) for x in expected)
    assert_bits(got, (oracle.rotary(x, c, s), oracle.rotary(dy, c, -s)))


def test_swiglu():
    for wide in (False, True):
        gate, up, dh = (numbers(1500, seed, wide) for seed in (47, 48, 49))
        got = run(swiglu, (gate, up), (dh,))
        expected = oracle.swiglu(gate, up), *oracle.swiglu_backward(gate, up, dh)
        assert_bits(got, expected)


def test_gelu():
    x, dy = numbers(400, 70, wide=False) * np.float32(3), numbers(400, 71)
    x[:40] = numbers(40, 72)
    assert_bits(run(gelu, (x,), (dy,)), (oracle.gelu(x), oracle.gelu_backward(x, dy)))


def test_biases():
    y, dy = numbers((4, 30, 7), 73), numbers((4, 30, 7), 74)
    for shape in ((7,), (30, 7)):
        bias = numbers(shape, 75)
        total = oracle.total(dy.reshape(-1, *shape), 0)
        assert_bits(run(add_bias, (y, bias), (dy,)), (oracle.add(y, bias), dy, total))


def test_embedding():
    ids = np.random.default_rng(50).integers(0, 11, (6, 50))
    table, dx = numbers((12, 7), 51), numbers((6, 50, 7), 52)
    got = run(lambda table: embedding(table, torch.from_numpy(ids)), (table,), (dx,))
    gradient = oracle.embedding_backward(ids.ravel(), dx.reshape(300, 7), 12)
    assert_bits(got, (oracle.add(table, table * 0)[ids], gradient))


@pytest.mark.parametrize(("z_loss", "smoothing"), ((0.0, 0.0), (1e-3, 0.1), (0.0, 1.0)))
@pytest.mark.parametrize("scale", (0.1, 20.0))
def test_cross_entropy(z_loss, smoothing, scale):
    logits = numbers((60, 50), 53, wide=False) * np.float32(scale)
    labels = np.random.default_rng(54).integers(0, 50, 60)
    labels[[3, 50]] = -100
    leaf = torch.from_numpy(logits).requires_grad_()
    options = {"label_smoothing": smoothing, "z_loss": z_loss}
    loss = cross_entropy(leaf, torch.from_numpy(labels), **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = oracle.cross_entropy(logits, labels, z_loss, -100, 58, smoothing)
    assert_bits((loss[None], gradient), (np.array([expected[0]]), expected[1]))


def test_a_term_of_a_loss_that_is_none_is_no_nan():
    """2e19 squared is infinite, and so is the mean beside a logit of -inf."""
    logits = torch.tensor([[[2e19, 0.0, 0.0]], [[1.0, 0.0, -torch.inf]]])
    for one, expected in zip(logits, (2e19, 0.3132617), strict=True):
        loss = cross_entropy(one[None], torch.tensor([[1 if one[0, 0] > 1 else 0]]))
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    (
        {"label_smoothing": 1.1},
        {"label_smoothing": NAN},
        *({"z_loss": number} for number in (-1.0, INF, NAN, 2.0**127)),
    ),
    ids=str,
)
def test_a_loss_out_of_range_is_an_error(options):
    with pytest.raises(ValueError, match=r"from 0 to 1 and z_loss from 0 to.*Give 0 for none"):
        cross_entropy(torch.ones(3, 4), torch.zeros(3).long(), **options)


ONES, ROW = torch.ones(1, 2, 1, 4), torch.ones(4)
OUT_OF_RANGE = {
    "eps": (lambda x: rms_norm(ONES, ROW, x), (NAN, INF, -1.0, 1e39)),
    "eps of LayerNorm": (lambda x: layer_norm(ONES, ROW, ROW, x), (NAN, INF, -1.0)),
    "theta": (lambda x: frequencies(4, x), (NAN, INF, -1.0, 0.0)),
    "largest": (lambda x: clip.clip({"w": ROW}, x), (NAN, -1.0, 0.0)),
    "scale": (lambda x: exact_attention(ONES, ONES, ONES, scale=x), (NAN, INF, -INF, 1e39)),
    "lr": (lambda x: optimizer.adamw_numbers(1, x), (NAN, INF, -1.0)),
    "b1": (lambda x: optimizer.adamw_numbers(1, 1e-3, b1=x), (NAN, INF, -0.1, 1.0, 1 - 1e-9)),
    "b2": (lambda x: optimizer.adamw_numbers(1, 1e-3, b2=x), (NAN, INF, -0.1, 1.0)),
    "eps of AdamW": (lambda x: optimizer.adamw_numbers(1, 1e-3, eps=x), (NAN, INF, 0.0, 1e-39)),
    "weight_decay": (lambda x: optimizer.adamw_numbers(1, 0.1, weight_decay=x), (NAN, INF, -0.1)),
    "momentum": (lambda x: optimizer.sgd(ROW, ROW, ROW, lr=0.1, momentum=x), (NAN, INF, -0.1)),
    "lr of SGD": (lambda x: optimizer.sgd(ROW, ROW, ROW, lr=x, momentum=0.9), (NAN, INF, -1.0)),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_an_error(name):
    call, numbers = OUT_OF_RANGE[name]
    for number in numbers:
        with pytest.raises(ValueError, match=rf"{name.split()[0]} must be .*(Write|Give)"):
            call(number)


def test_the_mean_of_no_label_is_0():
    leaf = torch.ones(3, 4, requires_grad=True)
    labels = torch.full((3,), -100)
    loss = cross_entropy(leaf, labels)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss.item() == 0
    assert not gradient.any()
    assert count_labels(labels) == 0


def test_residuals_and_forks():
    a, b, dy, other = (numbers(3000, seed) for seed in (55, 56, 57, 58))
    got = run(residual, (a, b), (dy,))
    assert_bits(got, (oracle.add(a, b), dy, dy))
    got = run(fork, (a,), (dy, other))
    assert_bits(got, (a, a, oracle.add(dy, other)))


def test_dropout():
    x, dy, rng = numbers((2, 9, 20), 59), numbers((2, 9, 20), 60), (7, 2**32 - 5)
    first = {"first_sequence": 3, "first_token": 40}
    got = run(lambda x: dropout(x, 0.3, torch.tensor(rng), **first), (x,), (dy,))
    assert_bits(got, [oracle.dropout(each, 0.3, rng, *first.values()) for each in (x, dy)])


def test_gradients_are_of_a_first_order():
    """A second derivative would be that of other rules than these."""
    x = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(swiglu(x, x.clone()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


TABLES = rotary_tables(torch.arange(20), 6, 10_000)
# Of one input of activations or two, and of parameters.
NARROW = {
    "linear": (lambda x, w: linears(x, w), 1),
    "norm": (lambda x, w: rms_norm(x, w[0], 1e-6), 1),
    "layer norm": (lambda x, w: layer_norm(x, w[0], w[1], 1e-6), 1),
    "bias": (lambda x, w: add_bias(x, w[0]), 1),
    "gelu": (lambda x, w: gelu(x), 1),
    "rotary": (lambda x, w: rotary(x, *TABLES), 1),
    "swiglu": (lambda x, y, w: swiglu(x, y), 2),
    "residual": (lambda x, y, w: residual(x, y), 2),
    "fork": (lambda x, w: fork(x), 1),
    "dropout": (lambda x, w: dropout(x[None], 0.4, torch.tensor((1, 2)))[0], 1),
    "cross entropy": (lambda x, w: cross_entropy(x, torch.arange(20) % 6), 1),
}


@pytest.mark.parametrize("name", NARROW)
def test_activations_of_16_bits_are_those_of_32_rounded(name):
    """Forward and backward; the gradients of parameters stay float32."""
    function, count = NARROW[name]
    given = [oracle.bfloat16(numbers((20, 6), 61 + i)).astype(np.float32) for i in range(4)]

    def results(dtype):
        leaves = [*(x.to(dtype) for x in tensors(*given[:count])), *tensors(numbers((6, 6), 65))]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        dy = [x.to(each.dtype) for x, each in zip(tensors(*given[2:]), y, strict=False) if x.ndim]
        dy = dy if name != "cross entropy" else None
        *dx, dw = torch.autograd.grad(y, leaves, dy, allow_unused=True)
        return [*y, *dx], dw

    got, expected = results(torch.bfloat16), results(torch.float32)
    for x, wide in zip(got[0], expected[0], strict=True):
        assert x.dtype == (torch.bfloat16 if wide.ndim else torch.float32)
        wide = wide.detach().numpy()
        narrow = oracle.bfloat16(wide).astype(np.float32) if wide.ndim else wide
        assert_bits([x.float()], [narrow])
    if expected[1] is not None:
        assert_bits([got[1]], [expected[1].numpy()])


def test_gradients_of_several_linear_layers_are_rounded_and_added():
    """Gradients of several layers are rounded to 16 bits, added in 32, and rounded again."""
    x = torch.from_numpy(numbers((20, 6), 61)).bfloat16().requires_grad_()
    weights, dys = tensors(*numbers((3, 6, 5), 62)), tensors(*numbers((3, 20, 5), 63))
    dys = [dy.bfloat16() for dy in dys]
    (got,) = torch.autograd.grad(linears(x, *weights), x, dys)
    products = (
        oracle.mm(dy.float().numpy(), w.T.numpy()) for w, dy in zip(weights, dys, strict=True)
    )
    a, b, c = (oracle.bfloat16(product).astype(np.float32) for product in products)
    expected = oracle.bfloat16(oracle.add(oracle.add(a, b), c)).astype(np.float32)
    assert_bits([got.float()], [expected])


def test_an_embedding_of_16_bits():
    table, ids = numbers((9, 6), 66), torch.arange(20) % 7
    leaf = torch.from_numpy(table).requires_grad_()
    y = embedding(leaf, ids, dtype=torch.bfloat16)
    dy = torch.from_numpy(numbers((20, 6), 67)).bfloat16()
    (gradient,) = torch.autograd.grad(y, leaf, dy)
    rows_of_16_bits = oracle.bfloat16(table)[ids].astype(np.float32)
    assert_bits(
        [y.float(), gradient],
        [rows_of_16_bits, oracle.embedding_backward(ids.numpy(), dy.float().numpy(), 9)],
    )


def test_logits_of_16_bits_are_not_rounded_to_them():
    x, w = torch.from_numpy(numbers((20, 6), 68)).bfloat16(), torch.from_numpy(numbers((6, 9), 69))
    (got,) = linears(x, w, dtype=torch.float32)
    assert_bits([got], [oracle.mm(x.float().numpy(), w.numpy())])


def test_keys_are_folded_as_jax_does():
    key = torch.tensor([7, 2**32 - 5])
    words = [jax.random.wrap_key_data(jnp.asarray(key.numpy(), jnp.uint32))]
    for number in (0, 3, 2**31):
        words.append(jax.random.fold_in(words[-1], np.uint32(number)))
        key = fold(key, number)
        assert key.tolist() == jax.random.key_data(words[-1]).tolist()


# The step.


def test_clipping():
    gradients = [numbers((5, 6), 65, wide=False), numbers(40, 66), numbers((2, 3, 4), 67)]
    for largest in (1.0, 1e9):
        got, norm = clip.clip(dict(zip("abc", tensors(*gradients), strict=True)), largest)
        expected, its_norm = oracle.clip(gradients, largest)
        assert_bits([*got.values(), norm[None]], [*expected, np.array([its_norm])])


@pytest.mark.parametrize("x", (np.inf, np.nan, 1e30))
def test_a_norm_that_is_not_finite_is_an_error(x):
    with pytest.raises(ValueError, match=r"gradients of 1 tensors is (nan|inf)"):
        clip.clip({"w": torch.tensor([1.0, x])}, 1.0)


@pytest.mark.parametrize("step", (1, 2, 1000))
def test_adamw(step):
    expected = oracle.adamw_numbers(step, 3e-4, 0.9, 0.95, 1e-8, 0.1)
    given = optimizer.adamw_numbers(step, 3e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    assert given._asdict() == expected
    w, m, v, g = (numbers(1500, seed) for seed in (68, 69, 70, 71))
    v = np.abs(v)
    w_m_v_g = tensors(w, m, v, g)
    assert_bits(optimizer.adamw(*w_m_v_g, numbers=given), oracle.adamw(w, m, v, g, expected))


def test_sgd():
    w, m, g = (numbers(1500, seed) for seed in (72, 73, 74))
    got = optimizer.sgd(*tensors(w, m, g), lr=0.1, momentum=0.9, weight_decay=0.01)
    assert_bits(got, oracle.sgd(w, m, g, 0.1, 0.9, 0.01))


def test_the_cosine_of_the_learning_rate():
    rates = [optimizer.cosine_rate(step, 7, 0.5) for step in range(8)]
    steps = np.arange(8)
    np.testing.assert_allclose(rates, 0.25 * (1 + np.cos(np.pi * steps / 7)), rtol=0, atol=1e-7)
    assert (rates[0], rates[-1]) == (0.5, 0.0)
    angles = np.array([int(2**23 * step / 7 + 0.5) for step in range(8)])
    cos = oracle.out(oracle.cosine(angles.astype(object))).astype(float)
    assert rates == (0.5 * (0.5 + 0.5 * cos)).astype(np.float32).tolist()
