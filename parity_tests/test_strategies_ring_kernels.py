"""Rings of the platforms' kernels, interpreted: values, gradients, roundings, blocks, the choice.

What a ring sends, and rings of the blockwise kernel, are in `test_strategies_ring`; when a
compiled ring sends it in `test_plan_tpu` and `test_plan_gpu`.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ONE_AXIS, slow
from features import Sizes, in_order, in_sequence, operands, run_jax, run_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh
from questions import QUICK, permuted_bytes
from wrong_rings import WRONG

from jax_seqpar import (
    AllGatherKV,
    Contiguous,
    Fused,
    Hybrid,
    Logits,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    TokenOrder,
    Triton,
    Zigzag,
    dot_product_attention,
)
from jax_seqpar.kernels import Kernel, choice, splash, splash_parts
from jax_seqpar.kernels.parts import Part
from jax_seqpar.mask import Spec, Tokens
from jax_seqpar.strategies.choice import Call
from torch_ref.masks import attends

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("less_optimised")]

TRITON, SPLASH = Triton(16, 16, interpret=True), Fused(interpret=True)
KERNELS: dict[str, Any] = {"triton": TRITON, "splash": SPLASH}
ORDERS = (Contiguous(), Zigzag(), Striped())
EPS = float(np.finfo(np.float32).eps)
# Two sequences, grouped queries, 48 tokens on each of two devices, 24 on each of four: no whole
# blocks of splash, in a zigzag no whole ones of `Triton`.
SIZES = Sizes(B=2, T=96, S=96, N=4, K=2, H=16, V=8)
SINKS = np.array([0.5, -1.0, 2.0, -np.inf], np.float32)


def documents(tokens: int) -> np.ndarray:
    """Documents of odd lengths, whose numbers come back."""
    return np.stack([np.arange(tokens) // 37, np.arange(tokens) // 23 % 3]).astype(np.int32)


CAUSAL: dict[str, Any] = {"is_causal": True}
ALL_OF_BOTH = CAUSAL | {
    "segment_ids": documents(96),
    "logits_soft_cap": 2.0,
    "sinks": SINKS,
    "key_value_seq_lengths": np.array([90, 50], np.int32),
    "query_seq_lengths": np.array([80, 96], np.int32),
    "scale": 0.3,
}
ALL_OF_TRITON = ALL_OF_BOTH | {
    "local_window_size": (40, 0),
    "alibi_slopes": np.array([0.5, 0.2, 0.1, 0.3], np.float32),
    "dropout_rate": 0.2,
    "dropout_rng": np.array([7, 11], np.uint32),
}
WINDOW = {"local_window_size": (40, 7), "query_offset": 3}
# By kernel and options, with the order of the tokens and the devices; of two a ring has no loop.
TABLE: dict[str, tuple[Kernel, dict[str, Any], TokenOrder, int]] = {
    "triton, all, contiguous": (TRITON, ALL_OF_TRITON, Contiguous(), 2),
    "triton, all, zigzag": (TRITON, ALL_OF_TRITON, Zigzag(), 4),
    "splash, all, contiguous": (SPLASH, ALL_OF_BOTH, Contiguous(), 2),
    "splash, all, zigzag": (SPLASH, ALL_OF_BOTH, Zigzag(), 2),
    "splash, window": (SPLASH, WINDOW, Contiguous(), 2),
    "splash, no mask": (SPLASH, {}, Striped(), 2),
}
SLOW: dict[str, tuple[Kernel, dict[str, Any], TokenOrder, int]] = {
    "triton, causal": (TRITON, CAUSAL, Zigzag(), 4),
    "triton, all, striped": (TRITON, ALL_OF_TRITON, Striped(), 4),
    "splash, all, four devices": (SPLASH, ALL_OF_BOTH, Zigzag(), 4),
    "splash, causal": (SPLASH, CAUSAL, Striped(), 4),
}


def ring(kernel: Any, degree: int, order: TokenOrder) -> Any:
    """A ring of four devices has keys both ways at once, another one one way."""
    layout, strategy = replace(ONE_AXIS[degree].on(), order=order), Ring(bidirectional=degree == 4)
    return partial(dot_product_attention, kernel=kernel, strategy=strategy, layout=layout)


def results(kernel: Any, degree: int, order: TokenOrder, asked: Any, inputs: Any) -> Any:
    """Output and gradients of a ring, in the order of the sequence."""
    dealt, arrays = in_order(order, degree, asked, inputs)
    got = run_jax(ring(kernel, degree, order), dealt, "", arrays, QUICK)
    return in_sequence(order, degree, got)


def largest_error(
    kernel: Any, asked: Any, order: TokenOrder, degree: int, sizes: Sizes = SIZES
) -> float:
    """Largest error of output and gradients, relative to the largest float64 entry by PyTorch."""
    inputs = operands(sizes)
    got = results(kernel, degree, order, asked, inputs)
    truth = run_torch(asked, "", inputs)
    without = ~truth["out"].any((2, 3))
    assert not np.asarray(got["out"])[without].any()
    assert not np.asarray(got["dq"])[without].any()
    errors = [
        np.abs(np.asarray(got[n], np.float64) - x).max() / np.abs(x).max() for n, x in truth.items()
    ]
    return float(np.max(errors))  # NaN if one is, unlike Python's


@pytest.mark.parametrize(
    ("kernel", "asked", "order", "degree"),
    (*TABLE.values(), *(slow(*case) for case in SLOW.values())),
    ids=(*TABLE, *SLOW),
)
def test_output_and_gradients(kernel, asked, order, degree):
    """Errors are within 16 units of float32 of the largest entry, as on one device."""
    assert largest_error(kernel, asked, order, degree) <= 16 * EPS


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of splash: three of queries and of keys, where a device has 384 tokens."""
    passes = splash.Passes(splash.Blocks(128, 256, 128), splash.Blocks(128, 128, 128))
    monkeypatch.setattr(splash_parts, "even_passes", lambda *sizes: passes)


