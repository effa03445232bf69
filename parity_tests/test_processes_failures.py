"""Real processes of the training example: one dies, stops or is asked to leave; the run goes on.

Whoever is left ends within a minute and says what to do; what is resumed has the bits of a run of
one process that nothing happened to.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import slow

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train_long_context.py"
FAILING = ROOT / "parity_tests" / "support" / "failing_process.py"
pytestmark = pytest.mark.usefixtures("less_optimised")
TEXT = str(ROOT / "LICENSE")
SMALL = ("--tokens", "32", "--layers", "1", "--features", "16", "--attention", "blockwise")
STEPS = 5
MINUTE = 60


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Processes:
    """Processes of one training, of four devices together.

    Args:
      failure: phase, signal and number of the process that fails, for `failing_process.py`.
    """

    def __init__(self, count, *options, failure=None):
        several = ["--coordinator", f"localhost:{free_port()}", "--processes", str(count)]
        arguments = [TEXT, "--degree", "4", *SMALL, *options, *(several if count > 1 else [])]
        self.started = []
        for i in range(count):
            script = [EXAMPLE]
            if failure is not None and failure[2] == i:
                script = [FAILING, failure[0], failure[1]]
            number = ["--process", str(i)] if count > 1 else []
            self.started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, script), *arguments, *number],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.started:
            child.kill()
            child.communicate()

    def ends(self, within=400, but=None):
        """Exit status and output of each process but one that is stopped."""
        deadline = time.monotonic() + within
        outputs = {}
        for i, child in enumerate(self.started):
            if i != but:
                outputs[i] = child.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
        return [(self.started[i].returncode, output) for i, output in outputs.items()]

    def wait_for_failure(self, process):
        """Waits until the operating system reports the process as killed or stopped."""
        pid = self.started[process].pid
        flags = os.WEXITED | os.WSTOPPED | os.WNOWAIT
        deadline = time.monotonic() + 400
        while os.waitid(os.P_PID, pid, flags | os.WNOHANG) is None:
            assert time.monotonic() < deadline, "it did not come to the failure"
            assert all(x.poll() is None for i, x in enumerate(self.started) if i != process)
            time.sleep(0.05)


def run(count, *options):
    """The output of processes that all end well."""
    with Processes(count, *options) as processes:
        ended = processes.ends()
    assert [status for status, _ in ended] == [0] * count, ended
    return "".join(output for _, output in ended)


def bits(folder) -> list[int]:
    """The losses of a run, as integers."""
    losses = json.loads((folder / "losses.json").read_text())
    return list(np.array(losses, np.float32).view(np.int32))


def saved_steps(folder):
    return sorted(int(x.name) for x in (folder / "steps").iterdir() if x.name.isdecimal())


def half_written(folder):
    """Files of the third checkpoint that the failure in a save leaves."""
    return [*(folder / "steps").glob("2.*tmp*")]


FAILURES = [
    ("start-up", "SIGKILL", 1),
    ("step", "SIGSTOP", 1),
    slow("start-up", "SIGSTOP", 0),
    slow("start-up", "SIGKILL", 0),
    slow("devices", "SIGKILL", 1),
    slow("devices", "SIGSTOP", 0),
    slow("step", "SIGKILL", 0),
    slow("step", "SIGKILL", 1),
    slow("step", "SIGSTOP", 0),
    slow("save", "SIGSTOP", 1),
    slow("save", "SIGKILL", 0),
]
# JAX ends the others of a coordinator that is killed in C++, before anything else can.
OF_JAX = "the JAX distributed service detected fatal errors"


@pytest.mark.parametrize(("phase", "how", "victim"), FAILURES)
def test_the_other_process_ends_and_says_why(phase, how, victim, tmp_path):
    options = ("--steps", "100", "--save-every", "1", "--folder", str(tmp_path))
    # Half of the default patience, for busy machines; for who never comes nobody has to wait long.
    within = 10 if phase == "start-up" else 200
    patience = ("--patience", "15", "--start-within", str(within))
    failure = (phase, how, victim)
    with Processes(2, *options, *patience, failure=failure) as processes:
        processes.wait_for_failure(victim)
        ((status, output),) = processes.ends(MINUTE, but=victim)
    words = " ".join(output.split())
    if victim == 0 and how == "SIGKILL" and phase != "start-up":
        assert status != 0
        assert OF_JAX in words or "Stopped: a collective failed" in words
    else:
        assert status == 1, output
        why = {
            "start-up": "not every process came in 10 s",
            "devices": rf"process {victim} has shown no sign of life for 15 s",
        }
        either = rf"process {victim} has shown no sign of life for 15 s|a collective failed"
        assert re.search(
            rf"Stopped: ({why.get(phase, either)}).*Start every process again with the same "
            r"--folder: training goes on from its last checkpoint",
            words,
        ), output
    if phase == "save":
        assert saved_steps(tmp_path) == [0, 1], "what is half written is no checkpoint"
        assert half_written(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of one process that nothing happens to, in exact arithmetic."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(1, "--exact", "--steps", str(STEPS), "--folder", str(folder))
    assert len(set(bits(folder))) == STEPS
    return bits(folder)


@pytest.mark.parametrize("after", (1, slow(4)))
def test_a_killed_run_goes_on_to_the_same_bits_on_other_processes(undisturbed, after, tmp_path):
    """A run whose process is killed in the third save, the second checkpoint damaged, goes on."""
    options = ("--exact", "--steps", str(STEPS), "--save-every", "1", "--folder", str(tmp_path))
    with Processes(2, *options, failure=("save", "SIGKILL", 1)) as processes:
        processes.wait_for_failure(1)
        ((status, words),) = processes.ends(MINUTE, but=1)
    assert status == 1, words
    assert "Start every process again with the same --folder" in " ".join(words.split())
    assert saved_steps(tmp_path) == [0, 1], "what is half written is no checkpoint"
    assert half_written(tmp_path)
    damaged = max((tmp_path / "steps" / "1").glob("state/**/d/*"), key=os.path.getsize)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    output = run(after, *options)
    assert "Step 1 is damaged" in output
    assert "Resuming after step 0" in output
    assert bits(tmp_path) == undisturbed


def test_sigterm_saves_and_leaves(tmp_path):
    """SIGTERM to the script of two hosts saves a step, from which the next start goes on."""
    folder = ("--folder", str(tmp_path), "--save-every", "1000")

    def start(steps):
        command = ["bash", "examples/launch/two_hosts.sh", TEXT, *SMALL, *folder]
        return subprocess.Popen(
            [*command, "--steps", str(steps)],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    with start(1_000_000) as script:
        assert script.stdout is not None
        seen = ""
        while "step 6 of" not in seen:
            line = script.stdout.readline()
            assert line, seen
            seen += line
        script.send_signal(signal.SIGTERM)
        seen += script.communicate(timeout=120)[0]
    assert script.returncode == 75, seen
    assert seen.count("step 6 of") == 1, "process 0 alone tells of its steps"
    told = re.findall(r"SIGTERM after step (\d+) of 1000000, saved: start again with the", seen)
    assert len(told) == 2
    made = int(told[0])
    assert told == [str(made)] * 2, "every process leaves after the same step"
    assert made >= 6
    assert saved_steps(tmp_path) == [0, made - 1]
    with start(made + 1) as script:
        output = script.communicate(timeout=400)[0]
    assert script.returncode == 0, output
    assert len(bits(tmp_path)) == made + 1
    assert f"at step {made + 1}" in output
