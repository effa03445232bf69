"""Programs for eight GPUs, compiled without one: collectives, memory, kernels, and what hides what.

The compiler is that of the extra "cuda".
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ahead_of_time import compiled, hiding, most_bytes, program
from jax.sharding import SingleDeviceSharding

from jax_seqpar import (
    Blockwise,
    Dropout,
    Fused,
    Logits,
    Mask,
    Ring,
    Triton,
    Ulysses,
    compiler_options,
)
from jax_seqpar.exact.arithmetic import flush, round32
from jax_seqpar.plan import (
    collectives,
    devices,
    kernel_calls,
    kernels_under_transfers,
    missing_compiler,
    received_bytes,
)

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


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_triton_forward_and_backward(head_dim, dtype):
    """Triton has one kernel forward and two for the gradients, and no T x S array in memory."""
    kernel = Triton(platform="gpu")
    forward = program("h100:8", 1 << 17, head_dim=head_dim, dtype=dtype, kernel=kernel)
    programs = [forward, replace(forward, gradients=True)]
    results = compiled(*programs)
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8)]
    assert [kernel_calls(text) for text in texts] == [1, 3]
    for asked, result in zip(programs, results, strict=True):
        assert 0 < result["temporaries"] <= most_bytes(asked), asked


def test_triton_is_chosen_and_compiles_with_every_option():
    """Documents of 128K tokens alone, and all that the kernel has at once.

    Ranges of blocks are found from a byte for each pair of a block and a token, 64 MB at a time.
    """
    tokens = 1 << 17
    ids: Any = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    lengths: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    numbers: Any = jax.ShapeDtypeStruct((16,), jnp.float32)
    documents = program(
        "h100:8", tokens, kernel=None, gradients=True, mask=Mask(is_causal=True, segment_ids=ids)
    )
    everything = replace(
        documents,
        mask=Mask(True, 0, (4096, 7), None, lengths, lengths, ids, ids),
        logits=Logits(0.1, 30.0, None, numbers, numbers),
        dropout=Dropout(0.1, jax.ShapeDtypeStruct((2,), jnp.uint32)),
    )
    for result in compiled(documents, everything):
        assert kernel_calls(result["text"]) == 3
        most = most_bytes(replace(documents, kernel=Triton(platform="gpu"))) + 3 * (1 << 26)
        assert result["temporaries"] <= most


def test_a_transfer_hides_under_the_attention_of_another_slice():
    """Transfers hide as on TPUs: none with one chunk of heads, one under every kernel with two."""
    options = compiler_options("gpu")
    whole = program("h100:8", 1 << 17, heads=32, kv_heads=16, compiler_options=options)
    sliced = replace(whole, strategy=Ulysses(2))
    results = compiled(whole, sliced, replace(sliced, gradients=True))
    texts = [result["text"] for result in results]
    assert [collectives(text) for text in texts] == [{"all-to-all": n} for n in (4, 8, 16)]
    assert [kernel_calls(text) for text in texts] == [1, 2, 4]
    assert [len(hiding(text)) for text in texts] == [0, 2, 4]


def test_the_rounding_of_exact_attention_survives_the_compiler():
    """Integer rounding survives compilation; a conversion and back, the control, does not."""

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


def test_every_transfer_of_a_ring_hides_under_an_attention():
    """Every transfer is listed, so asynchronous, and hides under an attention."""
    ring = program("h100:8", 1 << 13, kernel=Blockwise(), strategy=Ring())
    forward, both = (
        kernels_under_transfers(x["text"]) for x in compiled(ring, replace(ring, gradients=True))
    )
    # In the loop of the gradients one permute carries both arrays.
    assert [len(forward), len(both)] == [2, 5]
    assert all(forward.values())
    assert all(both.values())
