"""Programs for TPUs, compiled without one: collectives, memory, kernels, and what hides what."""

from dataclasses import replace
from typing import Any

import pytest
from ahead_of_time import KERNELS, Program, compiled, libtpu, under_transfers
from questions import collectives

KERNEL = KERNELS["tpu"]

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        libtpu() is None,
        reason="the compiler for TPUs is missing: pip install libtpu, or set TPU_LIBRARY_PATH",
    ),
]


@pytest.mark.parametrize(
    ("topology", "tokens"),
    (("v5e:2x4", 1 << 17), pytest.param("v5p:2x2x1", 1 << 17, marks=pytest.mark.slow)),
    ids=str,
)
def test_splash_forward_and_backward(topology, tokens):
    programs = [Program(topology, tokens, gradients=gradients) for gradients in (False, True)]
    forward, both = compiled(*programs)
    assert collectives(forward["text"]) == {"all-to-all": 4}
    assert collectives(both["text"]) == {"all-to-all": 8}
    assert forward["text"].count(KERNEL) == 1
    assert both["text"].count(KERNEL) == 3
    assert "all-to-all-start" not in forward["text"]  # without the option they are synchronous
    for program, result in zip(programs, (forward, both), strict=True):
        assert 0 < result["temporaries"] <= program.most_bytes, program


def test_all_features_of_splash():
    options: dict[str, Any] = {
        "query_offset": 64,
        "local_window_size": (4000, 10),
        "logits_soft_cap": 30.0,
        "sinks": "array",
        "segment_ids": "array",
        "key_value_seq_lengths": "array",
    }
    # Tokens that are no multiple of a block.
    (result,) = compiled(Program("v5e:2x4", 8 * 1001, gradients=True, options=options))
    assert collectives(result["text"]) == {"all-to-all": 8}
    assert result["text"].count(KERNEL) == 3


@pytest.mark.slow
def test_the_blockwise_kernel():
    program = Program("v5e:2x4", 1 << 17, gradients=True, fused=False)
    (result,) = compiled(program)
    assert collectives(result["text"]) == {"all-to-all": 8}
    assert result["text"].count(KERNEL) == 0
    assert 0 < result["temporaries"] <= program.most_bytes


def test_a_transfer_hides_under_the_attention_of_another_slice():
    """With one slice of the heads there is no attention to hide it under; with two there is."""
    whole = Program("v5e:2x4", 1 << 17, heads=32, kv_heads=16, hides_transfers=True)
    sliced = replace(whole, head_chunks=2)
    results = compiled(whole, sliced, replace(sliced, gradients=True))
    texts = [result["text"] for result in results]
    all_to_alls = [collectives(text) for text in texts]
    assert all_to_alls == [{"all-to-all": n} for n in (4, 8, 16)]
    assert [text.count(KERNEL) for text in texts] == [1, 2, 6]
    assert [len(under_transfers(text, KERNEL)) for text in texts] == [0, 2, 6]
