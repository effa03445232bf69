"""Programs for TPUs, compiled without one: collectives, memory, kernels, and what hides what."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import DEVICES, compiled, hiding, most_bytes, program
from cases import slow
from wrong_rings import LateRing, UnrolledRing, WaitingRing

from jax_seqpar import (
    Blockwise,
    Contiguous,
    Logits,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    Ulysses,
    Zigzag,
    compiler_options,
)
from jax_seqpar.plan import (
    collectives,
    kernel_calls,
    kernels_under_transfers,
    layout_cycles,
    missing_compiler,
    received_bytes,
)

V5E_FLOPS_PER_CYCLE = 4 * 2 * 128**2  # four matrix units
MISSING = missing_compiler("v5e:2x4")

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.mark.parametrize(
    ("topology", "tokens"),
    (("v5e:2x4", 1 << 17), pytest.param("v5p:2x2x1", 1 << 17, marks=pytest.mark.slow)),
    ids=str,
)
def test_splash_forward_and_backward(topology, tokens):
    programs = [program(topology, tokens, gradients=gradients) for gradients in (False, True)]
    forward, both = compiled(*programs)
    assert collectives(forward["text"]) == {"all-to-all": 4}
    assert collectives(both["text"]) == {"all-to-all": 8}
    assert kernel_calls(forward["text"]) == 1
    assert kernel_calls(both["text"]) == 3
    assert "all-to-all-start" not in forward["text"]  # without the option they are synchronous
    for asked, result in zip(programs, (forward, both), strict=True):
        assert 0 < result["temporaries"] <= most_bytes(asked), asked
    one, degree = programs[0], DEVICES[topology]
    sent = one.strategy.traffic(one.query, one.key, one.key, degree=degree, itemsize=2)
    assert received_bytes(forward["text"], degree) == sent
    assert received_bytes(both["text"], degree) == 2 * sent
    if topology.startswith("v5e"):
        # Of the cycles of forward and backward at half the peak of the matrix units; 0.058 with
        # a quarter of the tokens.
        flops = 3.5 * 4 * tokens**2 / 2 * one.query[2] / degree * one.query[3]
        assert 0 < layout_cycles(both["text"]) <= 0.019 * flops / (V5E_FLOPS_PER_CYCLE / 2)


def array(*shape: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_all_features_of_splash():
    tokens = 8 * 1001  # no multiple of a block
    mask = Mask(
        is_causal=True,
        query_offset=64,
        local_window_size=(4000, 10),
        segment_ids=array(1, tokens, dtype=jnp.int32),
        key_value_seq_lengths=array(1, dtype=jnp.int32),
    )
    logits = Logits(soft_cap=30.0, sinks=array(16, dtype=jnp.float32))
    (result,) = compiled(program("v5e:2x4", tokens, gradients=True, mask=mask, logits=logits))
    assert collectives(result["text"]) == {"all-to-all": 8}
    assert kernel_calls(result["text"]) == 3


@pytest.mark.slow
def test_the_blockwise_kernel():
    asked = program("v5e:2x4", 1 << 17, gradients=True, kernel=Blockwise())
    (result,) = compiled(asked)
    assert collectives(result["text"]) == {"all-to-all": 8}
    assert kernel_calls(result["text"]) == 0
    assert 0 < result["temporaries"] <= most_bytes(asked)


@pytest.mark.parametrize("gradients", (False, pytest.param(True, marks=pytest.mark.slow)))
def test_a_transfer_hides_under_the_attention_of_another_slice(gradients):
    """Transfers hide under the attention of the other chunk of heads; one chunk hides none."""
    options = compiler_options("tpu")
    whole = program("v5e:2x4", 1 << 17, heads=32, kv_heads=16, compiler_options=options)
    sliced = replace(whole, strategy=Ulysses(2), gradients=gradients)
    texts = [result["text"] for result in compiled(*(() if gradients else (whole,)), sliced)]
    found = [(collectives(text), kernel_calls(text), len(hiding(text))) for text in texts]
    if gradients:
        assert found == [({"all-to-all": 16}, 6, 6)]
    else:
        assert found == [({"all-to-all": 4}, 1, 0), ({"all-to-all": 8}, 2, 2)]


def kernels_of_splash(text: str) -> list[int]:
    """How many kernels of splash run between start and end, for each asynchronous transfer.

    Splash is found by name: `kernels_under_transfers` also counts loops that are not attentions.
    """
    transfers = kernels_under_transfers(text).values()
    return [sum("splash" in name for name in under) for under in transfers]


def under_splash(text: str) -> list[bool]:
    """Whether splash runs between start and end, for each asynchronous transfer."""
    return [count > 0 for count in kernels_of_splash(text)]


@pytest.mark.parametrize("order", (Zigzag(), slow(Contiguous()), slow(Striped())), ids=str)
def test_every_transfer_of_a_ring_of_splash_hides_under_a_kernel(order):
    """Forward one before the loop and one in it; two in that of the gradients, two after it."""
    layout = MeshLayout(order=order)
    asked = program("v5e:2x4", 1 << 14, strategy=Ring(), layout=layout, gradients=True)
    (result,) = compiled(asked)
    # A device's own keys, those in the loop, and the last ones, which are not sent on: a kernel
    # forward, and two of the gradients.
    assert kernel_calls(result["text"]) == 9
    assert collectives(result["text"]) == {"collective-permute": 6}
    assert under_splash(result["text"]) == [True] * 6


BOTH_WAYS = Ring(bidirectional=True)
TWO_ROUNDS = Mask(is_causal=True, local_window_size=(4000, 0))


@pytest.mark.parametrize(
    ("strategy", "topology", "mask", "kernels", "under"),
    (
        (BOTH_WAYS, "v5e:2x4", Mask(is_causal=True), 6, [1, 1, 2, 2, 2]),
        slow(BOTH_WAYS, "v5p:2x2x1", Mask(is_causal=True), 4, [1, 1, 2]),
        slow(Ring(), "v5e:2x4", TWO_ROUNDS, 3, [1, 1]),
    ),
    ids=("both ways", "both ways, no loop", "two rounds, no loop"),
)
def test_every_transfer_hides_both_ways_and_without_a_loop(
    strategy, topology, mask, kernels, under
):
    """The first transfers hide under a device's own keys, others under all kernels of a round."""
    (result,) = compiled(program(topology, 1 << 14, strategy=strategy, mask=mask))
    assert kernel_calls(result["text"]) == kernels
    assert collectives(result["text"]) == {"collective-permute": len(under)}
    assert sorted(kernels_of_splash(result["text"])) == under


