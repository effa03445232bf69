"""Programs for eight GPUs, compiled without one: collectives, memory, kernels, and what hides what.

The compiler is that of the extra "cuda".
"""

from dataclasses import replace

import pytest
from ahead_of_time import KERNELS, Program, compiled, has_cuda, under_transfers
from questions import collectives

KERNEL = KERNELS["gpu"]

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not has_cuda(), reason="the compiler for GPUs is missing: pip install jax-seqpar[cuda]"
    ),
]


@pytest.mark.parametrize("fused", (True, False), ids=("cuDNN", "blockwise"))
def test_forward_and_backward(fused):
    program = Program("h100:8", 1 << 17, fused=fused)
    programs = [program, replace(program, gradients=True)]
    results = compiled(*programs)
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8)]
    assert [text.count(KERNEL) for text in texts] == ([1, 2] if fused else [0, 0])
    for asked, result in zip(programs, results, strict=True):
        assert 0 < result["temporaries"] <= asked.most_bytes, asked


def test_a_transfer_hides_under_the_attention_of_another_slice():
    """As on TPUs: with one slice of the heads nothing is hidden, with two every kernel is."""
    whole = Program("h100:8", 1 << 17, heads=32, kv_heads=16, hides_transfers=True)
    sliced = replace(whole, head_chunks=2)
    results = compiled(whole, sliced, replace(sliced, gradients=True))
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8, 16)]
    assert [text.count(KERNEL) for text in texts] == [1, 2, 4]
    assert [len(under_transfers(text, KERNEL)) for text in texts] == [0, 2, 4]
