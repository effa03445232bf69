"""Exact attention: PyTorch and JAX, written apart, agree in every bit; and nothing moves a bit."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import MESH_CASES, MESHES, ONE_AXIS, is_array, slow
from exact_cases import (
    CASE,
    CROSS,
    KEY,
    NAMES,
    OPTIONS,
    SHAPES,
    Cross,
    H,
    N,
    S,
    T,
    jax_exact,
    many_keys,
    torch_exact,
)
from flat_names import keywords_of
from jax.sharding import AxisType
from questions import compiled, output_and_gradients, sharded_inputs
from rank_functions import exact_on_ranks

import torch_ref.exact.arithmetic
from jax_seqpar import (
    AllGatherKV,
    Dropout,
    Exact,
    MeshLayout,
    Ulysses,
    dense_attention,
    dot_product_attention,
    exact_attention,
    head_keys,
    pad_to_degree,
)
from jax_seqpar.bridge import run_ranks
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.exact import arithmetic
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from jax_seqpar.parity.inputs import Arrays, Case, adversarial
from jax_seqpar.plan import collectives, temporaries

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

FEW_KV_HEADS = Case(batch=8, tokens=24, heads=16, kv_heads=2, head_dim=5)
# In float32 the shape of CASE, so that their programs are the same.
SPECIAL = {
    "float32": CASE,
    "bfloat16": replace(CASE, tokens=31, dtype="bfloat16"),
    "float16": replace(CASE, tokens=31, dtype="float16"),
}
# `test_exact_oracle` compares the others with integers, or another case is like them.
SOME_OPTIONS = [
    (slow if name in ("mask, scale", "bias, soft cap", "segments") else pytest.param)(options)
    for name, options in OPTIONS.items()
]
SOME_SHAPES = [
    (slow if name in ("multi-head", "multi-query", "bfloat16") else pytest.param)(case)
    for name, case in SHAPES.items()
]


@contextmanager
def blocks_of(tokens):
    """Blocks of the gradients so small that a few tokens have several, in both frameworks.

    For programs that are traced here for the first time: one for other blocks would run again.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (arithmetic, torch_ref.exact.arithmetic):
            patch.setattr(module, "BLOCK", tokens)
        yield


def check_equal(a, b):
    report = compare_bits(a, b)
    assert report.equal, str(report)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=OPTIONS)
def test_both_frameworks_with_every_option(options):
    inputs = CASE.inputs()
    ours = jax_exact(inputs, **options)
    check_equal(ours, torch_exact(inputs, **options))
    assert all(np.isfinite(x).all() for x in ours.values())
    assert all(len(np.unique(ours[name])) > 50 for name in ("forward", "dv"))


@pytest.mark.parametrize("case", SOME_SHAPES, ids=SHAPES)
def test_both_frameworks_with_every_shape(case):
    inputs = case.inputs()
    options = {"is_causal": case.is_causal}
    check_equal(jax_exact(inputs, **options), torch_exact(inputs, **options))


@pytest.mark.parametrize("dtype", ("bfloat16", slow("float16")))
def test_every_option_in_16_bits(dtype):
    """Every option at once has equal bits in 16 bits; causal attention is among the shapes."""
    inputs = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in CASE.inputs().items()}
    options = OPTIONS["all at once"]
    check_equal(jax_exact(inputs, **options), torch_exact(inputs, **options))


CHUNKS = ((1, 4), (5, 23), (8, 7))


@pytest.mark.parametrize(
    ("name", "chunks"),
    (
        slow("full", CHUNKS[0]),
        ("causal", CHUNKS[2]),
        slow("causal window", CHUNKS[1]),
        slow("segments", CHUNKS[2]),
        ("all at once", CHUNKS[0]),
        slow("all at once", CHUNKS[1]),
        slow("all at once", CHUNKS[2]),
    ),
    ids=str,
)
def test_no_bit_depends_on_the_chunks(name, chunks):
    inputs = CASE.inputs()
    query_chunk, key_chunk = chunks
    options = OPTIONS[name] | {"query_chunk": query_chunk, "key_chunk": key_chunk}
    check_equal(jax_exact(inputs, **options), jax_exact(inputs, **OPTIONS[name]))


