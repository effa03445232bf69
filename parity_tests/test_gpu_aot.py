"""Programs for eight GPUs, compiled without one: collectives, memory, kernels, and what hides what.

The compiler is that of the extra "cuda".
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import KERNELS, Program, compiled, gpus, has_cuda, under_transfers
from jax.sharding import SingleDeviceSharding
from questions import collectives

from jax_seqpar.exact.arithmetic import flush, round32

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


def test_the_rounding_of_exact_attention_survives_the_compiler():
    """And a conversion and back does not: if it did, nothing would be shown."""

    def round_by_conversion(x):
        return flush(x).astype(jnp.float32)

    def program(rounding):
        with jax.enable_x64(True):
            x = jax.ShapeDtypeStruct((64,), jnp.float64, sharding=SingleDeviceSharding(gpus()[0]))
            widened = jax.jit(lambda x: rounding(x).astype(jnp.float64))
            text = widened.lower(x).compile().as_text()
        assert text
        return text

    assert "f32[64]" in program(round32)
    assert "f32[64]" not in program(round_by_conversion)
