"""Programs for eight GPUs, compiled without one: collectives, memory, kernels, and what hides what.

The compiler is that of the extra "cuda".
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import compiled, hiding, most_bytes, program
from jax.sharding import SingleDeviceSharding

from jax_seqpar import Blockwise, Fused, Ulysses, compiler_options
from jax_seqpar.exact.arithmetic import flush, round32
from jax_seqpar.plan import collectives, devices, kernel_calls, missing_compiler, received_bytes

MISSING = missing_compiler("h100:8")

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]


@pytest.mark.parametrize("kernel", (Fused("gpu"), Blockwise()), ids=("cuDNN", "blockwise"))
def test_forward_and_backward(kernel):
    forward = program("h100:8", 1 << 17, kernel=kernel)
    programs = [forward, replace(forward, gradients=True)]
    results = compiled(*programs)
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8)]
    assert [kernel_calls(text) for text in texts] == ([1, 2] if kernel == Fused("gpu") else [0, 0])
    for asked, result in zip(programs, results, strict=True):
        assert 0 < result["temporaries"] <= most_bytes(asked), asked
    sent = forward.strategy.traffic(forward.query, forward.key, forward.key, degree=8, itemsize=2)
    assert [received_bytes(text, 8) for text in texts] == [sent, 2 * sent]


def test_a_transfer_hides_under_the_attention_of_another_slice():
    """As on TPUs: with one slice of the heads nothing is hidden, with two every kernel is."""
    options = compiler_options("gpu")
    whole = program("h100:8", 1 << 17, heads=32, kv_heads=16, compiler_options=options)
    sliced = replace(whole, strategy=Ulysses(2))
    results = compiled(whole, sliced, replace(sliced, gradients=True))
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8, 16)]
    assert [kernel_calls(text) for text in texts] == [1, 2, 4]
    assert [len(hiding(text)) for text in texts] == [0, 2, 4]


def test_the_rounding_of_exact_attention_survives_the_compiler():
    """And a conversion and back does not: if it did, nothing would be shown."""

    def round_by_conversion(x):
        return flush(x).astype(jnp.float32)

    def text_of(rounding):
        with jax.enable_x64(True):
            gpu, *_ = devices("h100:8")
            x = jax.ShapeDtypeStruct((64,), jnp.float64, sharding=SingleDeviceSharding(gpu))
            widened = jax.jit(lambda x: rounding(x).astype(jnp.float64))
            text = widened.lower(x).compile().as_text()
        assert text
        return text

    assert "f32[64]" in text_of(round32)
    assert "f32[64]" not in text_of(round_by_conversion)