@pytest.mark.parametrize(
    ("asked", "order"),
    ((CAUSAL, Zigzag()), (CAUSAL, Striped()), (CAUSAL | WINDOW, Contiguous())),
    ids=("zigzag", "striped", "window"),
)
@pytest.mark.usefixtures("small_blocks")
def test_splash_in_several_blocks(asked, order):
    sizes = replace(SIZES, B=1, T=1536, S=1536, N=1, K=1)
    assert largest_error(SPLASH, asked, order, 4, sizes) <= 16 * EPS


# ---------------------------------------------------------------- wrong rings


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    (
        ("splash", "residual of the last part"),
        ("triton", "gradients one trip short"),
        slow("triton", "the other half of a zigzag"),
    ),
)
def test_a_wrong_ring_is_caught(kernel, wrong, monkeypatch):
    WRONG[wrong](monkeypatch)
    assert largest_error(KERNELS[kernel], CAUSAL, Zigzag(), 2) > 1e-3


def test_splash_that_takes_a_zigzag_for_a_run_is_caught(monkeypatch):
    def places(plan: Any) -> Any:
        return jnp.pad(plan.queries.numbers - plan.keys.numbers[0], (0, 128 - 48))

    monkeypatch.setattr(splash_parts._Plan, "positions", property(places))
    assert largest_error(SPLASH, CAUSAL, Zigzag(), 2) > 1e-3


def test_triton_that_takes_a_zigzag_for_a_run_is_caught(monkeypatch):
    from jax_seqpar.kernels import triton_blocks

    right = triton_blocks._numbers
    monkeypatch.setattr(triton_blocks, "_numbers", lambda held: right(held)[:1])
    assert largest_error(TRITON, CAUSAL, Zigzag(), 2) > 1e-3


# ---------------------------------------------------------------- roundings