def sharded(case, where, kind, strategy=None, **options):
    """Output and gradients through the public function, compiled."""
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=where.on(kind),
        strategy=strategy or Ulysses(),
        is_causal=case.is_causal,
    )
    return gradients_of(attend, case.inputs(), options)


def gradients_of(attend, inputs, options):
    """Output and gradients, those of a bias, too, compiled; options by flat names."""
    bias = {name: jnp.asarray(options[name]) for name in ("bias",) if name in options}

    @jax.jit
    def run(query, key, value, grad, bias):
        def function(query, key, value, bias):
            return attend(query, key, value, **keywords_of(**(options | bias)))

        out, pull = jax.vjp(function, query, key, value, bias)
        *gradients, of_bias = pull(grad)
        return out, *gradients, *of_bias.values()

    names = (*NAMES, *(f"d{name}" for name in bias))
    return dict(zip(names, map(np.asarray, run(**inputs, bias=bias)), strict=True))


# Every mesh, the strategies in turns, where KV heads are shared. Where they are not, there is less
# to go wrong: a few. One KV head on those that shard heads as well, where other devices share it,
# and on the most devices.
STRATEGIES = (Ulysses(), AllGatherKV())
ON_MESHES = (
    *(
        (slow if i in (0, 3, 7) else pytest.param)(
            FEW_KV_HEADS if i in (3, 7) else replace(FEW_KV_HEADS, batch=2),
            MESHES[i],
            STRATEGIES[i % 2],
        )
        for i in range(len(MESHES))
    ),
    slow(MESH_CASES["grouped"], MESHES[2], Ulysses()),
    slow(MESH_CASES["grouped"], MESHES[6], AllGatherKV()),
    *(slow(MESH_CASES["multi-query"], MESHES[i], AllGatherKV()) for i in (1, 5)),
    (replace(MESH_CASES["multi-query"], batch=2, tokens=16), MESHES[4], Ulysses()),
)


def test_what_rounds_to_zero_on_devices_that_share_heads():
    """Gradients below the least number of float16 are +0 of either sign, as on one device."""
    inputs = Case(batch=2, tokens=16, heads=8, kv_heads=2, head_dim=5, dtype="float16").inputs()
    inputs["grad"] = (inputs["grad"] * 2.0**-22).astype(np.float16)
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=ONE_AXIS[4].on(),
        is_causal=True,
    )
    ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
    check_equal(ours, torch_exact(inputs, is_causal=True))
    for name in ("dk", "dv"):
        x = np.asarray(ours[name])
        assert (x == 0).any(), name
        assert not np.signbit(x[x == 0]).any(), name


@pytest.mark.parametrize(("case", "where", "strategy"), ON_MESHES, ids=str)
def test_no_bit_depends_on_the_mesh(case, where, strategy):
    """Bits are equal on every mesh, with fewer KV heads than devices, too.

    Gradients of replicas of a KV head are added before any rounding.
    Blocks, the last one smaller, begin and end within the tokens of a device.
    """
    kind = (AxisType.Auto, AxisType.Explicit)[(MESHES.index(where) + case.kv_heads) % 2]
    with blocks_of(7):
        check_equal(sharded(case, where, kind, strategy), single_device(case, block=7))


@cache
def single_device(case, block):
    """Results of PyTorch on one device, with blocks of that size."""
    assert block == torch_ref.exact.arithmetic.BLOCK
    return torch_exact(case.inputs(), is_causal=case.is_causal)


