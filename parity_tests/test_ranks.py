"""run_ranks: values in order, failures that say what happened, and nobody left behind."""

import multiprocessing
import os
import pickle
import re
import time
from pathlib import Path

import pytest
import rank_functions
import torch
from cases import slow

from jax_seqpar.bridge import RankError, run_ranks


def children():
    """The processes that the system knows to be ours, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may itself hold spaces and brackets.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Started once and kept by multiprocessing, for every spawned process to come.
        if parent == os.getpid() and "resource_tracker" not in command:
            found.add(stat.parent.name)
    return found


@pytest.fixture(autouse=True)
def nobody_is_left():
    before = children()
    yield
    assert multiprocessing.active_children() == []
    assert children() <= before


def test_values_come_back_in_rank_order_with_their_bits():
    ranks = run_ranks(rank_functions.describe_rank, 3, "a", {"b": 2}, threads=3)
    assert [rank for rank, *_ in ranks] == [0, 1, 2]
    assert len({pid for _, _, _, pid, *_ in ranks} | {os.getpid()}) == 4
    for rank, group, threads, _, args, (tensors, arrays) in ranks:
        assert group == (rank, 3, "gloo")
        assert threads == 3
        assert args == ("a", {"b": 2})
        expected_tensors, expected_arrays = rank_functions.return_bits(rank)
        assert list(tensors) == list(expected_tensors)
        for x, expected in zip(tensors.values(), expected_tensors.values(), strict=True):
            assert (x.dtype, x.shape) == (expected.dtype, expected.shape)
            assert torch.equal(x.view(torch.uint8), expected.view(torch.uint8))
        assert list(arrays) == list(expected_arrays)
        for x, expected in zip(arrays.values(), expected_arrays.values(), strict=True):
            assert (x.dtype, x.shape, x.tobytes()) == (
                expected.dtype,
                expected.shape,
                expected.tobytes(),
            )


def test_the_arrays_of_that_test_hold_nans_of_several_payloads():
    for rank in range(3):
        tensors, arrays = rank_functions.return_bits(rank)
        for bits in (tensors["bfloat16"].view(torch.uint16).numpy(), arrays["bfloat16"].view("u2")):
            magnitudes = bits & 0x7FFF
            assert len(set(magnitudes[magnitudes > 0x7F80])) > 1


def test_a_failure_brings_its_traceback():
    with pytest.raises(RankError) as caught:
        run_ranks(rank_functions.raise_in_rank_1, 2)
    message = str(caught.value)
    # The peer, whose connection breaks, is not the cause.
    assert message.startswith("rank 1 of 2 failed:\nTraceback")
    assert "in _name_of_the_failing_function" in message
    assert message.endswith("LookupError: no seventh seal\n")


@pytest.mark.parametrize("code", (slow(3), 0))
def test_a_death_is_told_by_its_exit_code(code):
    with pytest.raises(RankError) as caught:
        run_ranks(rank_functions.exit_in_rank_1, 2, code)
    assert str(caught.value).startswith(f"died without an answer: rank 1 with exit code {code} ")


def test_a_killed_rank_is_told_by_its_signal():
    with pytest.raises(RankError, match=r"^died without an answer: rank 1 with exit code -9 "):
        run_ranks(rank_functions.kill_rank_1, 2)


def test_a_hang_ends_at_the_timeout():
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        run_ranks(rank_functions.hang_in_rank_1, 2, timeout=6.0)
    # Rank 0 waits for rank 1, so neither had finished. Starting and killing them takes the rest.
    assert time.monotonic() - start < 11
    assert str(caught.value).startswith("ranks [0, 1] of 2 had not finished after 6 s;")


def test_a_result_that_cannot_be_pickled_is_that_ranks_error():
    with pytest.raises(RankError, match=r"(?s)^rank 0 of 1 failed:.*pickle.*<lambda>"):
        run_ranks(rank_functions.return_a_lambda, 1)


@pytest.mark.parametrize("where", ("function", "argument"))
def test_what_cannot_be_sent_is_refused_at_once(where):
    task = (lambda rank: rank,) if where == "function" else (print, lambda: None)
    start = time.monotonic()
    with pytest.raises((pickle.PicklingError, AttributeError), match=re.escape("<lambda>")):
        run_ranks(task[0], 2, *task[1:])
    assert time.monotonic() - start < 1, "before a process is started"


def test_a_process_that_cannot_be_started_is_said(monkeypatch):
    """As from inside a rank, which may have no children of its own."""
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setitem(config, "daemon", True)
    with pytest.raises(AssertionError, match="daemonic processes are not allowed"):
        run_ranks(rank_functions.describe_rank, 2)