def rms_in_bfloat16(kernel: Any, degree: int) -> dict[str, float]:
    inputs = operands(replace(SIZES, T=128, S=128), "bfloat16")
    if degree == 1:
        got = run_jax(kernel, CAUSAL, "", inputs, QUICK)
    else:
        got = results(kernel, degree, Zigzag(), CAUSAL, inputs)
    return {
        n: float(np.sqrt(np.mean((np.asarray(got[n], np.float64) - x) ** 2)))
        for n, x in run_torch(CAUSAL, "", inputs).items()
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_parts_leave_the_kernel_in_float32(kernel, monkeypatch):
    """A ring of eight in bfloat16 errs at most 1.02 times as one device does, by root mean square.

    A ring whose kernel rounds its parts errs more, in the output and in the gradients.
    """
    attend: Any = KERNELS[kernel]
    one, eight = (rms_in_bfloat16(attend, degree) for degree in (1, 8))
    assert {n: x / one[n] for n, x in eight.items() if not x <= 1.02 * one[n]} == {}
    right_part, right_gradients = type(attend).attend_part, type(attend).part_gradients

    def rounded(x: Any) -> Any:
        return jax.lax.reduce_precision(x, 8, 7)  # bfloat16

    def attend_part(*args: Any) -> Part:
        out, residual = right_part(*args)
        return Part(rounded(out), residual)

    def part_gradients(*args: Any) -> Any:
        *of_operands, added = right_gradients(*args)
        return *map(rounded, of_operands), added

    monkeypatch.setattr(type(attend), "attend_part", attend_part)
    monkeypatch.setattr(type(attend), "part_gradients", part_gradients)
    jax.clear_caches()  # of the right ring, which JAX would take for a kernel that is equal
    wrong = rms_in_bfloat16(attend, 8)
    assert all(wrong[n] > 1.1 * x for n, x in one.items())


# ---------------------------------------------------------------- blocks


@settings(max_examples=20)
@given(
    index=st.integers(0, 3),
    other=st.integers(0, 3),
    blocks=st.sampled_from(((4, 6), (8, 8), (12, 4), (24, 24))),
    offset=st.integers(-30, 30),
    window=st.none() | st.integers(0, 30),
    order=st.sampled_from(ORDERS),
    side=st.integers(0, 1),
)
def test_a_schedule_has_the_blocks_of_the_mask(index, other, blocks, offset, window, order, side):
    """Each block meets those from the first with which it has a pair that attends to the last."""
    asked: Any = {"is_causal": True, "query_offset": offset}
    if order == Contiguous() and window is not None:
        asked["local_window_size"] = (window, 0)
    held = [order.tokens(24, i, 4) for i in (index, other)]
    spec = Spec(Mask(**asked), held_queries=held[0], held_keys=held[1])
    x = jnp.zeros((1, 24, 1, 8))
    plan = splash_parts._Plan.of(x, x, x, spec)
    queries, keys = blocks
    found: Any = plan.schedule(splash.Blocks(queries, keys, keys), side)
    some: Any = attends(96, 96, **asked)
    some = some.numpy().reshape(96, 96)[np.ix_(*(np.asarray(x.numbers) for x in held))]
    some = some.reshape(24 // queries, queries, 24 // keys, keys).any((1, 3))
    partners, meetings = map(np.asarray, found)
    for row, partner, meets in zip(some.T if side else some, partners, meetings, strict=True):
        needed = np.flatnonzero(row)
        hull = list(range(needed[0], needed[-1] + 1)) if len(needed) else []
        assert partner[meets == 1].tolist() == hull
        assert partner.min() >= 0
        assert partner.max() < len(row)


# ---------------------------------------------------------------- what it sends, the choice


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_ring_sends_as_much_with_every_kernel(kernel):
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES, "bfloat16"))
    attend = partial(ring(KERNELS[kernel], 4, Zigzag()), **CAUSAL)
    expected = Ring().traffic(q.shape, k.shape, v.shape, degree=4, itemsize=2)
    assert permuted_bytes(attend, q, k, v) == expected


def in_a_ring(platform: str, order: TokenOrder, strategy: Any, **asked: Any) -> Any:
    """The kernel of eight devices of a platform, and the reason for it."""
    device = jax.sharding.AbstractDevice("some chip", num_cores=1, platform=platform)
    axes = {"outer": 2, "inner": 4} if isinstance(strategy, Hybrid) else {"seq": 8}
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), abstract_device=device)
    x = jax.ShapeDtypeStruct((1, 1 << 12, 8, 128), jnp.bfloat16)
    spec = Spec(asked.pop("mask", Mask(is_causal=True)), asked.pop("logits", Logits()))
    call = Call(x, x, x, spec, mesh, MeshLayout(tuple(axes), order=order), **asked)
    kernel, why_not = call.kernel_of(strategy)
    assert why_not is None
    with_tokens = call.spec_for(strategy)
    options = {"residual": call.return_residual, "check_vma": call.check_vma}
    found = choice.choose(x, x, x, with_tokens, platform, **options)
    assert found.kernel == kernel
    return found