@pytest.mark.slow
def test_every_option_on_a_mesh():
    """Masks and biases are sliced to the heads of each device, segments sent whole."""
    case = Case(batch=2, tokens=24, heads=8, kv_heads=2, head_dim=5)
    rng = np.random.default_rng(7)
    options = {
        "bias": rng.standard_normal((1, 8, 24, 1)).astype(np.float32),
        "mask": rng.random((2, 8, 24, 24)) < 0.7,
        "segment_ids": np.sort(rng.integers(0, 3, (2, 24)), axis=1).astype(np.int32),
        "local_window_size": (7, 7),
        "logits_soft_cap": 3.0,
        "scale": 0.4,
    }
    arrays = {name: jnp.asarray(x) if is_array(x) else x for name, x in options.items()}
    ours = sharded(case, ONE_AXIS[8], AxisType.Auto, **arrays)
    check_equal(ours, torch_exact(case.inputs(), is_causal=True, **options))


# Query heads and KV heads; what they lie on; whether by positions; slices of the heads, one after
# another on two devices, else side by side.
EVERYTHING = {
    "slices of the heads": slow((8, 4), ONE_AXIS[2], AxisType.Explicit, False, 2),
    "KV heads that do not divide": slow((6, 3), ONE_AXIS[4], AxisType.Auto, True, 1),
    "groups that do not divide": slow((6, 2), ONE_AXIS[4], AxisType.Explicit, False, 1),
    "more devices than KV heads, uneven": ((12, 6), ONE_AXIS[8], AxisType.Auto, False, 1),
    "shared KV heads": slow((8, 2), ONE_AXIS[8], AxisType.Explicit, True, 1),
    "three axes": ((16, 8), MESHES[4], AxisType.Explicit, False, 2),
}


@pytest.mark.parametrize(
    ("heads", "where", "kind", "by_positions", "head_chunks"), EVERYTHING.values(), ids=EVERYTHING
)
def test_all_at_once_on_a_mesh(heads, where, kind, by_positions, head_chunks):
    """Slopes, sinks and the keys of dropout go with their heads, and these with their sequences."""
    case = replace(CROSS, N=heads[0], K=heads[1])
    options = case.all_at_once(by_positions)
    arrays = {name: x for name, x in options.items() if is_array(x)}
    static = {name: x for name, x in options.items() if not is_array(x)}
    # A key as users have it; PyTorch takes its two words.
    rng = jax.random.wrap_key_data(arrays.pop("dropout_rng"))
    assert np.array_equal(jax.random.key_data(rng), options["dropout_rng"])

    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=where.on(kind),
        strategy=Ulysses(head_chunks, overlap=where is not ONE_AXIS[2]),
    )
    inputs = case.inputs()
    arrays = jax.tree.map(jnp.asarray, arrays)
    with blocks_of(5):
        ours = gradients_of(attend, inputs, {**arrays, **static, "dropout_rng": rng})
        check_equal(ours, torch_exact(inputs, **options))


def test_all_at_once_on_pytorch_ranks():
    """Query heads of one KV head on two ranks, each with its slopes, sinks and keys of dropout.

    Two blocks of queries and of keys, the second one smaller.
    """
    case = Cross(T=300, S=300, N=4, K=1, V=Cross.H)
    inputs, options = case.inputs(), case.all_at_once(by_positions=False)
    ranks = run_ranks(exact_on_ranks, 2, 2, inputs, options)
    ours = (torch.cat(parts, dim=1).numpy() for parts in zip(*ranks, strict=True))
    alone = torch_exact(inputs, **options)
    check_equal(dict(zip(NAMES, ours, strict=True)), {name: alone[name] for name in NAMES})


def test_keys_of_heads_under_vmap():
    """A sequence by itself drops what it drops among the others, if it is given their keys.

    A loop over the sequences, as without an option; see `attention._looped_by_vmap`.
    """
    inputs, keys = CROSS.inputs(), head_keys(jnp.asarray(KEY), CROSS.B, CROSS.N)

    def one(*rows):
        *operands, rng = (x[None] for x in rows)
        return exact_attention(*operands, dropout=Dropout(rate=0.4, rng=rng))[0]

    def attend(*operands):
        return jax.vmap(one)(*operands, keys)

    ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
    check_equal(ours, torch_exact(inputs, dropout_rate=0.4, dropout_rng=KEY))


