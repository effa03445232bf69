"""The float64 oracle itself: against PyTorch's attention, and against sums written out."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_ref.dense import dense_attention

B, H = 2, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def inputs(T: int = 5, S: int = 7, N: int = 4, K: int = 2) -> list[torch.Tensor]:
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def output_and_gradients(attend: Any, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    out = attend(*operands)
    return [out, *torch.autograd.grad(out, operands, normal(*out.shape, seed=9))]


SDPA_OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "bias": ({"bias": normal(B, 4, 5, 7)}, {"attn_mask": normal(B, 4, 5, 7)}),
    "bias of a key": ({"bias": normal(1, 1, 1, 7)}, {"attn_mask": normal(1, 1, 1, 7)}),
    "mask": ({"mask": normal(B, 4, 5, 7) > -1}, {"attn_mask": normal(B, 4, 5, 7) > -1}),
}


@pytest.mark.parametrize("heads", ((4, 4), (4, 2), (4, 1)), ids=str)
@pytest.mark.parametrize("options", SDPA_OPTIONS.values(), ids=SDPA_OPTIONS)
def test_equals_pytorch_in_float64(options, heads):
    ours, theirs = options
    N, K = heads

    def sdpa(query, key, value):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, **theirs).transpose(1, 2)

    operands = inputs(N=N, K=K)
    got = output_and_gradients(partial(dense_attention, **ours), operands)
    expected = output_and_gradients(sdpa, operands)
    for x, y in zip(got, expected, strict=True):
        # Both are float64 sums of a few dozen terms of order 1.
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def written_out(query, key, value, attends, bias=None):
    """Query by query in Python floats, every sum exact but for one rounding.

    Args:
      attends: of a batch entry, a query position and a key position.
    """
    T, N = query.shape[1:3]
    S, K = key.shape[1:3]
    out = torch.zeros(query.shape, dtype=torch.float64)
    q, k, v = (x.double().tolist() for x in (query, key, value))
    for b in range(B):
        for t in range(T):
            for n in range(N):
                head = n // (N // K)
                logits = {}
                for s in range(S):
                    if attends(b, t, s):
                        products = [x * y for x, y in zip(q[b][t][n], k[b][s][head], strict=True)]
                        logits[s] = math.fsum(products) / math.sqrt(H)
                        logits[s] += 0.0 if bias is None else bias[b, n, t, s].item()
                weights = {s: math.exp(x - max(logits.values())) for s, x in logits.items()}
                total = math.fsum(weights.values())
                for h in range(H):
                    terms = [w / total * v[b][s][head][h] for s, w in weights.items()]
                    out[b, t, n, h] = math.fsum(terms)
    return out


SEGMENTS_OF_KEYS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 5, 5, 3]])
SEGMENTS_OF_QUERIES = torch.tensor([[0, 1, 1, 2, 9], [3, 5, 5, 5, 3]])


def of_keys(b, position):
    return SEGMENTS_OF_KEYS[b, position].item()


def of_queries(b, position):
    return SEGMENTS_OF_QUERIES[b, position].item()


# T, the options, and which keys a query attends to; S = 7.
WRITTEN_OUT: dict[str, tuple[int, dict[str, Any], Any]] = {
    "causal, fewer queries": (5, {"is_causal": True}, lambda b, t, s: s <= t),
    "causal, more queries": (9, {"is_causal": True}, lambda b, t, s: s <= t),
    "window": (7, {"local_window_size": (2, 1)}, lambda b, t, s: t - 2 <= s <= t + 1),
    "one-sided window": (7, {"local_window_size": (0, 3)}, lambda b, t, s: t <= s <= t + 3),
    "symmetric window": (7, {"local_window_size": 2}, lambda b, t, s: abs(s - t) <= 2),
    "window past the keys": (9, {"local_window_size": 1}, lambda b, t, s: abs(s - t) <= 1),
    "segments": (
        7,
        {"segment_ids": SEGMENTS_OF_KEYS},
        lambda b, t, s: of_keys(b, t) == of_keys(b, s),
    ),
    "segments of queries and of keys": (
        5,
        {"segment_ids": (SEGMENTS_OF_QUERIES, SEGMENTS_OF_KEYS)},
        lambda b, t, s: of_queries(b, t) == of_keys(b, s),
    ),
    "all of them": (
        7,
        {
            "is_causal": True,
            "local_window_size": (3, 5),
            "segment_ids": SEGMENTS_OF_KEYS,
            "mask": torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool(),
        },
        lambda b, t, s: t - 3 <= s <= t and of_keys(b, t) == of_keys(b, s) and s not in (2, 5),
    ),
}


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("case", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
def test_equals_the_sums_written_out(case, with_bias):
    T, options, attends = case
    query, key, value = (x.detach() for x in inputs(T))
    bias = normal(B, 4, T, 7, seed=4) if with_bias else None
    out = dense_attention(query, key, value, **options, bias=bias)
    # A sum of 7 products of order 1 rounds a few times, each by 1.1e-16.
    torch.testing.assert_close(
        out, written_out(query, key, value, attends, bias), rtol=0, atol=1e-14
    )


def test_queries_without_a_key_are_among_those_cases():
    empty = {
        name
        for name, (T, _, attends) in WRITTEN_OUT.items()
        if any(not any(attends(b, t, s) for s in range(7)) for b in range(B) for t in range(T))
    }
    assert empty == {
        "window past the keys",
        "segments of queries and of keys",
        "all of them",
    }


@pytest.mark.parametrize(
    "options",
    (
        {"is_causal": True},
        {"local_window_size": (1, 0), "scale": 0.7},
        {"mask": torch.tensor([[True, False, True], [False] * 3])},
    ),
    ids=str,
)
def test_first_and_second_derivatives_equal_finite_differences(options):
    operands = [x[..., :2].detach().requires_grad_() for x in inputs(T=2, S=3, N=2, K=1)]
    bias = normal(B, 2, 2, 3, seed=5).requires_grad_()

    def attend(query, key, value, bias):
        return dense_attention(query, key, value, bias=bias, **options)

    assert torch.autograd.gradcheck(attend, (*operands, bias))
    assert torch.autograd.gradgradcheck(attend, (*operands, bias))


@pytest.mark.parametrize("how", ("mask", "bias"))
def test_a_query_without_a_key_gives_0_and_takes_no_gradient(how):
    query, key, value = operands = inputs()
    attended = torch.ones(B, 1, 5, 7, dtype=torch.bool)
    attended[0, :, 3] = False
    attended[1] = False
    bias = torch.zeros(attended.shape).double().masked_fill(~attended, -math.inf).requires_grad_()
    if how == "mask":
        out, leaves = dense_attention(query, key, value, mask=attended), operands
    else:
        out, leaves = dense_attention(query, key, value, bias=bias), [*operands, bias]
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    second = torch.autograd.grad(gradients, leaves, [torch.ones_like(x) for x in gradients])
    for x in (out, *gradients, *second):
        assert x.isfinite().all()
    for x in (out, gradients[0], second[0]):
        assert not x[0, 3].any()
        assert x[0, 2].any()
    for x in (out, *gradients, *second):
        assert not x[1].any()
        assert x[0].any()


def test_causal_counts_both_from_0():
    """The first query attends to the first key alone, so its output is that key's value."""
    for T in (3, 7, 11):
        query, key, value = inputs(T, N=2)
        out = dense_attention(query, key, value, is_causal=True)
        assert torch.equal(out[:, 0], value[:, 0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
def test_every_dtype_is_widened_before_anything_else(dtype):
    operands = [x.detach().to(dtype) for x in inputs()]
    bias = normal(1, 4, 5, 7).to(dtype)
    out = dense_attention(*operands, bias=bias)
    assert out.dtype == torch.float64
    wide = dense_attention(*(x.double() for x in operands), bias=bias.double())
    assert torch.equal(out, wide)
