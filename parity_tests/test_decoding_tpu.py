"""A step of decoding against a million tokens, compiled for a TPU that is not there."""

import sys
from pathlib import Path

import pytest
from decoding_step import shapes, step

from jax_seqpar.plan import missing_compiler, plan

MISSING = missing_compiler("v5e:4x4")

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.usefixtures("unchecked_shapes"),
]


def test_a_million_tokens_on_sixteen_devices(monkeypatch):
    """The cache is updated in place, two collectives are sent, and no slot is copied."""
    monkeypatch.setenv("PYTHONPATH", str(Path(sys.modules["decoding_step"].__file__ or "").parent))
    tokens, devices, channels = 1 << 20, 16, 8 * 128
    made = plan(step, *shapes(tokens, devices), topology="v5e:4x4")
    assert made.failure is None
    assert made.memory is not None
    (sent,) = made.collectives
    assert (sent.kind, sent.count, sent.compiled) == ("all-reduce", 2, 2)
    # A maximum of the rows, and the sums of weights and weighted values, in float32.
    assert sent.inside == 2 * (devices - 1) / devices * 4 * 32 * (128 + 2)
    cache = tokens // devices * (2 * channels * 2 + 4)
    assert made.memory.donated >= cache
    assert cache <= made.memory.peak <= 1.05 * cache