def test_another_key_drops_other_weights():
    """PyTorch's results with two keys differ; it has the bits of JAX, and compiles nothing."""
    inputs = CROSS.inputs()
    one, other = (
        torch_exact(inputs, dropout_rate=0.6, dropout_rng=np.asarray(jax.random.key_data(key)))
        for key in jax.random.split(jax.random.key(3))
    )
    assert all(np.mean(one[name] == other[name]) < 0.1 for name in NAMES)


def test_special_numbers_in_slopes_and_sinks():
    """Bits are equal with infinities and NaN, also where dropout drops a weight that is NaN."""
    inputs = adversarial(SPECIAL["float32"].inputs())
    tokens = np.arange(S, dtype=np.int32)[None].repeat(2, 0)
    options = {
        "alibi_slopes": np.array([2.0**-140, np.inf, -2.0, 0.1], np.float32),
        "sinks": np.array([np.inf, 0.0, -np.inf, np.nan], np.float32),
        "key_value_seq_lengths": np.array([S, 0], np.int32),
        "positions": (tokens, tokens - 7),
        "is_causal": True,
        "dropout_rate": 0.4,
        "dropout_rng": np.array([1, 2], np.uint32),
    }
    ours = jax_exact(inputs, **options)
    check_equal(ours, torch_exact(inputs, **options))
    assert np.isnan(ours["forward"][0, :, [0, 3]]).all(), "of an infinite sink, and of a NaN"
    assert np.isfinite(ours["forward"][0, :-3, 2]).all()
    assert not ours["forward"][1].any(), "no key, so 0 whatever the sink"


@pytest.mark.parametrize("name", ("alibi_slopes", "sinks"))
def test_a_gradient_for_slopes_or_sinks_is_refused(name):
    query, key, value, _ = map(jnp.asarray, CROSS.inputs().values())

    def loss(x):
        return exact_attention(query, key, value, **keywords_of(**{name: x})).sum()

    with pytest.raises(ValueError, match=rf"no gradient for {name}\. Write jax\.lax\.stop_grad"):
        jax.grad(loss)(jnp.zeros(CROSS.N))


class Unchecked(Exact):
    """Exact kernel in a `jax.shard_map` without the check of varying mesh axes."""

    check_vma = False  # pyright: ignore


@pytest.mark.parametrize("vma", (slow(True), False))
def test_queries_and_keys_of_two_lengths(vma):
    rng = np.random.default_rng(1)
    shapes = ((2, 16, 8, 6), (2, 40, 4, 6), (2, 40, 4, 6), (2, 16, 8, 6))
    arrays = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    inputs: Arrays = dict(zip(INPUT_NAMES, arrays, strict=True))
    mesh = ONE_AXIS[8].mesh()
    attend = partial(
        dot_product_attention,
        kernel=exact_attention if vma else Unchecked(),
        layout=MeshLayout(mesh=mesh),
    )
    ours = output_and_gradients(attend)(**inputs)
    check_equal(dict(zip(NAMES, ours, strict=True)), torch_exact(inputs))


def test_a_wrapped_kernel_is_refused():
    """A wrapped kernel raises: it would round gradients of KV heads that devices share."""
    case = replace(FEW_KV_HEADS, batch=1, is_causal=False)
    attend = partial(dot_product_attention, layout=ONE_AXIS[8].on(), is_causal=False)
    query, key, value, _ = map(jnp.asarray, case.inputs().values())
    for wrap in (jax.jit, jax.checkpoint):
        message = r"got a function around Exact\(.*put jax.jit and jax.ch"
        with pytest.raises(ValueError, match=message):
            attend(query, key, value, kernel=wrap(exact_attention))
    around = jax.jit(jax.checkpoint(partial(attend, kernel=exact_attention)))
    results = output_and_gradients(around)(**case.inputs())
    ours = dict(zip(NAMES, map(np.asarray, results), strict=True))
    check_equal(ours, single_device(case, block=arithmetic.BLOCK))


WIDE = pytest.mark.parametrize("size", (slow(2**31 - 1), (2**40, 2**31)))


@WIDE
def test_a_window_wider_than_any_sequence(size):
    inputs = CASE.inputs()
    check_equal(jax_exact(inputs, local_window_size=size), jax_exact(inputs))


