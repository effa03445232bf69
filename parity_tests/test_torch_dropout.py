"""Dropout in PyTorch: its random words against others' and its bits in both attentions."""

from typing import Any

import integer_oracle
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.random import threefry_2x32

from torch_ref.dense import dense_attention
from torch_ref.dropout import WORD, gain, head_keys, keep, limit, threefry2x32
from torch_ref.exact import exact_attention

RNG = torch.tensor([0x13198A2E, 0xF3707344])


@pytest.mark.parametrize("attention", (dense_attention, exact_attention))
def test_a_mask_of_integers_is_refused(attention):
    """Masks of integers raise: 2 and True are 0, bit by bit."""
    x = torch.ones(1, 4, 2, 3)
    mask = torch.full((1, 1, 4, 4), 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"mask must be boolean, got torch\.uint8"):
        attention(x, x, x, mask=mask, is_causal=True)


@pytest.mark.parametrize("hidden", (torch.finfo(torch.float32).min, -torch.inf))
def test_the_advice_for_a_mask_of_floats(hidden):
    x, causal = torch.randn(1, 4, 2, 3), torch.ones(4, 4).tril()[None, None]
    with pytest.raises(ValueError, match=r"mask.bool\(\) if 1 attends .* mask == 0 if 0 attends"):
        dense_attention(x, x, x, mask=causal)
    expected = dense_attention(x, x, x, is_causal=True)
    added = torch.zeros_like(causal).masked_fill(causal == 0, hidden)
    for mask in (causal.bool(), added == 0):
        assert torch.equal(dense_attention(x, x, x, mask=mask), expected)


def test_the_oracle_takes_one_batch():
    x, three = torch.ones(1, 4, 2, 3), torch.ones(3, 4, 2, 3)
    with pytest.raises(ValueError, match=r"must have one batch, got 3, 1 and 1"):
        dense_attention(three, x, x)
    others: dict[str, Any] = {
        "key_value_seq_lengths": torch.tensor([4, 3, 2]),
        "bias": torch.ones(3, 1, 4, 4),
        "segment_ids": torch.ones(3, 4, dtype=torch.int32),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=r"are of another batch .* logits \(3, 2, 4, 4\)"):
            dense_attention(x, x, x, **{name: other})


