"""The kernel for NVIDIA GPUs, interpreted: values, gradients, blocks, refusals, and its choice.

What a GPU's compiler makes of it is asked in `test_plan_gpu.py`, what a GPU computes in
`test_kernels_gpu.py`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS
from features import (
    FEWER_TRITON_FACTORS,
    TRITON_FACTORS,
    Sizes,
    as_torch,
    assert_as_near,
    cases,
    name_of,
    operands,
    options,
    run_jax,
    run_torch,
    sizes_of,
    with_junk,
)
from jax.sharding import AxisType
from questions import QUICK, error, output_and_gradients

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Dense,
    Dropout,
    Fused,
    Logits,
    Mask,
    Triton,
    choose_kernel,
    dot_product_attention,
    head_keys,
)
from jax_seqpar.kernels import choice, cudnn, triton_blocks, triton_plan
from jax_seqpar.mask import Spec, TokenList, Tokens
from jax_seqpar.mask.threefry import keep
from torch_ref.masks import attends

pytestmark = pytest.mark.usefixtures("less_optimised")

# Of the sizes of the table some are whole blocks and some are not.
interpreted = Triton(query_chunk=16, key_chunk=16, interpret=True)
EPS = float(np.finfo(np.float32).eps)


def right(case):
    """Asserts errors within 16 units of the largest entry, in the dtype of the operands."""
    given, inputs = options(case), operands(sizes_of(case), case["dtype"])
    if case["junk"]:
        inputs = with_junk(inputs, given)
    got = run_jax(interpreted, given, "triton", inputs, QUICK)
    truth = run_torch(given, "triton", inputs)
    assert_as_near(got, got, truth, copies=1)
    without = ~truth["out"].any((2, 3))
    assert not np.asarray(got["out"])[without].any()
    assert not np.asarray(got["dq"])[without].any()
    return without.any()


def test_every_pair_of_features():
    without = [right(case) for case in cases(FEWER_TRITON_FACTORS)]
    assert any(without)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(TRITON_FACTORS), ids=name_of)
def test_every_pair_of_all_levels(case):
    right(case)


def test_weights_beside_a_large_logit_that_rows_have_in_common():
    """Dot products 2^17 + n/64, which float32 holds, and whose log of a sum it does not.

    Weights had from that log would be off by up to 1/128 of themselves. The bound is that of the
    table, 16 units of the largest entry; of dq, whose sums cancel where keys are 2^9, of that.
    """
    inputs = operands(Sizes(B=1, T=20, S=40, N=2, K=1, H=16, V=16))
    query, key = (np.round(8 * x / 4) / 8 for x in inputs[:2])
    query[..., 0], key[..., 0] = 2.0**8, 2.0**9
    inputs = [query.astype(np.float32), key.astype(np.float32), *inputs[2:]]
    given = {"scale": 1.0, "is_causal": True, "query_offset": 20}
    got = run_jax(interpreted, given, "triton", inputs, QUICK)
    for name, expected in run_torch(given, "triton", inputs).items():
        largest = 2.0**9 if name == "dq" else np.max(np.abs(expected))
        assert error(got[name], expected) <= 16 * EPS * largest, name


@pytest.mark.parametrize("largest", (1e5, 1e9, 1e30))
def test_the_key_of_a_logit_above_all_others_is_the_output(largest):
    """Query t has the output of key 5 t % 32, whose logit is `largest`, and the others' 0."""
    query = np.zeros((1, 32, 1, 32), np.float32)
    query[0, np.arange(32), 0, 5 * np.arange(32) % 32] = largest
    key = np.eye(32, dtype=np.float32)[None, :, None]
    value = np.random.default_rng(0).standard_normal((1, 32, 1, 16)).astype(np.float32)
    out, *gradients = output_and_gradients(partial(interpreted, logits=Logits(scale=1.0)))(
        query, key, value, np.ones_like(value)
    )
    assert np.array_equal(out[0, :, 0], value[0, 5 * np.arange(32) % 32, 0])
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("sink", (-1e10, -1e30, 1e10, 3e38))
def test_a_sink_far_from_all_logits_weighs_nothing_or_everything(sink):
    inputs = operands(Sizes(B=1, T=20, S=40, N=2, K=1, H=16, V=16))
    got, without = (
        output_and_gradients(partial(interpreted, logits=logits))(*inputs)
        for logits in (Logits(sinks=jnp.full(2, sink)), Logits())
    )
    for x, y in zip(got, without, strict=True):
        assert np.array_equal(x, y if sink < 0 else np.zeros_like(y))