# The dense kernel's bits are the same where the compiler fuses both programs alike.
@pytest.mark.usefixtures("optimised")
@WIDE
def test_such_a_window_of_the_dense_kernel(size):
    operands = [jnp.asarray(CASE.inputs()[name]) for name in ("query", "key", "value")]
    assert jnp.array_equal(
        dense_attention(*operands, local_window_size=size), dense_attention(*operands)
    )


@pytest.mark.slow
def test_lengths_are_masks():
    inputs = CASE.inputs()
    t, s = np.array([5, 23]), np.array([23, 9])
    mask = (np.arange(T)[:, None] < t[:, None, None]) & (np.arange(S) < s[:, None, None])
    ours = jax_exact(
        inputs,
        query_seq_lengths=t.astype(np.int32),
        key_value_seq_lengths=s.astype(np.int32),
    )
    check_equal(ours, torch_exact(inputs, mask=mask[:, None]))


def test_the_order_of_the_tokens():
    """Permuted queries or keys have permuted rows of the same bits.

    But for the sums over them in the gradients, unless each stays in its block.
    """
    inputs = SHAPES["more than a block"].inputs()
    # As every shape is called, so that it is compiled once.
    jax_full, torch_full = (partial(f, is_causal=False) for f in (jax_exact, torch_exact))
    before = jax_full(inputs)
    tokens, block = inputs["key"].shape[1], arithmetic.BLOCK
    rng = np.random.default_rng(3)
    within = np.concatenate([rng.permutation(block), block + rng.permutation(tokens - block)])
    for order in (rng.permutation(tokens), within):
        for permuted, results, over_them in (
            (("key", "value"), ("dk", "dv"), {"dq"}),
            (("query", "grad"), ("forward", "dq"), {"dk", "dv"}),
        ):
            changed = inputs | {name: inputs[name][:, order] for name in permuted}
            expected = {name: x[:, order] if name in results else x for name, x in before.items()}
            ours = jax_full(changed)
            check_equal(ours, torch_full(changed))
            differ = {n for n in NAMES if not compare_bits(ours[n], expected[n]).equal}
            assert differ == (set() if order is within else over_them)


def test_sums_above_2_to_the_53():
    """Sums above 2^53 are held in two parts, and no bit depends on the tiles."""
    inputs = many_keys()
    ours = jax_exact(inputs, key_chunk=100)
    check_equal(ours, torch_exact(inputs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_ref.exact.arithmetic, "TILE", 64)
        check_equal(torch_exact(inputs), ours)


def test_tokens_that_are_added_change_no_bit():
    """Tokens of padding change no bit, with any value, on devices that share KV heads."""
    case = replace(FEW_KV_HEADS, batch=1, tokens=15, heads=4, kv_heads=1)
    inputs, where = case.inputs(), ONE_AXIS[4]
    query, key, value, grad = map(jnp.asarray, inputs.values())
    padded = pad_to_degree(query, key, value, degree=4)
    assert padded.query.shape[1] == 16
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=where.on(),
        **padded.keywords,
    )
    run = jax.jit(output_and_gradients(attend))
    expected = torch_exact(inputs)
    for junk in (1e12, np.nan):
        operands = (x.at[:, 15:].set(junk) for x in (padded.query, padded.key, padded.value))
        results = run(
            *operands, jnp.pad(grad, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=junk)
        )
        check_equal(
            dict(zip(NAMES, (np.asarray(x)[:, :15] for x in results), strict=True)), expected
        )


@pytest.mark.parametrize("empty", ("query", "key"))
def test_nothing_to_attend(empty):
    """Attention without queries is empty; without keys output and gradients are zeros."""
    inputs = CASE.inputs()
    names = ("query", "grad") if empty == "query" else ("key", "value")
    inputs |= {name: inputs[name][:, :0] for name in names}
    ours = jax_exact(inputs)
    check_equal(ours, torch_exact(inputs))
    assert not any(x.any() for x in ours.values())