BOTH_SIDES = {"mask": Mask(local_window_size=(9, 4))}
CHOICES: dict[str, tuple[str, TokenOrder, Any, dict[str, Any], str, str]] = {
    "causal": ("tpu", Contiguous(), Ring(), {}, "splash", "supports all"),
    "zigzag": ("tpu", Zigzag(), Ring(), {}, "splash", "supports all"),
    "striped": ("tpu", Striped(), Ring(), {}, "splash", "supports all"),
    "window": ("tpu", Contiguous(), Ring(), BOTH_SIDES, "splash", "supports all"),
    "hybrid": ("tpu", Contiguous(), Hybrid(), {}, "splash", "supports all"),
    "window in a zigzag": (
        "tpu", Zigzag(), Ring(), BOTH_SIDES, "blockwise", "window_size of keys that are no run"
    ),
    "hybrid in a zigzag": (
        "tpu", Zigzag(), Hybrid(), {}, "blockwise", "keys that are not in ascending order is not"
    ),
    "residual": (
        "tpu", Zigzag(), Ring(), {"return_residual": True}, "blockwise", "return_residual is not"
    ),
    "types": (
        "tpu", Zigzag(), Ring(), {"check_vma": True}, "blockwise", "jax.shard_map that checks types"
    ),
    "ALiBi": (
        "tpu", Zigzag(), Ring(), {"logits": Logits(alibi_slopes=jnp.ones(8))}, "blockwise",
        "alibi_slopes is not supported by splash",
    ),
    "queries alone": (
        "tpu", Contiguous(), AllGatherKV(), {}, "blockwise", "a part of the queries with all keys"
    ),
    "GPU": ("gpu", Zigzag(), Ring(), BOTH_SIDES, "triton", "cuDNN: its output of 16 bits would be"),
    "GPU, hybrid": ("gpu", Zigzag(), Hybrid(), {}, "triton", "Triton supports all that is asked"),
    "GPU, all-gather": ("gpu", Striped(), AllGatherKV(), {}, "triton", "it counts them from 0"),
    "GPU, types": ("gpu", Zigzag(), Ring(), {"check_vma": True}, "blockwise", "cuDNN"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("platform", "order", "strategy", "asked", "name", "reason"), CHOICES.values(), ids=CHOICES
)
def test_the_kernel_that_is_chosen(platform, order, strategy, asked, name, reason):
    found = in_a_ring(platform, order, strategy, **asked)
    assert found.name == name
    assert reason in found.reason


def test_what_a_kernel_lacks_is_refused_by_name():
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))
    lacking: Any = (
        (
            SPLASH,
            Zigzag(),
            BOTH_SIDES,
            r"local_window_size of keys that are no run is not supported",
        ),
        (SPLASH, Zigzag(), {"logits": Logits(alibi_slopes=jnp.ones(4))}, r"alibi_slopes is not"),
        (TRITON, Zigzag(), {"bias": jnp.zeros((1, 1, 96, 96))}, r"bias is not supported by Triton"),
        (Fused("gpu"), Zigzag(), {}, r"Fused.*does not attend to a part of the keys"),
    )
    for kernel, order, asked, message in lacking:
        with pytest.raises(ValueError, match=f"{message}.*Write kernel=jax_seqpar.Blockwise"):
            ring(kernel, 4, order)(q, k, v, **asked)
    held = Spec(held_queries=Tokens(0, 96), held_keys=Tokens(0, 96))
    with pytest.raises(ValueError, match=r"a part of the keys is attended to by attend_part"):
        SPLASH.attend(q, k, v, held)
    large = [jnp.zeros((1, 16, 1, n)) for n in (640, 640, 640)]
    large = [x.astype(jnp.bfloat16) for x in large]
    assert SPLASH.why_not(*large, Spec()) is None
    assert "H = 640 and V = 640 of float32" in str(SPLASH.why_not(*large, held))


# ---------------------------------------------------------------- for a GPU that is not here


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_triton_lowers_parts_for_a_gpu(order):
    """Triton's parts lower to one kernel forward and two for gradients, of runs and of lists."""
    query, key = (jax.ShapeDtypeStruct((1, 256, n, 64), jnp.bfloat16) for n in (4, 2))

    def run(query: Any, key: Any, index: Any) -> Any:
        held = {f"held_{x}": order.tokens(256, index, 4) for x in ("queries", "keys")}
        mask = Mask(is_causal=True, local_window_size=(100, 0))
        logits = Logits(soft_cap=3.0, alibi_slopes=jnp.ones(4))
        spec, kernel = Spec(mask, logits, **held), Triton(platform="gpu")
        part = kernel.attend_part(query, key, key, spec)
        D = jnp.zeros(query.shape[:3])
        return part, kernel.part_gradients(query, key, key, spec, D, part.residual, query)

    traced = jax.jit(run).trace(query, key, jax.ShapeDtypeStruct((), jnp.int32))
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3
