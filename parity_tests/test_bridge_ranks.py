"""run_ranks: values in order, failures that say what happened, and nobody left behind."""

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

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


def test_a_rank_killed_while_it_answers_is_told_by_its_signal():
    with pytest.raises(RankError, match=r"^died without an answer: rank 1 with exit code -9 "):
        run_ranks(rank_functions.return_with_a_signal_in_rank_1, 2, signal.SIGKILL)


def test_a_rank_stopped_while_it_answers_ends_at_the_timeout():
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        run_ranks(rank_functions.return_with_a_signal_in_rank_1, 2, signal.SIGSTOP, timeout=6.0)
    # Rank 0 waits for rank 1, so neither had finished. Starting and killing them takes the rest.
    assert time.monotonic() - start < 11
    assert str(caught.value).startswith("ranks [0, 1] of 2 had not finished after 6 s;")


@pytest.mark.parametrize(
    ("number", "error", "message"),
    (
        (signal.SIGKILL, RankError, r"rank \d with exit code -9 .* The function was not reached"),
        (signal.SIGSTOP, TimeoutError, r"ranks \[0, 1\] of 2 had not finished after 3 s"),
    ),
)
def test_a_rank_that_ends_or_stops_while_it_starts(number, error, message):
    """The rank ends or stops before it reads its task, which is larger than a pipe holds."""
    before = children()

    def send():
        while not (new := children() - before):
            time.sleep(0.001)
        os.kill(int(min(new)), number)

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        with pytest.raises(error, match=message):
            run_ranks(rank_functions.describe_rank, 2, bytes(1 << 20), timeout=3.0)
    sent.result()


def test_what_a_rank_has_started_ends_with_it():
    pids = run_ranks(rank_functions.start_a_program, 2)
    assert len({*pids}) == 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_a_temporary_folder_whose_name_a_url_would_escape(tmp_path, monkeypatch):
    folder = tmp_path / "a folder, jörg's"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert [rank for rank, *_ in run_ranks(rank_functions.describe_rank, 2, timeout=60.0)] == [0, 1]


def test_a_result_that_cannot_be_pickled_is_that_ranks_error():
    with pytest.raises(
        RankError, match=r"(?s)^rank 0 of 1 failed:.*returned cannot be pickled.*<lambda>.*arrays"
    ):
        run_ranks(rank_functions.return_a_lambda, 1)


def _inner():
    def local(rank):
        return rank

    return local


