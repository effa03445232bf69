"""The training example: one curve at every degree, on several processes, after a kill."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import slow
from decoder import Config
from long_context_training import Run, read, train
from loss_by_degree import planted_bug
from train_long_context import app
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("less_optimised")

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIG = Config(features=32, hidden=48, layers=1)
TEXT = read([], 64, limit=1 << 17)
STEPS = 60


def run(degree: int, **options: Any) -> Run:
    options = {"attention": "blockwise", "steps": STEPS, "learning_rate": 1e-2} | options
    return Run(degree=degree, tokens=64, batch=4, **options)


def far(a, b):
    return np.max([abs(x - y) for x, y in zip(a, b, strict=True)])


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_it():
    """Optax adds Python floats to integers."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def one_device():
    return train(run(1), TEXT, CONFIG)


def test_it_learns(one_device):
    assert one_device[0] > 5.5
    assert np.mean(one_device[-20:]) < 3.4


@pytest.mark.parametrize("degree", (slow(2), 8))
def test_the_curves_coincide(one_device, degree):
    """Losses agree to 1e-3, not in bits: sums of projections depend on the shape of a shard."""
    assert far(train(run(degree), TEXT, CONFIG), one_device) < 1e-3


@pytest.mark.parametrize(
    ("strategy", "order"), (("ring", "zigzag"), slow("all-gather", "striped")), ids=str
)
def test_other_strategies_and_orders(one_device, strategy, order):
    options = {"data": 2, "strategy": strategy, "order": order}
    assert far(train(run(4, **options), TEXT, CONFIG), one_device) < 1e-3


def test_exact_attention_fsdp_and_tiles(one_device):
    options = {"attention": "exact", "data": 2, "fsdp": True, "tiles": 3}
    assert far(train(run(4, **options), TEXT, CONFIG), one_device) < 1e-3


def test_the_historical_bug_is_visible(one_device):
    without = train(run(4, steps=1), TEXT, CONFIG)  # of the same sizes, traced before the bug
    with planted_bug():
        scrambled = train(run(4), TEXT, CONFIG)
    assert scrambled[:1] != without
    assert np.mean(scrambled[-20:]) > np.mean(one_device[-20:]) + 0.1


@pytest.mark.slow  # killed in exact arithmetic in test_processes_failures.py
def test_a_killed_run_goes_on_at_another_degree(one_device, tmp_path):
    """Killed after its first checkpoint at degree 1, resumed at degree 4, and again at degree 2."""
    folder = tmp_path / "steps"
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import jax; jax.config.update('jax_num_cpu_devices', 1)\n"
        "import time; from pathlib import Path\n"
        "from decoder import Config\n"
        "from long_context_training import Run, read, train\n"
        f"run = Run(1, 1, 64, 4, {STEPS}, 1e-2, 'blockwise', save_every=5)\n"
        f"train(run, read([], 64, limit=1 << 17), {CONFIG!r}, Path({str(folder)!r}),\n"
        "    lambda step, loss: time.sleep(0.2))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 300
        while not (folder / "5").exists():
            assert child.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    first = 1 + max(int(x.name) for x in folder.iterdir() if x.name.isdecimal())
    assert first < STEPS - 10
    seen = []
    part = train(run(4, steps=first + 5), TEXT, CONFIG, folder, lambda step, _: seen.append(step))
    assert seen == list(range(first, first + 5))
    losses = train(run(2), TEXT, CONFIG, folder)
    assert losses[: first + 5] == part
    assert far(losses, one_device) < 1e-3


@pytest.mark.slow  # two processes end, and go on, in test_processes_failures.py
def test_two_processes(tmp_path):
    """Two processes of two devices each read the same files and keep their parts."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [
        "--degree",
        "4",
        "--tokens",
        "64",
        "--steps",
        "3",
        "--layers",
        "1",
        "--features",
        "32",
    ]
    command = [sys.executable, str(EXAMPLES / "train_long_context.py"), __file__, *options]
    several = ["--folder", str(tmp_path / "two")]
    several += ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    children = [
        subprocess.Popen([*command, *several, str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    alone = CliRunner().invoke(app, [__file__, *options, "--folder", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    # Not as they are printed: two numbers as near as these can round to different last digits.
    curves = (json.loads((tmp_path / run / "losses.json").read_text()) for run in ("one", "two"))
    assert far(*curves) <= 1e-5
    for line in ("at the first", "step 1 of 3: loss"):
        assert [line in output for output in outputs] == [True, False]


def test_the_command_writes_a_plot(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a long text, " * 50)
    options = [
        "--degree",
        "2",
        "--tokens",
        "64",
        "--steps",
        "2",
        "--layers",
        "1",
        "--features",
        "32",
        "--offload",
    ]
    with pytest.warns(UserWarning, match=r"on CPUs .* nothing moves"):
        result = CliRunner().invoke(app, [str(file), *options, "--folder", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "run" / "losses.json").read_text())) == 2
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--degree", "64"], "needs 64 devices, here are 8"),
        (["--attention", "flash"], "must be one of auto, blockwise, exact"),
        (["--learning-rate", "nan"], "--learning-rate must be finite and at least 0, got nan"),
        (["--process", "1"], "several processes need --coordinator"),
        (["--coordinator", "localhost:1", "--process", "1"], "--process is from 0 to 0, got 1"),
        (["no-such-file"], "does not exist"),
        ([os.devnull], "is not a file|no bytes|does not exist|is a"),
        (["--features", "100"], r"100 is not a multiple of 16: 8 heads .* Write --features 112"),
        (
            ["--features", "112", "--fsdp", "--data", "3", "--degree", "2"],
            r"of 48: .* the 3 devices of --data share. Write --features 144",
        ),
        ([__file__, "--tokens", "8", "--batch", "3", "--data", "2"], "B = 3 is not divisible by"),
    ),
)
def test_wrong_input(arguments, message):
    assert len(jax.devices()) == 8
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.output.replace("│", "").split()))