@pytest.mark.parametrize("name", ("float32", "bfloat16", slow("float16")))
def test_special_numbers(name):
    """Zeros of both signs, subnormals, one-hot and equal rows, huge logits, NaN and infinity."""
    inputs = adversarial(SPECIAL[name].inputs())
    ours = jax_exact(inputs, is_causal=True)
    check_equal(ours, torch_exact(inputs, is_causal=True))
    for x in ours.values():
        assert np.isnan(x.astype(np.float32)).any()
        assert np.isfinite(x.astype(np.float32)).any()


def test_subnormal_inputs_are_zeros():
    """Keys that PyTorch would keep and XLA flushes, against queries that make them logits of 1."""
    inputs = CASE.inputs()
    inputs["query"] *= np.float32(2.0**124)
    inputs["key"] *= np.float32(2.0**-130)
    assert (inputs["key"] != 0).all()
    ours = jax_exact(inputs)
    check_equal(ours, torch_exact(inputs))
    mean = inputs["value"].astype(np.float64).mean(1, keepdims=True).repeat(N // 2, axis=2)
    assert np.abs(ours["forward"] - mean).max() < 1e-6, "every key counts the same"


def test_where_a_nan_goes():
    """A NaN in a query stays in its output row, one in a value in the rows that attend to it."""
    inputs = CASE.inputs()
    inputs["query"][0, 5, 1, 2] = np.nan
    inputs["value"][1, 4, 1, 3] = np.inf
    out = jax_exact(inputs, is_causal=True)["forward"]
    expected = np.zeros(out.shape, bool)
    expected[0, 5, 1, :] = True
    expected[1, 4:, 2:, :] = True  # query heads 2 and 3 read KV head 1
    assert np.array_equal(np.isnan(out), expected)
    assert set(out[expected].view(np.uint32)) == {0x7FC00000}


def test_no_negative_zero_and_no_subnormal():
    for x in jax_exact(adversarial(CASE.inputs())).values():
        assert not (np.signbit(x) & (x == 0)).any()
        assert not ((x != 0) & (np.abs(x) < 2.0**-126)).any()


def test_plain_attention_differs():
    """Most elements of plain attention differ, so the comparisons would find rounded sums."""
    inputs = Case(batch=2, tokens=64, heads=4, kv_heads=2, head_dim=32).inputs()
    *operands, grad = map(numpy_to_torch, inputs.values())
    leaves = [x.requires_grad_() for x in operands]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(*(x.transpose(1, 2) for x in leaves), is_causal=True, enable_gqa=True)
    theirs = (out, *torch.autograd.grad(out, leaves, grad.transpose(1, 2)))
    theirs = [theirs[0].transpose(1, 2), *theirs[1:]]
    ours = output_and_gradients(partial(dense_attention, is_causal=True))(**inputs)
    exact = torch_exact(inputs, is_causal=True)  # JAX has its bits, and would have to compile
    for name, a, b in zip(NAMES, ours, theirs, strict=True):
        for other in (a, torch_to_numpy(b.detach())):
            report = compare_bits(np.asarray(other), exact[name])
            assert report.differing > report.total / 2, name


def test_one_mathematical_function_on_both_sides_of_a_seam():
    """Two heads of one sequence, or one head of two sequences: the same numbers, the same bits."""
    case = Case(batch=4, tokens=S, heads=2, kv_heads=1, head_dim=H)
    inputs = case.inputs()
    # The shape of CASE, which is compiled already.
    as_heads = {name: np.concatenate([x[:2], x[2:]], axis=2) for name, x in inputs.items()}
    # One by PyTorch, which has the bits of JAX and need not be compiled.
    one, two = torch_exact(inputs, is_causal=True), jax_exact(as_heads, is_causal=True)
    for name in NAMES:
        assert np.array_equal(np.concatenate([one[name][:2], one[name][2:]], axis=2), two[name])


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("name", "kind", "shared"),
    (("grouped", AxisType.Explicit, set()), ("multi-query", AxisType.Auto, {"all-reduce"})),
)
def test_communication(name, kind, shared):
    """All-to-alls as of any attention; for shared KV heads the sums, in a loop over the keys."""
    where = ONE_AXIS[4]
    *inputs, grad = sharded_inputs(MESH_CASES[name], where, kind)
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=where.on(kind),
        is_causal=True,
    )
    if shared:
        assert collectives(compiled(attend, *inputs)) == {"all-to-all": 4}
    both = collectives(compiled(output_and_gradients(attend), *inputs, grad))
    assert both.pop("all-to-all") == 8
    assert set(both) == shared


