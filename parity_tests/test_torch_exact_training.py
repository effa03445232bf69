"""Exact training in PyTorch: one process, threads and ranks give every bit of every step."""

from dataclasses import replace

import exact_training_oracle as oracle
import numpy as np
import pytest
import torch
from exact_training_inputs import numbers, rows
from exact_training_runs import (
    BUGS,
    DECODER,
    FULL,
    FULL_STEP,
    MESHES,
    OF_DROPOUT,
    batch,
    exact_run,
    in_one_process,
    initial_weights,
    on_ranks,
    ordinary_loss,
    ordinary_run,
    planted,
)

from jax_seqpar.bridge import run_ranks
from jax_seqpar.compare import compare_bits
from torch_ref.exact import arithmetic, linear, matmul, norm, training_step
from torch_ref.exact.optimizer import adamw_numbers
from torch_ref.exact.training_step import loss_and_gradients

pytestmark = pytest.mark.usefixtures("one_torch_thread")
STEPS = 3


@pytest.fixture(scope="module")
def alone():
    torch.set_num_threads(1)
    return exact_run(STEPS)


@pytest.fixture(scope="module")
def one_step():
    return exact_run(1)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(on_ranks, 4, STEPS, timeout=500.0)


def differing(got, expected):
    """The names of the tensors that differ in a bit."""
    return {x for x in expected if np.any(got[x].view(np.uint32) != expected[x].view(np.uint32))}


def assert_same_bits(got, expected):
    """Asserts equal bits of losses, weights and moments, of a run that changed its weights."""
    assert got.keys() == expected.keys()
    assert differing(got, expected) == set()
    losses = expected["losses"]
    assert np.all(np.isfinite(losses))
    assert len(set(losses.tolist())) == len(losses)


@pytest.mark.parametrize("mesh", [f"{data}x{sequence}" for data, sequence in MESHES])
def test_four_ranks_have_the_bits_of_one_process(alone, ranks, mesh):
    for rank in ranks:
        assert_same_bits(rank[mesh], alone)
    # Two moments and the weights, of 20 tensors, and the losses.
    assert len(alone) == 3 * len(DECODER.shapes()) + 1


def test_two_threads_have_the_bits_of_one(alone, monkeypatch):
    # Threads that wait without spinning: on a busy machine that is 10 times as fast.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (two,) = run_ranks(in_one_process, 1, STEPS, threads=2, timeout=500.0)
    assert_same_bits(two, alone)


def test_ordinary_training_differs_from_one_to_four_ranks(ranks):
    """The same comparison of float32 training finds other weights."""
    assert "weights.embedding" in differing(ranks[0]["ordinary"], ordinary_run(STEPS))


@pytest.fixture(scope="module")
def every_option():
    return exact_run(1, **FULL_STEP)


@pytest.mark.parametrize("mesh", [f"{data}x{sequence}" for data, sequence in MESHES])
def test_ranks_with_every_option(every_option, ranks, mesh):
    """16 bits, dropout of activations and of attention weights, smoothing, two batches."""
    for rank in ranks:
        assert_same_bits(rank[f"{mesh}, every option"], every_option)


@pytest.mark.parametrize(
    "other",
    [
        {"decoder": replace(FULL, dtype=torch.float32)},
        {"decoder": replace(FULL, dropout=0.0)},
        {"label_smoothing": 0.0},
    ],
    ids=["32 bits", "no dropout", "no smoothing"],
)
def test_each_option_counts(every_option, other):
    assert len(differing(exact_run(1, **FULL_STEP | other), every_option)) > 10


def test_an_exponent_of_one_rank_is_found(one_step, ranks):
    assert all(len(differing(rank["mutation"], one_step)) > 10 for rank in ranks)


@pytest.mark.parametrize("bug", OF_DROPOUT)
def test_dropout_by_numbers_of_a_rank_is_found(every_option, ranks, bug):
    assert all(len(differing(rank[bug], every_option)) > 10 for rank in ranks)


@pytest.fixture(scope="module")
def twenty_steps():
    return exact_run(20)