# Arguments of run_ranks, and what it says before a rank works.
REFUSALS = {
    "lambda": ((lambda rank: rank, 2), {}, TypeError, "cannot be sent .*<lambda>.* Define func"),
    "local": ((_inner(), 2), {}, TypeError, "cannot be sent .*<locals>.* not in a notebook"),
    "argument": (
        (print, 2, (x for x in ())),
        {},
        TypeError,
        "cannot be sent .*generator.* Pass and return",
    ),
    "no ranks": ((print, 0), {}, ValueError, "world_size must be a positive .* got 0"),
    "ranks as text": ((print, "2"), {}, ValueError, "world_size must be a positive .* got '2'"),
    "a flag": ((print, True), {}, ValueError, "world_size must be a positive .* got True"),
    "threads": ((print, 2), {"threads": 0.5}, ValueError, "threads must be a positive .* got 0.5"),
    "no time": ((print, 2), {"timeout": 0}, ValueError, "timeout must be a number .* got 0"),
    "for ever": ((print, 2), {"timeout": math.inf}, ValueError, "timeout must be .* got inf"),
    "NaN": ((print, 2), {"timeout": math.nan}, ValueError, "timeout must be .* got nan"),
    "None": ((print, 2), {"timeout": None}, ValueError, "timeout must be a number .* got None"),
    "true": ((print, 2), {"timeout": True}, ValueError, "timeout must be a number .* got True"),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_run_is_refused_at_once(case):
    args, options, error, message = case
    with pytest.raises(error, match=message):
        run_ranks(*args, **options)


def test_ranks_may_not_start_ranks(monkeypatch):
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    monkeypatch.setitem(config, "daemon", True)
    with pytest.raises(RuntimeError, match="a daemonic process, such as a rank, may not start"):
        run_ranks(rank_functions.describe_rank, 2)


def test_functions_of_a_package_that_is_run_are_refused(monkeypatch):
    """`python -m package` runs its `__main__`, which a spawned process does not run again."""
    main = ModuleType("__main__")
    main.__spec__ = ModuleSpec("package.__main__", None)

    def fn(rank):
        return rank

    fn.__module__, fn.__qualname__ = "__main__", "fn"
    monkeypatch.setattr(main, "fn", fn, raising=False)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(TypeError, match="fn is of a __main__ that ranks do not import"):
        run_ranks(fn, 2)


CALL = "from jax_seqpar.bridge import run_ranks\ndef fn(rank): return rank\nrun_ranks({}, 2)\n"
# How Python is started, its standard input, and the last line that it prints.
PROGRAMS = {
    "standard input": (["-"], CALL.format("print"), "ValueError: ranks import .*'<stdin>' is no f"),
    "notebook": (["-c", CALL.format("fn")], "", r"TypeError: .*fn is of a __main__ .* notebook"),
    "no main guard": (["FILE"], CALL.format("fn"), r"RankError: .*needs `if __name__ == \"__main_"),
}


@pytest.mark.parametrize("case", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_that_ranks_cannot_import(case, tmp_path):
    """A notebook's `__main__` has no file, as that of `python -c`."""
    arguments, code, message = case
    (tmp_path / "program.py").write_text(code)
    arguments = [str(tmp_path / "program.py") if x == "FILE" else x for x in arguments]
    run = subprocess.run(
        [sys.executable, *arguments], input=code, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 1
    assert re.search(message, run.stderr.splitlines()[-1]), run.stderr


COLLECTS = (
    "import sys, rank_functions\n"
    "from jax_seqpar.bridge import run_ranks\n"
    "run_ranks(rank_functions.hang_in_rank_1, 2)\n"
)
COMMAND = ["-m", "jax_seqpar", "parity", "--degree=2", "--tokens=16"]
STOPPED = "degree 2: 18 checks\nInterrupted: the PyTorch ranks .*\n"
# The program, the file whose presence says how far it is, the signal, whether its whole process
# group gets it as from a terminal, its exit status and all of its standard error.
ENDS = {
    "Ctrl-C": (COMMAND, "begun-0", signal.SIGINT, True, 130, STOPPED),
    "killed at once": (["-c", COLLECTS], "task", signal.SIGKILL, False, -9, ""),
    "ended in between": (["-c", COLLECTS], "answer-0", signal.SIGTERM, True, -15, ""),
}


@pytest.mark.parametrize("case", ENDS.values(), ids=ENDS)
def test_ranks_and_folder_go_with_their_parent(case, tmp_path):
    arguments, reached, number, group, status, message = case
    mark = f"SEQPAR_TEST={tmp_path}"
    environment = os.environ | {"TMPDIR": str(tmp_path), "SEQPAR_TEST": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(tmp_path.glob(f"seqpar-*/{reached}")) or parent.poll() is not None)
        if parent.poll() is None:
            (os.killpg if group else os.kill)(parent.pid, number)
        # At the end of file, the ranks have closed their side, too.
        _, errors = parent.communicate(timeout=180)
        assert parent.returncode == status, errors
        assert re.fullmatch(message, errors)
        wait_until(lambda: not marked(mark))
        assert list(tmp_path.glob("seqpar-*")) == []
    finally:
        parent.kill()
        parent.communicate()
        for process in marked(mark):
            os.kill(process, signal.SIGKILL)


def marked(mark):
    """The processes with this in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