def test_a_transfer_hides_under_splash_and_not_under_the_merge():
    """Transfers of few KV heads hide under splash; the compiler would put them beside the merge."""
    asked = program("v5p:2x2x2", 1 << 14, heads=24, kv_heads=4, strategy=Ring())
    texts = [x["text"] for x in compiled(asked, replace(asked, strategy=LateRing()))]
    assert [under_splash(text) for text in texts] == [[True, True], [False, True]]


@pytest.mark.slow  # a strategy of this file alone
def test_an_unrolled_ring_of_splash_waits_for_transfers():
    """XLA starts all of them first, so that the ring holds what an all-gather does."""
    (result,) = compiled(program("v5e:2x4", 1 << 14, strategy=UnrolledRing()))
    assert kernel_calls(result["text"]) == 8
    assert len(under_splash(result["text"])) == 7
    assert not all(under_splash(result["text"]))


def test_every_transfer_of_a_ring_hides_under_an_attention():
    """Every transfer hides, and none in a ring that sends keys on after its attention to them."""
    forward = program("v5e:2x4", 1 << 12, kernel=Blockwise(), strategy=Ring())
    waits = replace(forward, strategy=WaitingRing())
    texts = [result["text"] for result in compiled(replace(forward, gradients=True), waits)]
    right, wrong = (kernels_under_transfers(text) for text in texts)
    # Forward one before the loop and one in it, then the loop's two, and two after it.
    assert collectives(texts[0]) == {"collective-permute": 6}
    assert len(right) == 6
    assert all(right.values())
    assert collectives(texts[1]) == {"collective-permute": 1}
    assert not any(wrong.values())