@pytest.mark.slow
def test_twenty_steps_of_two_threads(twenty_steps, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    (two,) = run_ranks(in_one_process, 1, 20, threads=2, timeout=580.0)
    assert_same_bits(two, twenty_steps)


@pytest.mark.slow
def test_twenty_steps_of_four_ranks(twenty_steps):
    ranks = run_ranks(on_ranks, 4, 20, timeout=580.0)
    for rank in ranks:
        for data, sequence in MESHES:
            assert_same_bits(rank[f"{data}x{sequence}"], twenty_steps)
    assert "weights.embedding" in differing(ranks[0]["ordinary"], ordinary_run(20))


def test_gradients_are_as_near_to_float64_as_those_of_float32():
    """Exact gradients of two batches, against PyTorch's derivatives of the same decoder."""
    weights = {name: torch.from_numpy(w) for name, w in initial_weights(DECODER).items()}
    batches = [
        (torch.from_numpy(ids), torch.from_numpy(labels)) for ids, labels in map(batch, (0, 1))
    ]
    count = sum(int((labels >= 0).sum()) for _, labels in batches)

    def ordinary(dtype):
        leaves = {name: w.to(dtype, copy=True).requires_grad_() for name, w in weights.items()}
        parts = [ordinary_loss(DECODER, leaves, *pair) for pair in batches]
        loss = torch.stack(parts).sum() / count
        return loss, torch.autograd.grad(loss, [*leaves.values()])

    loss, gradients = loss_and_gradients(DECODER, weights, batches, z_loss=1e-4)
    true_loss, truth = ordinary(torch.float64)
    of_32_bits = ordinary(torch.float32)[1]
    assert abs(loss.item() - true_loss.item()) <= 2e-7 * true_loss.item()
    for (name, ours), float32, true in zip(gradients.items(), of_32_bits, truth, strict=True):
        errors = [(x.double() - true).norm().item() for x in (ours, float32)]
        assert errors[0] <= 2 * errors[1], name
        assert errors[0] <= 1e-5 * true.norm().item(), name


# Planted bugs.


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_changes_the_bits_of_a_step(one_step, name):
    with planted(BUGS[name]):
        assert len(differing(exact_run(1), one_step)) > 10


def of_norm():
    x, gamma, dy = numbers((40, 24), 1, wide=False), numbers(24, 2), rows((40, 24), 3)
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, gamma)]
    y = norm.rms_norm(*leaves, eps=1e-6)
    dx, _ = torch.autograd.grad(y, leaves, torch.from_numpy(dy))
    return dx, oracle.rms_norm_backward(x, gamma, 1e-6, dy)[0]


def of_linears():
    x, w, dy = numbers((30, 8), 4), numbers((3, 8, 6), 5), numbers((3, 30, 6), 6, wide=False)
    leaf = torch.from_numpy(x).requires_grad_()
    y = linear.linears(leaf, *torch.from_numpy(w))
    (dx,) = torch.autograd.grad(y, leaf, [*torch.from_numpy(dy)])
    return dx, oracle.linears_backward(x, [*w], [*dy])[0]


def of_weight_gradient():
    x, dy = rows((60, 9), 7), rows((60, 8), 8)
    got = matmul.mmT(*(arithmetic.flush(torch.from_numpy(each)) for each in (x, dy)))
    return got, oracle.weight_gradient(x, dy)


BY_INTEGERS = dict(zip(BUGS, (of_norm, of_norm, of_linears, of_weight_gradient), strict=True))


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found_by_the_integers(name):
    got, expected = BY_INTEGERS[name]()
    assert compare_bits(got.numpy(), expected).equal
    with planted(BUGS[name]):
        got, _ = BY_INTEGERS[name]()
    assert not compare_bits(got.float().numpy(), expected).equal


def test_ranks_that_do_not_fit_are_an_error(ranks):
    product, kv_heads = ranks[0]["complaints"]
    assert "data = 3 times sequence = 1 must be the 4 ranks. Give two numbers" in product
    assert "KV heads K = 3 must divide the 4 ranks of a sequence" in kv_heads


def test_a_step_stays_on_the_device_of_its_weights(monkeypatch):
    """A step runs on PyTorch's meta device, whose tensors refuse those of another device.

    Meta tensors have no numbers, so checks that read a number read 1.
    """
    for name in ("__int__", "__float__", "__bool__", "item"):

        def number(x, given=getattr(torch.Tensor, name), name=name):
            return {"__float__": 1.0, "__bool__": True}.get(name, 1) if x.is_meta else given(x)

        monkeypatch.setattr(torch.Tensor, name, number)
    weights = {n: torch.empty(x.shape, device="meta") for n, x in initial_weights(FULL).items()}
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    loss, state = training_step.step(
        FULL,
        training_step.first_state(weights),
        [(ids, ids)],
        adamw_numbers(1, 1e-3),
        largest_norm=1.0,
        label_smoothing=0.1,
        rng=torch.tensor([0, 1]),
    )
    assert all(x.is_meta for x in (loss, *state.weights.values(), *state.v.values()))