def words(*numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = numbers
    return torch.tensor(first), torch.tensor(second)


# Key, counter and result, of the tests of Random123.
PUBLISHED = (
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)


@pytest.mark.parametrize(("key", "counter", "result"), PUBLISHED)
def test_the_published_words(key, counter, result):
    assert threefry2x32(words(*key), words(*counter)) == words(*result)
    assert integer_oracle.threefry(key, counter) == result


def test_many_words_of_jax():
    numbers = torch.from_numpy(np.random.default_rng(0).integers(0, WORD + 1, (4, 1000)))
    numbers[:, :2] = torch.tensor([0, WORD])
    ours = torch.stack(threefry2x32((numbers[0], numbers[1]), (numbers[2], numbers[3])))
    unsigned = numbers.numpy().astype(np.uint32)
    for i in (0, 1, 2, 999):
        theirs = threefry_2x32(jnp.asarray(unsigned[:2, i]), jnp.asarray(unsigned[2:, i]))
        assert ours[:, i].tolist() == np.asarray(theirs).tolist()
    one_key = torch.stack(threefry2x32((RNG[0], RNG[1]), (numbers[2], numbers[3])))
    key = jnp.asarray(RNG.numpy().astype(np.uint32))
    assert np.array_equal(threefry_2x32(key, jnp.asarray(unsigned[2:])), one_key.numpy())


@pytest.mark.parametrize("rate", (0.1, 0.5, 0.9))
def test_the_share_that_is_dropped(rate):
    B, N, T, S = shape = (2, 3, 60, 64)
    dropped = ~keep(RNG, rate, *shape)
    assert dropped.shape == shape
    deviation = (rate * (1 - rate)) ** 0.5
    for axis in range(4):
        of_axis = dropped.double().movedim(axis, 0).flatten(1)
        off = (of_axis.mean(1) - rate).abs() / (deviation / of_axis.shape[1] ** 0.5)
        assert off.max() < 4.5, "standard deviations, of at most 64 means"
    # Neither heads nor neighbours repeat one another.
    centred = (dropped.double() - rate) / deviation
    rows = centred.flatten(0, 1).flatten(1)
    products = (rows @ rows.T / (T * S)).fill_diagonal_(0)
    assert products.abs().max() < 4.5 / (T * S) ** 0.5
    for axis in (2, 3):
        neighbours = centred * centred.roll(1, axis)
        assert neighbours.mean().abs() < 4.5 / (B * N * T * S) ** 0.5


def test_the_bits_are_those_of_the_integers():
    rate = 0.3
    expected = integer_oracle.is_kept((2, 3, 4, 5), limit(rate), RNG.numpy())
    assert np.array_equal(keep(RNG, rate, 2, 3, 4, 5).numpy(), expected)


@pytest.mark.parametrize("attend", (dense_attention, exact_attention))
def test_heads_elsewhere_keep_the_same(attend):
    """A rank with some of the heads and of the batch, given their keys, drops the same weights."""
    query, key, value = (torch.randn(2, 6, 4, 3, generator=seed(i)) for i in range(3))
    options = {"dropout_rate": 0.4, "is_causal": True}
    whole = attend(query, key, value, dropout_rng=RNG, **options)
    keys = head_keys(RNG, 2, 4)
    assert torch.equal(attend(query, key, value, dropout_rng=keys, **options), whole)
    part = (slice(1, 2), slice(None), slice(2, 4))
    operands = (x[part] for x in (query, key, value))
    assert torch.equal(attend(*operands, dropout_rng=keys[1:2, 2:4], **options), whole[part])


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_both_attentions_drop_the_same():
    shapes = ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 5), (2, 5, 4, 5))
    *leaves, grad = (torch.randn(shape, generator=seed(i)) for i, shape in enumerate(shapes))
    leaves = [x.requires_grad_() for x in leaves]
    results = []
    for attend in (dense_attention, exact_attention):
        out = attend(*leaves, dropout_rate=0.4, dropout_rng=RNG, sinks=torch.arange(4.0))
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)
    plain = dense_attention(*leaves, sinks=torch.arange(4.0))
    assert (plain - results[0][0]).abs().max() > 0.1


def test_any_integers_of_32_bits_are_a_key():
    expected = keep(RNG, 0.5, 1, 2, 3, 4)
    assert torch.equal(keep(RNG.to(torch.uint32), 0.5, 1, 2, 3, 4), expected)
    assert torch.equal(head_keys(head_keys(RNG, 2, 3), 2, 3), head_keys(RNG, 2, 3))


def test_a_rate_of_almost_nothing_drops_nothing():
    assert limit(1e-12) == 0
    assert gain(1e-12) == 1.0
    assert keep(RNG, 1e-12, 1, 1, 9, 9).all()


REFUSED = {
    "rate of one": ({"dropout_rate": 1.0}, "share that is dropped"),
    "rate below 0": ({"dropout_rate": -0.1}, "at least 0"),
    "rate that leaves no word": ({"dropout_rate": 1 - 2.0**-32}, "below 1 - 2"),
    "rate of NaN": ({"dropout_rate": float("nan")}, "got nan"),
    "no key": ({"dropout_rate": 0.1, "dropout_rng": None}, r"needs a key\. Write dropout_rng="),
    "key of one word": ({"dropout_rng": RNG[:1]}, r"two words .* \(1,\)"),
    "keys of other heads": ({"dropout_rng": head_keys(RNG, 2, 3)}, r"\(2, 4, 2\)\. Got \(2, 3, 2"),
    "key of floats": ({"dropout_rng": RNG.double()}, r"Write rng\.long\(\)"),
    "key of more than 32 bits": ({"dropout_rng": RNG * 2}, "from 0 to"),
    "key of signed words": ({"dropout_rng": RNG.int()}, r"rng\.view\(torch\.uint32\)"),
}


@pytest.mark.parametrize("attend", (dense_attention, exact_attention))
@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(attend, options, message):
    operands = [torch.ones(2, 3, 4, 2)] * 3
    with pytest.raises(ValueError, match=message):
        attend(*operands, **{"dropout_rate": 0.5, "dropout_rng": RNG, **options})