def test_memory_is_linear_in_the_tokens():
    def bytes_held(tokens):
        case = Case(batch=1, tokens=tokens, heads=2, kv_heads=1, head_dim=16)
        run = output_and_gradients(partial(exact_attention, is_causal=True))
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.inputs().values()]
        return temporaries(jax.jit(run).lower(*shapes).compile())

    whole, half = bytes_held(8192), bytes_held(4096)
    assert whole < 2.2 * half
    assert whole < 8192 * 8192 * 4, "less than one matrix of weights"


def test_derivatives_that_it_does_not_have_are_refused():
    query, key, value, grad = map(jnp.asarray, CASE.inputs().values())

    def loss(query):
        return (exact_attention(query, key, value) * grad).sum()

    def gradient_norm(query):
        return (jax.grad(loss)(query) ** 2).sum()

    for second in (jax.hessian(loss), jax.grad(gradient_norm), jax.jit(jax.grad(gradient_norm))):
        with pytest.raises(ValueError, match=r"once, not twice, .*jax_seqpar\.dense_attention"):
            second(query)
    with pytest.raises(TypeError, match=r"forward-mode .* custom_vjp"):
        jax.jvp(loss, (query,), (query,))


def test_the_flag_of_the_user_is_left_alone():
    inputs = CASE.inputs()
    out = exact_attention(*map(jnp.asarray, list(inputs.values())[:3]))
    assert out.dtype == jnp.float32
    assert jnp.arange(3.0).dtype == jnp.float32
    assert not jax.config.read("jax_enable_x64")


def test_under_remat_and_scan():
    """Bits are equal under `jax.checkpoint` and scan; for vmap, `test_keys_of_heads_under_vmap`."""
    inputs = CASE.inputs()

    @jax.checkpoint
    def attend(*operands):
        return exact_attention(*(x[None] for x in operands), is_causal=True)[0]

    def by_scan(query, key, value):
        return jax.lax.scan(lambda _, x: (None, attend(*x)), None, (query, key, value))[1]

    ours = dict(zip(NAMES, output_and_gradients(by_scan)(**inputs), strict=True))
    check_equal(ours, jax_exact(inputs, is_causal=True))


@pytest.mark.parametrize(
    ("by_positions", "chunks", "block"), (slow(False, (3, 4), 4), (True, (8, 7), 7)), ids=str
)
def test_several_blocks_with_every_option(by_positions, chunks, block):
    """Dropout, slopes and lengths go by the numbers of the tokens, not by those in their block.

    Whole blocks, and a last one with fewer tokens. They are those of the gradients; no bit depends
    on the chunks.
    """
    inputs, options = CROSS.inputs(), CROSS.all_at_once(by_positions)
    query_chunk, key_chunk = chunks
    with blocks_of(block):
        ours = jax_exact(inputs, **options, query_chunk=query_chunk, key_chunk=key_chunk)
        check_equal(ours, torch_exact(inputs, **options))


def test_several_blocks_of_grouped_heads():
    """Blocks end with their query head; another size has other gradients, and the same output."""
    inputs = CASE.inputs()
    with blocks_of(8):
        # A chunk that no other test has.
        ours = jax_exact(inputs, is_causal=True, key_chunk=8)
        check_equal(ours, torch_exact(inputs, is_causal=True))
    with blocks_of(9):
        others = torch_exact(inputs, is_causal=True)
    check_equal(ours["forward"], others["forward"])
    assert not any(compare_bits(ours[name], others[name]).equal for name in NAMES[1:])
