"""Inputs of causal attentions that are hard for an arithmetic; `accuracy_exact.py` takes them.

Each is query, key, value and the gradient of the output, float64:

    gaussian          standard normal
    heavy tails       Student's t of 2 degrees of freedom
    long rows         standard normal, 16 384 tokens, one head
    outlier channels  standard normal; 2 channels of query, key and value 100 times as large
    far channels      the same, 10 000 times: the weakness of exact attention
    outlier tokens    standard normal; 4 tokens of query, key and value 300 times as large
    peak              every logit is about 21 below that of key 0, with a value like the others'
    empty peak        the same, but the value of key 0 is 0: the output is what the tail holds
    sink              every logit is about 10 below that of key 0, whose value is 0
"""

import math
from collections.abc import Callable

import numpy as np

from jax_seqpar.parity.inputs import NAMES, Arrays, Case

Draw = Callable[[np.random.Generator, Case], Arrays]


def gaussian(rng: np.random.Generator, case: Case) -> Arrays:
    """Query, key, value and output gradient, float64 as in every distribution."""
    return _normal(rng, case)


def heavy_tails(rng: np.random.Generator, case: Case) -> Arrays:
    """Query, key and value of Student's t with 2 degrees of freedom."""
    inputs = _normal(rng, case)
    return inputs | {name: rng.standard_t(2, inputs[name].shape) for name in NAMES[:3]}


def outlier_channels(rng: np.random.Generator, case: Case) -> Arrays:
    """Two channels of query, key and value, each its own, 100 times as large."""
    return _with_large_channels(rng, case, 100)


def far_channels(rng: np.random.Generator, case: Case) -> Arrays:
    """Two channels of query, key and value, each its own, 10 000 times as large."""
    return _with_large_channels(rng, case, 10_000)


def _with_large_channels(rng: np.random.Generator, case: Case, times: float) -> Arrays:
    inputs = _normal(rng, case)
    for name in NAMES[:3]:
        inputs[name][..., rng.choice(case.head_dim, 2, replace=False)] *= times
    return inputs


def outlier_tokens(rng: np.random.Generator, case: Case) -> Arrays:
    """Four tokens of query, key and value, each its own, 300 times as large."""
    inputs = _normal(rng, case)
    for name in NAMES[:3]:
        inputs[name][:, rng.choice(case.tokens, 4, replace=False)] *= 300
    return inputs


def peak(rng: np.random.Generator, case: Case) -> Arrays:
    """Key 0 far above the others."""
    return _first_key_above(rng, case, 21.0)


def empty_peak(rng: np.random.Generator, case: Case) -> Arrays:
    """Key 0 far above the others, with a value of 0: the output is what the others hold."""
    inputs = peak(rng, case)
    inputs["value"][:, 0] = 0
    return inputs


def sink(rng: np.random.Generator, case: Case) -> Arrays:
    """Key 0 above the others by 10, with a value of 0, as an attention sink is."""
    inputs = _first_key_above(rng, case, 10.0)
    inputs["value"][:, 0] = 0
    return inputs


def _first_key_above(rng: np.random.Generator, case: Case, gap: float) -> Arrays:
    """Channel 0 alone makes the logits of key 0; the others vary by about 1."""
    inputs = _normal(rng, case)
    query, key = inputs["query"], inputs["key"]
    query[..., 0] = 4
    key[..., 0] = 0
    key[:, 0] = 0
    key[:, 0, :, 0] = gap * math.sqrt(case.head_dim) / 4
    return inputs


def _normal(rng: np.random.Generator, case: Case) -> Arrays:
    q = (case.batch, case.tokens, case.heads, case.head_dim)
    kv = (case.batch, case.tokens, case.kv_heads, case.head_dim)
    return dict(zip(NAMES, map(rng.standard_normal, (q, kv, kv, q)), strict=True))


DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": gaussian,
    "heavy tails": heavy_tails,
    "long rows": gaussian,
    "outlier channels": outlier_channels,
    "far channels": far_channels,
    "outlier tokens": outlier_tokens,
    "peak": peak,
    "empty peak": empty_peak,
    "sink": sink,
}
