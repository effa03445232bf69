"""The gradient of a bias: one sum of integers for each entry, whatever adds it up."""

from dataclasses import replace
from functools import partial
from typing import Any

import integer_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import MESHES, ONE_AXIS, slow
from exact_cases import CROSS, jax_exact, torch_exact
from jax.sharding import AxisType, PartitionSpec

from jax_seqpar import (
    AllGatherKV,
    Contiguous,
    Exact,
    Hybrid,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    Ulysses,
    Zigzag,
    dot_product_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.exact import arithmetic, bias_gradient
from jax_seqpar.exact.bias_gradient import BiasSums
from jax_seqpar.mask import Tokens
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from torch_ref.exact import arithmetic as exact_arithmetic
from torch_ref.exact import exact_attention as torch_exact_attention

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

B, T, S, N = CROSS.B, CROSS.T, CROSS.S, CROSS.N


def bias_of(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def inputs_of(case, least=0):
    """Inputs whose output gradients grow by 2^8 from each head and sequence to the next.

    Below 2^least at first, so that an entry which many heads share has summands of every size.
    """
    inputs = case.inputs()
    powers = 2.0 ** (least + 8 * np.arange(case.B * case.N).reshape(case.B, 1, case.N, 1))
    return inputs | {"grad": (inputs["grad"] * powers).astype(np.float32)}


def check_equal(a, b):
    report = compare_bits(a, b)
    assert report.equal, str(report)


@pytest.fixture
def blocks_of_five(monkeypatch):
    jax.clear_caches()
    for module in (arithmetic, exact_arithmetic):
        monkeypatch.setattr(module, "BLOCK", 5)
    yield
    jax.clear_caches()


SHAPES = (
    (B, N, T, S),
    slow((1, N, T, S)),
    slow((1, 1, T, S)),
    (B, 1, 1, S),
    slow((1, N, 1, S)),
    slow((B, N, T, 1)),
    slow((1, 1, T, 1)),
    (1, 1, 1, 1),
)


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_implementations_of_every_shape(shape):
    """Blocks of queries and keys, the last ones smaller, and a soft cap, whose slope it is not."""
    inputs = inputs_of(CROSS)
    options = {
        "bias": bias_of(*shape),
        "is_causal": True,
        "query_offset": 3,
        "logits_soft_cap": 2.0,
    }
    ours, theirs = jax_exact(inputs, **options), torch_exact(inputs, **options)
    assert np.count_nonzero(ours["dbias"]) > ours["dbias"].size / 5
    check_equal(ours, theirs)
    query, key, value, grad = inputs.values()
    expected = integer_oracle.attention(query, key, value, grad=grad, block=5, **options)
    check_equal(ours, expected)


@pytest.mark.parametrize("dtype", ("bfloat16", slow("float16")))
def test_sixteen_bits(dtype):
    """Gradients of a 16-bit bias are rounded once to float32 and once to its dtype."""
    inputs = replace(CROSS, dtype=dtype).inputs()
    options: Any = {"bias": bias_of(1, N, 1, S).astype(jnp.dtype(dtype))}
    ours = jax_exact(inputs, **options)
    assert ours["dbias"].dtype == jnp.dtype(dtype)
    check_equal(ours, torch_exact(inputs, **options))


def test_the_gradient_of_one_logit_is_its_ds():
    """The gradient of one logit is its ds, beside a sequence whose gradients are larger or 0."""
    inputs = inputs_of(CROSS)
    alone = torch_exact(inputs, bias=bias_of(1, N, T, S).repeat(2, 0), is_causal=True)["dbias"]
    inputs["grad"][1] = 0
    shared = torch_exact(inputs, bias=bias_of(1, N, T, S), is_causal=True)["dbias"]
    check_equal(alone[:1], shared)


# Axes of a bias that are not of size 1. Devices along a mesh axis share the entries of a bias
# without the axis that they shard.
ALL_ROWS, KEYS, SEQUENCES = ("N", "T", "S"), ("S",), ("B", "T", "S")
# Query heads, KV heads; what they lie on; the strategy; the biases.
ON_MESHES = (
    slow((8, 4), ONE_AXIS[2], Ulysses(), (ALL_ROWS, KEYS, SEQUENCES)),
    slow((8, 4), ONE_AXIS[2], AllGatherKV(), (ALL_ROWS, KEYS, SEQUENCES)),
    ((8, 2), ONE_AXIS[4], Ulysses(), (ALL_ROWS, KEYS)),
    ((8, 2), ONE_AXIS[4], AllGatherKV(), (KEYS, SEQUENCES)),
    slow((6, 3), ONE_AXIS[4], Ulysses(), (ALL_ROWS, KEYS, SEQUENCES)),
    slow((8, 2), MESHES[2], AllGatherKV(), (ALL_ROWS, KEYS, SEQUENCES)),
    ((8, 4), MESHES[4], Ulysses(), (KEYS,)),
    slow((8, 4), MESHES[4], Ulysses(), (ALL_ROWS, SEQUENCES)),
    ((8, 4), MESHES[6], Hybrid(AllGatherKV(), Ulysses()), (KEYS,)),
    slow((8, 4), MESHES[6], Hybrid(AllGatherKV(), Ulysses()), (ALL_ROWS, SEQUENCES)),
)


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize(("heads", "where", "strategy", "of_axes"), ON_MESHES, ids=str)
def test_no_bit_depends_on_the_mesh(heads, where, strategy, of_axes):
    """Biases in one program, each with its own axes that devices share."""
    case = replace(CROSS, T=16, N=heads[0], K=heads[1])
    inputs = inputs_of(case, -60)
    attend = partial(
        dot_product_attention,
        kernel=Exact(),
        layout=where.on((AxisType.Auto, AxisType.Explicit)[case.K % 4 == 0]),
        strategy=strategy,
        is_causal=True,
    )
    sizes = {"B": case.B, "N": case.N, "T": 16, "S": 16}
    shapes = [[n if name in axes else 1 for name, n in sizes.items()] for axes in of_axes]
    biases = [bias_of(*shape) for shape in shapes]
    ours = device_gradients(attend, inputs, biases)
    for bias, own in zip(biases, ours, strict=True):
        check_equal(own, torch_exact(inputs, bias=bias, is_causal=True)["dbias"])


@pytest.mark.usefixtures("blocks_of_five")
@pytest.mark.parametrize(
    ("where", "order", "strategy", "shape"),
    (
        (ONE_AXIS[4], Zigzag(), AllGatherKV(), (1, N, 16, 16)),
        slow(ONE_AXIS[2], Striped(), AllGatherKV(), (1, 1, 16, 1)),
        slow(ONE_AXIS[2], Zigzag(), Ulysses(), (1, N, 16, 16)),
        slow(MESHES[6], Zigzag(), Hybrid(AllGatherKV(), Ulysses()), (1, N, 16, 16)),
    ),
    ids=str,
)
def test_no_bit_depends_on_the_order_of_the_tokens(where, order, strategy, shape):
    """Each device holds blocks from two places or more of the sequence, and tokens that pad it."""
    inputs, bias = inputs_of(replace(CROSS, T=16), -60), bias_of(*shape)
    layout = replace(where.on(), order=order)
    attend = partial(
        dot_product_attention, kernel=Exact(), layout=layout, strategy=strategy, is_causal=True
    )
    dealt = {name: order.reorder(x, 1, where.degree) for name, x in inputs.items()}
    (ours,) = device_gradients(attend, dealt, [along_tokens(order.reorder, bias, where)])
    expected = torch_exact(inputs, bias=bias, is_causal=True)["dbias"]
    check_equal(along_tokens(order.restore, ours, where), expected)


def along_tokens(change, bias, where):
    """A bias with its tokens in another order."""
    for axis in (2, 3):
        bias = bias if bias.shape[axis] == 1 else change(bias, axis, where.degree)
    return bias


@pytest.mark.usefixtures("blocks_of_five")
def test_rows_in_another_place_are_caught(monkeypatch):
    """The sums of the rows of a device as those of the first rows of the sequence."""

    def from_the_first(self, held, tokens, true=BiasSums.in_sequence):
        return true(self, held and Tokens(0, held.size), tokens)

    monkeypatch.setattr(BiasSums, "in_sequence", from_the_first)
    with pytest.raises(AssertionError, match="elements differ"):
        test_no_bit_depends_on_the_order_of_the_tokens(
            *(ONE_AXIS[2], Contiguous(), AllGatherKV(), (1, 1, 16, 1))
        )


def device_gradients(attend, inputs, biases):
    """The gradients of biases, each of a separate attention."""

    @jax.jit
    def run(query, key, value, grad, biases):
        def one(bias):
            _, pull = jax.vjp(lambda bias: attend(query, key, value, bias=bias), bias)
            return pull(grad)[0]

        return [one(bias) for bias in biases]

    return list(map(np.asarray, run(**inputs, biases=biases)))


def test_a_sum_of_roundings_is_caught(monkeypatch):
    """Each device's part as float32, added up by JAX: what a kernel without exact sums does."""
    total = BiasSums.total

    def rounded(self, axes, dtype):
        part = total(self, (), dtype)
        return jax.lax.psum(part, axes) if axes else part

    monkeypatch.setattr(BiasSums, "total", rounded)
    inputs, bias = inputs_of(CROSS), bias_of(1, 1, 1, S)
    attend = partial(dot_product_attention, kernel=Exact(), layout=ONE_AXIS[4].on(), is_causal=True)
    (ours,) = device_gradients(attend, inputs, [bias])
    expected = torch_exact(inputs, bias=bias, is_causal=True)["dbias"]
    assert np.allclose(ours, expected, rtol=1e-4)
    assert not compare_bits(ours, expected).equal


def summed(numbers, order, count):
    """Numbers `[n, t, s]` of sequences in some order, through sums of so many devices."""
    with jax.enable_x64(True):
        shape = (1, 1, 1, numbers.shape[2])
        devices = [BiasSums.of_nothing(shape, numbers.shape[1], numbers) for _ in range(count)]
        tokens = Tokens(0, numbers.shape[1]), Tokens(0, numbers.shape[2])
        add = jax.jit(lambda own, ds, i: own.add(ds, i, 0, *tokens))
        for place, i in enumerate(order):
            devices[place % count] = add(devices[place % count], numbers[i].T, i)
        largest = jnp.stack([x.exponent for x in devices]).max(0)
        digits = jnp.stack([jnp.stack(x.below(largest).digits) for x in devices]).sum(0)
        return np.asarray(BiasSums(largest, *digits).total((), jnp.dtype(jnp.float32)))


NUMBERS = np.random.default_rng(0).standard_normal((9, 3, 7)) * 2.0 ** np.random.default_rng(
    1
).integers(-90, 90, (9, 3, 7))


def test_any_order_and_any_devices():
    """Numbers of which most are far below the largest, each place with another largest."""
    every = summed(NUMBERS, range(9), 1)
    by_torch = exact_arithmetic.sum_of_digits(torch.from_numpy(NUMBERS)[:, None], (1, 1, 1, 7))
    check_equal(every, by_torch.float().numpy())
    rng = np.random.default_rng(2)
    for count in (1, 2, 5):
        check_equal(summed(NUMBERS, rng.permutation(9), count), every)
    exact = np.array(
        [float(sum(map(integer_oracle.Fraction, x))) for x in NUMBERS.reshape(27, 7).T]
    )
    assert np.allclose(every.ravel(), exact, rtol=2.0**-24)


def last_digit_to_nearest(x, exponent):
    y, digits = x * arithmetic.power_of_two(bias_gradient.DIGIT_BITS - exponent), []
    for round_ in (jnp.trunc, jnp.trunc, jnp.rint):
        digits.append(round_(y))
        y = (y - digits[-1]) * 2.0**bias_gradient.DIGIT_BITS
    return tuple(digits)


SUMS_OF_THREE_BYTES = (bias_gradient, "DIGIT_BITS", 8)
WRONG_SUMS = {
    "unit of the largest": [(bias_gradient, "_multiple", lambda e: e)],
    "digits that stay": [(BiasSums, "below", lambda self, e: self._replace(exponent=e))],
    # Of 26 bits each, the last digit is not seen in float32.
    "round to nearest": [SUMS_OF_THREE_BYTES, (bias_gradient, "_digits", last_digit_to_nearest)],
}


def forwards_and_backwards():
    return [summed(NUMBERS, order, 1) for order in (range(9), range(8, -1, -1))]


@pytest.mark.parametrize("wrong", WRONG_SUMS.values(), ids=WRONG_SUMS)
def test_wrong_sums_are_caught(wrong, monkeypatch):
    for mutation in wrong:
        monkeypatch.setattr(*mutation)
    assert not compare_bits(*forwards_and_backwards()).equal


def test_digits_of_any_size_have_no_order(monkeypatch):
    monkeypatch.setattr(*SUMS_OF_THREE_BYTES)
    check_equal(*forwards_and_backwards())


@pytest.mark.usefixtures("blocks_of_five")
def test_nan_comes_where_its_logits_are():
    """A NaN of one query, key, value or gradient; and one of a token that nobody attends to."""
    options = {"bias": bias_of(1, 1, T, S), "is_causal": True}
    rows, keys = np.mgrid[:T, :S]
    for name in INPUT_NAMES:
        inputs, token = CROSS.inputs(), 4 if name in ("query", "grad") else 3
        inputs[name][1, token, -1, 0] = np.nan
        inputs["key"][:, T:] = inputs["value"][:, T:] = np.nan
        ours = jax_exact(inputs, **options)
        check_equal(ours, torch_exact(inputs, **options))
        expected = (rows == token if name in ("query", "grad") else rows >= token) & (keys <= rows)
        assert np.array_equal(np.isnan(ours["dbias"][0, 0]), expected), name


def test_as_accurate_as_float32():
    case = replace(CROSS, T=96, S=96, N=4, K=2, H=32, V=32)
    rng = np.random.default_rng(3)
    inputs = {n: rng.standard_normal(x.shape).astype(np.float32) for n, x in case.inputs().items()}
    for shape in ((2, 4, 96, 96), (1, 1, 96, 96), (1, 4, 1, 96)):
        bias = bias_of(*shape)
        exact = torch_exact(inputs, bias=bias, is_causal=True)["dbias"]
        truth, plain = (
            float_gradient(inputs, bias, dtype) for dtype in (torch.float64, torch.float32)
        )
        errors = [np.sqrt(np.mean((x.astype(np.float64) - truth) ** 2)) for x in (exact, plain)]
        assert 0 < errors[0] < errors[1] / 2, shape


def float_gradient(inputs, bias, dtype):
    """Bias gradient of plain attention, by PyTorch's derivatives."""
    query, key, value, grad = (numpy_to_torch(x).to(dtype) for x in inputs.values())
    leaf = torch.from_numpy(bias).to(dtype).requires_grad_()
    key, value = (x.repeat_interleave(query.shape[2] // key.shape[2], 2) for x in (key, value))
    z = torch.einsum("btnh,bsnh->bnts", query, key) * query.shape[3] ** -0.5 + leaf
    z = z.masked_fill(~torch.ones(z.shape[2:], dtype=torch.bool).tril(), -torch.inf)
    out = torch.einsum("bnts,bsnh->btnh", z.softmax(-1), value)
    return torch.autograd.grad(out, leaf, grad)[0].numpy()


def test_nobody_asks():
    """Gradients without that of the bias do not compute its sums."""
    inputs = CROSS.inputs()
    operands = [jnp.asarray(inputs[name]) for name in INPUT_NAMES[:3]]
    bias = bias_of(1, 1, T, S)

    def loss(query, bias):
        return Exact()(query, *operands[1:], bias=bias).sum()

    alone = jax.make_jaxpr(jax.grad(loss))(operands[0], bias)
    both = jax.make_jaxpr(jax.grad(loss, (0, 1)))(operands[0], bias)
    digits = f"f64[1,1,{S},{T}]"
    assert digits in str(both)
    assert digits not in str(alone)


def test_where_nothing_is_to_attend():
    empty, query, bias = np.zeros((1, 0, 1, 4)), np.zeros((1, 3, 1, 4)), np.zeros((1, 1, 3, 1))
    inputs = dict(zip(INPUT_NAMES, (query, empty, empty, query), strict=True))
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    ours = jax_exact(inputs, bias=bias.astype(np.float32))
    check_equal(ours, torch_exact(inputs, bias=bias.astype(np.float32)))
    assert not ours["dbias"].any()


def test_a_bias_alone_is_sharded():
    """A bias on Explicit axes with whole operands: in the public function, not in the kernel."""
    inputs = replace(CROSS, T=16, S=16, K=N).inputs()
    bias = bias_of(1, N, 16, 16)
    expected = torch_exact(inputs, bias=bias)["dbias"]
    attend = partial(dot_product_attention, kernel=Exact(), strategy=AllGatherKV())
    grad_spec, bias_spec = PartitionSpec(None, "seq"), PartitionSpec(None, None, "seq")
    with jax.set_mesh(ONE_AXIS[8].mesh(AxisType.Explicit)):
        placed = jax.device_put(bias, bias_spec)
        given = {n: jax.device_put(x, PartitionSpec()) for n, x in inputs.items()}
        given["grad"] = jax.device_put(inputs["grad"], grad_spec)
        (ours,) = device_gradients(attend, given, [placed])
        check_equal(ours, expected)
        with pytest.raises(
            ValueError, match=r"bias float32\[.*@seq,16\] is sharded.*Write jax_seq"
        ):
            device_gradients(Exact(), given, [placed])
        query, key, value = (given[n] for n in ("query", "key", "value"))
        mask = jax.device_put(np.ones((1, 1, 16, 16), bool), bias_spec)
        with pytest.raises(ValueError, match=r"mask bool\[.*@seq,16\] is sharded.*Write jax_seq"):
            Exact()(query, key, value, mask=Mask(array=mask))
        segments = (jax.device_put(np.ones((2, 16), int), grad_spec), np.ones((2, 16), int))
        with pytest.raises(ValueError, match=r"segment_ids int.*@seq\] is sharded.*Write jax_seq"):
            Exact()(query, key, value, mask=Mask(segment_ids=segments))


class Unchecked(Exact):
    """Exact kernel in a `jax.shard_map` without the check of varying mesh axes."""

    check_vma = False  # pyright: ignore


def test_where_the_sum_would_round_it_is_refused():
    inputs, bias = replace(CROSS, K=N).inputs(), jnp.asarray(bias_of(1, 1, T, S))
    operands = [jnp.asarray(inputs[name]) for name in INPUT_NAMES[:3]]
    in_groups = replace(MESHES[6], shape=(4, 2)).on()

    def loss(bias, **options):
        layout = MeshLayout(mesh=ONE_AXIS[2].mesh())
        options = {"kernel": Exact(), "layout": layout} | options
        return dot_product_attention(*operands, bias=bias, **options).sum()

    refused = (
        (
            {"strategy": Ulysses(head_chunks=2), "layout": ONE_AXIS[1].on()},
            r"head_chunks = 2 .*bias \(1, 1, 8, 16\)",
        ),
        (
            {"strategy": Hybrid(AllGatherKV(), Ulysses(head_chunks=2)), "layout": in_groups},
            r"head_chunks = 2 .*bias \(1, 1, 8, 16\)",
        ),
        ({"strategy": Ring()}, "no gradient for bias where keys go round a ring of 2 devices"),
        ({"strategy": Hybrid(), "layout": in_groups}, "round a ring of 4 devices"),
        ({"kernel": Unchecked()}, r"bias \(1, 1, 8, 16\) .*check_vma=False"),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(jax.grad(partial(loss, **options)), bias)
        # Without a gradient, and with one that is stopped.
        jax.eval_shape(partial(loss, **options), bias)
        jax.eval_shape(jax.grad(lambda b, o=options: loss(jax.lax.stop_gradient(b), **o)), bias)


def test_more_summands_than_there_is_room_for():
    many = jax.ShapeDtypeStruct((1, 1 << 14, 1, 4), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"room for 2\^27 logits .* got 268435456 on 1 devices"):
        jax.eval_shape(jax.grad(lambda b, x: Exact()(x, x, x, bias=b).sum()), bias, many)
    x = torch.empty(1, 1, 1, 4).expand(1, 1 << 14, 1, 4)
    with pytest.raises(ValueError, match=r"room for 2\^27 logits .* Got 268435456"):
        torch_exact_attention(x, x, x, bias=torch.zeros(1, 1, 1, 1, requires_grad=True))


def test_pytorch_ranks_that_share_heads_are_refused():
    query, key, value, _ = map(numpy_to_torch, CROSS.inputs().values())
    bias = torch.zeros(1, 1, T, S, requires_grad=True)
    with pytest.raises(ValueError, match=r"bias \(1, 1, 8, 16\) has no gradient where ranks share"):
        torch_exact_attention(query, key, value, bias=bias, shared_by=object())