def test_a_part_of_the_tokens_and_the_log_of_the_sums():
    """Output, residual and their gradients, for a part that starts at traced tokens, in 64 bits.

    The bound is 16 units of float32 of the largest entry, as in the table.
    """
    B, N, T, S = 2, 4, 20, 37
    shapes = ((B, T, N, 16), (B, S, 2, 16), (B, S, 2, 24), (B, T, N, 24), (B, T, N))
    rng = np.random.default_rng(0)
    *inputs, out_gradient, lse_gradient = (rng.standard_normal(x) for x in shapes)
    documents = np.sort(rng.integers(0, 3, (B, 70)), axis=1)
    slopes, sinks = np.linspace(0.1, 0.4, N), rng.standard_normal(N)
    lengths: Any = np.array([60, 30], np.int32)
    mask = Mask(
        is_causal=True,
        query_offset=3,
        segment_ids=(documents[:, 2:52], documents),
        key_value_seq_lengths=lengths,
    )

    @partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
    def run(kernel, dtype, starts, mask):
        def attend(query, key, value, slopes, sinks):
            held = Tokens(starts[0], T), Tokens(starts[1], S)
            dropout = Dropout(0.2, head_keys(jnp.array([3, 4], jnp.uint32), B, N))
            spec = Spec(mask, Logits(None, 5.0, None, slopes, sinks), dropout, *held)
            out, residual = kernel.attend(query, key, value, spec)
            # The log of 0, whose gradient a caller leaves out.
            return out, jnp.where(residual.total == 0, 0, residual.lse)

        x = [jnp.asarray(x, dtype) for x in (*inputs, slopes, sinks)]
        results, pull = jax.vjp(attend, *x)
        return results, pull((jnp.asarray(out_gradient, dtype), jnp.asarray(lse_gradient, dtype)))

    with jax.enable_x64(True):
        mask = jax.tree.map(jnp.asarray, mask)
        starts = jnp.array([30, 23], jnp.int32)
        got = run(interpreted, jnp.float32, starts, mask)
        truth = run(Dense(), jnp.float64, starts, mask)
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(truth[1][:1]))
    for x, expected in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
        bound = 16 * EPS * max(np.max(np.abs(expected)), largest)
        assert error(x, np.asarray(expected)) <= bound


def test_it_drops_the_weights_that_every_kernel_drops():
    """Dropped weights are the zeros of the output where the values are a unit matrix."""
    shape, keys = (2, 32, 2, 16), head_keys(jnp.array([5, 6], jnp.uint32), 2, 2)
    query, key = jax.random.normal(jax.random.key(0), (2, *shape))
    value = jnp.broadcast_to(jnp.eye(32)[None, :, None], (2, 32, 2, 32))
    attend = partial(interpreted, dropout=Dropout(0.4, keys))
    out = jax.jit(attend, compiler_options=QUICK)(query, key, value)
    numbers = jnp.arange(32)
    assert np.array_equal(out.transpose(0, 2, 1, 3) != 0, keep(keys, 0.4, numbers, numbers))


