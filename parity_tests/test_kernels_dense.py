"""The float64 oracle itself: against PyTorch's attention, and against sums written out."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from torch_ref.dense import dense_attention
from torch_ref.dropout import keep
from torch_ref.exact import exact_attention

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


def written_out(query, key, value, attends, bias=None, sinks=None, gain=None):
    """Query by query in Python floats, every sum exact but for one rounding.

    Args:
      attends: of a batch entry, a query and a key, by their number.
      bias: `[B, N, T, S]`.
      sinks: one number for each query head.
      gain: `[B, N, T, S]`, what each weight is multiplied by at last.
    """
    T, N = query.shape[1:3]
    S, K, V = *key.shape[1:3], value.shape[3]
    out = torch.zeros((B, T, N, V), dtype=torch.float64)
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
                others = [] if sinks is None else [sinks[n]]
                top = max((*logits.values(), *others), default=0.0)
                weights = {s: math.exp(x - top) for s, x in logits.items()}
                total = math.fsum((*weights.values(), *(math.exp(x - top) for x in others)))
                if gain is not None:
                    weights = {s: w * gain[b, n, t, s].item() for s, w in weights.items()}
                for h in range(V):
                    terms = [w / total * v[b][s][head][h] for s, w in weights.items()]
                    out[b, t, n, h] = math.fsum(terms)
    return out


SEGMENTS_OF_KEYS = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 5, 5, 3]])
SEGMENTS_OF_QUERIES = torch.tensor([[0, 1, 1, 2, 9], [3, 5, 5, 5, 3]])


POSITIONS_OF_KEYS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [9, 4, 5, 5, -3, 0, 2]])
POSITIONS_OF_QUERIES = torch.tensor([[1, 2, 0, 1, -1], [9, -2, 5, 4, 0]])


def apart(b, t, s):
    """Distance by which the key is after the query, by the positions of a pair."""
    return (POSITIONS_OF_KEYS[b, s] - POSITIONS_OF_QUERIES[b, t]).item()


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
    "causal, aligned at the end": (
        5,
        {"is_causal": True, "query_offset": 2},
        lambda b, t, s: s <= t + 2,
    ),
    "causal from before the keys": (
        7,
        {"is_causal": True, "query_offset": -2},
        lambda b, t, s: s <= t - 2,
    ),
    "window with an offset": (
        5,
        {"local_window_size": (1, 2), "query_offset": 1},
        lambda b, t, s: t <= s <= t + 3,
    ),
    "causal by position": (
        7,
        {"is_causal": True, "positions": POSITIONS_OF_KEYS},
        lambda b, t, s: POSITIONS_OF_KEYS[b, s].item() <= POSITIONS_OF_KEYS[b, t].item(),
    ),
    "window by positions of queries and of keys": (
        5,
        {"local_window_size": (2, 1), "positions": (POSITIONS_OF_QUERIES, POSITIONS_OF_KEYS)},
        lambda b, t, s: -2 <= apart(b, t, s) <= 1,
    ),
    "lengths of queries": (
        5,
        {"query_seq_lengths": torch.tensor([5, 2])},
        lambda b, t, s: t < (5, 2)[b],
    ),
    "lengths of keys": (
        5,
        {"key_value_seq_lengths": torch.tensor([1, 7])},
        lambda b, t, s: s < (1, 7)[b],
    ),
    "lengths that no position moves": (
        5,
        {
            "is_causal": True,
            "positions": (POSITIONS_OF_QUERIES, POSITIONS_OF_KEYS),
            "query_seq_lengths": torch.tensor([4, 3], dtype=torch.int32),
            "key_value_seq_lengths": torch.tensor([3, 6], dtype=torch.int32),
        },
        lambda b, t, s: apart(b, t, s) <= 0 and t < (4, 3)[b] and s < (3, 6)[b],
    ),
    "all of them": (
        7,
        {
            "is_causal": True,
            "local_window_size": (3, 5),
            "segment_ids": SEGMENTS_OF_KEYS,
            "mask": torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool(),
            "query_offset": 1,
            "key_value_seq_lengths": torch.tensor([7, 4]),
        },
        lambda b, t, s: (
            t - 2 <= s <= t + 1
            and of_keys(b, t) == of_keys(b, s)
            and s not in (2, 5)
            and s < (7, 4)[b]
        ),
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
        "causal from before the keys",
        "lengths of queries",
        "lengths that no position moves",
        "all of them",
    }


SLOPES = torch.tensor([0.5, 0.25, 0.0, -0.3])
SINKS = torch.tensor([0.5, -math.inf, -30.0, 3.0])
# The options and the distance of a query from a key, both by their number; T = 5, S = 7.
DISTANCES: dict[str, tuple[dict[str, Any], Any]] = {
    "counted": ({}, lambda b, t, s: abs(t - s)),
    "with an offset": ({"query_offset": 2}, lambda b, t, s: abs(t + 2 - s)),
    "by position": (
        {"positions": (POSITIONS_OF_QUERIES, POSITIONS_OF_KEYS)},
        lambda b, t, s: abs(apart(b, t, s)),
    ),
}


@pytest.mark.parametrize("case", DISTANCES.values(), ids=DISTANCES)
def test_alibi_takes_the_distance_from_the_logits(case):
    options, distance = case
    query, key, value = (x.detach() for x in inputs())
    bias = normal(B, 4, 5, 7, seed=4)
    out = dense_attention(query, key, value, **options, bias=bias, alibi_slopes=SLOPES)
    for b, n, t, s in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        bias[b, n, t, s] -= SLOPES[n].item() * distance(b, t, s)
    expected = written_out(query, key, value, lambda b, t, s: True, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_alibi_of_positions_more_than_2_to_29_apart():
    query, key, value = (x.detach() for x in inputs())
    positions = torch.arange(5)[None] * 2**25 - 2**29, torch.arange(7)[None] * 2**25
    slopes, bias = SLOPES * 2.0**-26, torch.zeros(B, 4, 5, 7).double()
    for b, n, t, s in torch.cartesian_prod(*map(torch.arange, bias.shape)).tolist():
        bias[b, n, t, s] = -slopes[n].item() * min(2**29 + (s - t) * 2**25, 2**29)
    out = dense_attention(query, key, value, positions=positions, alibi_slopes=slopes)
    expected = written_out(query, key, value, lambda b, t, s: True, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_alibi_after_the_soft_cap():
    """A cap that leaves nothing of the logits: what is left is the distance."""
    query, key, value = (x.detach() for x in inputs())
    out = dense_attention(query, key, value, logits_soft_cap=1e-30, alibi_slopes=SLOPES)
    expected = dense_attention(torch.zeros_like(query), key, value, alibi_slopes=SLOPES)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("is_causal", (False, True))
def test_sinks_take_a_share_and_give_nothing(is_causal):
    query, key, value = (x.detach() for x in inputs(T=7))
    out = dense_attention(query, key, value, sinks=SINKS, is_causal=is_causal)
    expected = written_out(
        query, key, value, lambda b, t, s: s <= t or not is_causal, sinks=SINKS.tolist()
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_a_sink_of_minus_infinity_is_none():
    operands = inputs()
    sinks = torch.full((4,), -math.inf, dtype=torch.float64, requires_grad=True)
    out = dense_attention(*operands, sinks=sinks)
    assert torch.equal(out, dense_attention(*operands))
    assert not torch.autograd.grad(out.sum(), sinks)[0].any()


@pytest.mark.parametrize("V", (1, 5))
def test_values_of_another_dimension(V):
    query, key, _ = (x.detach() for x in inputs())
    value = normal(B, 7, 2, V, seed=3)
    out = dense_attention(query, key, value, is_causal=True)
    assert out.shape == (B, 5, 4, V)
    expected = written_out(query, key, value, lambda b, t, s: s <= t)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_dropout_after_the_normaliser():
    rng, rate = torch.tensor([5, 7]), 0.25
    query, key, value = (x.detach() for x in inputs())
    out = dense_attention(
        query, key, value, sinks=SINKS, is_causal=True, dropout_rate=rate, dropout_rng=rng
    )
    gain = keep(rng, rate, B, 4, 5, 7).double() / (1 - rate)
    expected = written_out(
        query, key, value, lambda b, t, s: s <= t, sinks=SINKS.tolist(), gain=gain
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"positions": POSITIONS_OF_KEYS, "query_offset": 1}, "one of the two"),
        ({"positions": POSITIONS_OF_KEYS}, r"positions of 5 queries .* Write a pair"),
        ({"positions": (POSITIONS_OF_QUERIES.double(), POSITIONS_OF_KEYS)}, "must be integers"),
        ({"query_seq_lengths": torch.tensor(3)}, r"query_seq_lengths must be \[B\]"),
        ({"key_value_seq_lengths": torch.ones(B, 1)}, r"key_value_seq_lengths must be \[B\]"),
    ),
)
@pytest.mark.parametrize("attend", (dense_attention, exact_attention))
def test_masks_that_do_not_fit_are_refused(attend, options, message):
    with pytest.raises(ValueError, match=message):
        attend(*(x.detach().float() for x in inputs()), **options)


@pytest.mark.parametrize(
    "options",
    (
        {"is_causal": True},
        {"local_window_size": (1, 0), "scale": 0.7},
        {"mask": torch.tensor([[True, False, True], [False] * 3])},
        {"is_causal": True, "query_offset": -1, "logits_soft_cap": 1.5},
        {"dropout_rate": 0.5, "dropout_rng": torch.tensor([0, 3])},
    ),
    ids=str,
)
def test_first_and_second_derivatives_equal_finite_differences(options):
    query, key, value = (x.detach() for x in inputs(T=2, S=3, N=2, K=1))
    leaves = [query[..., :2], key[..., :2], value[..., :1], normal(B, 2, 2, 3, seed=5)]
    leaves += [normal(2, seed=6), normal(2, seed=7)]

    def attend(query, key, value, bias, alibi_slopes, sinks):
        return dense_attention(
            query, key, value, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks, **options
        )

    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def some_without_a_key():
    """`[B, 1, 5, 7]`: one query of the first sequence and all of the second attend to none."""
    attended = torch.ones(B, 1, 5, 7, dtype=torch.bool)
    attended[0, :, 3] = False
    attended[1] = False
    return attended


@pytest.mark.parametrize("how", ("mask", "bias"))
def test_a_query_without_a_key_gives_0_and_takes_no_gradient(how):
    query, key, value = operands = inputs()
    attended = some_without_a_key()
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


@pytest.mark.parametrize("how", ("mask", "bias"))
def test_a_query_without_a_key_gives_0_and_no_gradient_to_its_sink(how):
    attended = some_without_a_key()
    bias = torch.zeros(attended.shape).masked_fill(~attended, -math.inf)
    operands = inputs()
    leaves = [x.double().requires_grad_() for x in (SINKS, SLOPES)]
    mask_or_bias: dict[str, Any] = {"mask": attended} if how == "mask" else {"bias": bias}
    out = dense_attention(*operands, sinks=leaves[0], alibi_slopes=leaves[1], **mask_or_bias)
    for x in (out[0, 3], out[1]):
        assert not x.any()
        for grad in torch.autograd.grad(x.sum(), [*operands, *leaves], retain_graph=True):
            assert not grad.any()
    for grad in torch.autograd.grad(out.sum(), [*operands, *leaves]):
        assert grad.isfinite().all()
        assert grad.any()


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


@pytest.mark.parametrize("name", ("alibi_slopes", "sinks"))
def test_exact_attention_has_no_gradient_for_what_is_differentiated_here(name):
    operands = [x.detach().float() for x in inputs()]
    refused: list[tuple[dict[str, Any], str]] = [
        ({name: torch.ones(4, requires_grad=True)}, rf"gradient here.* {name}\.detach\(\)"),
        ({name: torch.ones(4).double()}, rf"{name} must be float32.* {name}\.float\(\)"),
        ({name: torch.ones(2)}, rf"{name} must be \[N\], .* 4 query heads"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            exact_attention(*operands, **options)