@pytest.mark.parametrize("strategy", (None, AllGatherKV()), ids=("Ulysses", "AllGatherKV"))
def test_four_devices(strategy):
    """Errors on four devices are within 16 units of the largest entry, as in the table: XLA:CPU,
    which interprets the kernel, adds up D in an order that depends on the number of heads."""
    inputs = operands(Sizes(B=1, T=64, S=64, N=8, K=4, H=16, V=16))
    documents = jnp.asarray(np.sort(np.arange(64) // 24)[None], jnp.int32)
    asked = {"mask": Mask(is_causal=True, segment_ids=documents)}
    strategies = {} if strategy is None else {"strategy": strategy}
    sharded = partial(
        dot_product_attention, kernel=interpreted, layout=ONE_AXIS[4].on(), **strategies, **asked
    )

    got = output_and_gradients(sharded, QUICK)(*inputs)
    given = {"is_causal": True, "segment_ids": np.asarray(documents)}
    truth = run_torch(given, "triton", inputs)
    for x, expected in zip(got, truth.values(), strict=True):
        assert error(x, expected) <= 16 * EPS * np.max(np.abs(expected))


MASKS = {
    "causal": Mask(is_causal=True, query_offset=-20),
    "window": Mask(local_window_size=(20, 5)),
    "lengths": Mask(
        is_causal=True,
        query_seq_lengths=jnp.array([70, 0]),
        key_value_seq_lengths=jnp.array([17, 96]),
    ),
    "segments": Mask(segment_ids=jnp.arange(192).reshape(2, 96) // 40),
    "positions": Mask(is_causal=True, positions=jnp.arange(192).reshape(2, 96) * 7 % 96),
}


@pytest.mark.parametrize("name", MASKS)
def test_blocks_meet_where_some_query_attends(name, monkeypatch):
    """A range is from the first block of which some token attends to the last; empty for none.

    Inside of it is a run of blocks of which all tokens attend, the first one where there are
    several: of masks that are one run each, all of those blocks.
    """
    # So few that those of segments and positions are found in several parts.
    monkeypatch.setattr(triton_blocks, "PAIRS_AT_ONCE", 200)
    mask, blocks = MASKS[name], triton_plan.Blocks(16, 32, 4, 1)
    fields = ("is_causal", "query_offset", "local_window_size", "positions", "segment_ids")
    asked = {n: getattr(mask, n) for n in (*fields, "query_seq_lengths", "key_value_seq_lengths")}
    some = attends(96, 96, **as_torch({n: x for n, x in asked.items() if x is not None}))
    assert some is not None
    pairs = np.broadcast_to(some.numpy(), (2, 1, 96, 96))[:, 0].reshape(2, 6, 16, 3, 32)
    some: Any = pairs.any((2, 4))
    every: Any = pairs.all((2, 4))
    sides: Any = (("queries", 2), ("keys", 1))
    for side, axis in sides:
        grid = triton_blocks.Grid(side, blocks, (2, 96, 2, 16), (2, 96, 1, 16))
        ranges = np.moveaxis(np.asarray(jax.jit(grid._ranges)(Spec(mask))), -1, 0)
        low, high, full_low, full_high = ranges
        count = some.shape[axis]
        first = np.where(some.any(axis), some.argmax(axis), 0)
        last = np.where(some.any(axis), count - np.flip(some, axis).argmax(axis), 0)
        assert np.array_equal(high, last)
        assert np.array_equal(np.where(high > 0, low, 0), first)
        numbers = np.expand_dims(np.arange(count), 2 - axis)
        inside = numbers >= np.expand_dims(full_low, axis)
        inside &= numbers < np.expand_dims(full_high, axis)
        assert not (inside & ~every).any()
        in_a_run = every & (np.diff(every.astype(int), axis=axis, prepend=0) == 1)
        if (in_a_run.sum(axis) <= 1).all():
            assert np.array_equal(inside, every)


SHAPES = [jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)] * 3
FLOAT32 = [jax.ShapeDtypeStruct((2, 128, 2, 80), jnp.float32)] * 3


def shape(*sizes: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("arrays", "asked"),
    (
        (FLOAT32, {}),
        (SHAPES, {"mask": Mask(segment_ids=shape(2, 128))}),
        (SHAPES, {"mask": Mask(is_causal=True, positions=shape(2, 128))}),
        (SHAPES, {"mask": Mask(is_causal=True, query_offset=3)}),
        (SHAPES, {"logits": Logits(soft_cap=2.0, sinks=shape(2, dtype=jnp.float32))}),
        (SHAPES, {"logits": Logits(alibi_slopes=shape(2, dtype=jnp.float32))}),
        (SHAPES, {"dropout": Dropout(0.1, shape(2, dtype=jnp.uint32))}),
    ),
    ids=("float32", "documents", "positions", "offset", "cap, sinks", "ALiBi", "dropout"),
)
def test_it_is_chosen_on_a_gpu_where_cudnn_lacks_something(arrays, asked):
    choice = choose_kernel(*arrays, platform="gpu", **asked)
    assert (choice.name, choice.kernel) == ("triton", Triton(platform="gpu"))
    assert choice.reason.startswith("gpu: ")
    assert choice.reason.endswith("; Triton supports all that is asked")
    assert choose_kernel(*arrays, platform="cpu", **asked).name == "blockwise"


def test_it_is_chosen_for_parts_and_residuals_but_not_where_types_are_checked():
    def chosen(platform, arrays=SHAPES, held=(None, None), **asked):
        spec = Spec(Mask(is_causal=True), held_queries=held[0], held_keys=held[1])
        query, key, value = arrays
        return choice.choose(query, key, value, spec, platform, **asked).kernel

    run, listed = Tokens(0, 16), TokenList(jnp.arange(16))
    for held in ((run, None), (listed, None), (run, run), (listed, listed)):
        assert chosen("gpu", held=held) == Triton(platform="gpu")
        assert chosen("cpu", held=held) == Blockwise()
        assert chosen("gpu", held=held, check_vma=True) == Blockwise(1024, 1024)
    for arrays in (SHAPES, FLOAT32):
        assert chosen("gpu", arrays, residual=True) == Triton(platform="gpu")
        assert chosen("gpu", arrays, check_vma=True) == Blockwise(1024, 1024)


@pytest.mark.parametrize(
    ("capability", "name"),
    (((7, 5), "blockwise"), ((8, 0), "triton"), ((8, 9), "blockwise"), ((9, 0), "triton")),
    ids=str,
)
def test_it_is_chosen_where_its_blocks_have_room(capability, name):
    with cudnn.assume_compute_capability(capability):
        assert choose_kernel(*FLOAT32, platform="gpu", is_causal=True).name == name
        query, key, value = FLOAT32
        reason = Triton(platform="gpu").why_not(query, key, value, Spec())
        assert (reason is None) == (capability >= (8, 0))


def test_an_outer_shard_map_gets_the_blockwise_kernel(monkeypatch):
    """An outer shard_map gets the blockwise kernel: Pallas says nothing of varying mesh axes."""
    chosen = []

    def choose_for_gpu(query, key, value, spec, platform, **options):
        chosen.append(choose(query, key, value, spec, "gpu", **options).kernel)
        return choice.KernelChoice(Blockwise(), "blockwise", "")

    choose = choice.choose
    monkeypatch.setattr(choice, "choose", choose_for_gpu)
    mesh = jax.make_mesh((2, 4), ("stage", "seq"), axis_types=(AxisType.Auto,) * 2)
    x = jnp.zeros((2, 16, 4, 16))
    attend = partial(dot_product_attention, is_causal=True)
    outer = jax.shard_map(
        attend, mesh=mesh, in_specs=jax.P("stage"), out_specs=jax.P("stage"), axis_names={"stage"}
    )
    with jax.set_mesh(mesh):
        jax.jit(outer)(x, x, x)
        jax.jit(attend)(x, x, x)
    assert chosen == [Blockwise(1024, 1024), Triton(platform="gpu")]


def test_what_it_lacks_is_refused(unchecked_shapes):
    query, key, value = jnp.zeros((3, 1, 8, 1, 16))
    lacking: Any = (
        ({"bias": jnp.zeros((1, 1, 8, 8))}, "bias is not supported by Triton"),
        ({"mask": jnp.ones((1, 1, 8, 8), bool)}, "mask is not supported by Triton"),
    )
    for asked, word in lacking:
        with pytest.raises(ValueError, match=f"{word}.*Write kernel=jax_seqpar.Blockwise"):
            interpreted(query, key, value, **asked)
    with pytest.raises(ValueError, match="H = 264 and V = 264 are not supported by Triton"):
        interpreted(*jnp.zeros((3, 1, 8, 1, 264)))
    with jax.enable_x64(True), pytest.raises(ValueError, match="dtype float64 is not supported"):
        interpreted(*jnp.zeros((3, 1, 8, 1, 16), jnp.float64))
    with pytest.raises(ValueError, match=r"cpu is not supported by Triton.*interpret=True"):
        Triton()(query, key, value)
    with pytest.raises(ValueError, match=r"power of two, at least 16.*Write key_chunk=64"):
        Triton(key_chunk=48)
    with pytest.raises(ValueError, match=r"Triton\(interpret=True\) has the first derivative only"):
        jax.hessian(lambda x: interpreted(x, key, value).sum())(query)
    own = partial(jax.shard_map, mesh=ONE_AXIS[4].mesh(), in_specs=None, out_specs=None)
    spec = jax.P(None, None, "seq")
    with pytest.raises(ValueError, match="Write check_vma=False"):
        own(interpreted, in_specs=spec, out_specs=spec)(*jnp.zeros((3, 1, 8, 4, 16)))


def test_nothing_to_attend_to():
    """Arrays without tokens, for which there is no block."""
    query, key = jnp.ones((1, 3, 2, 16)), jnp.ones((1, 0, 2, 16))
    assert not interpreted(query, key, key).any()
    assert interpreted(query[:, :0], key, key).shape == (1, 0, 2, 16)
    assert replace(interpreted, interpret=False) != Fused()
