"""Exact attention is as near to float64 as float32 kernels are; the example has the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "accuracy_exact.py"
BOUND = 1.5  # times the smaller error of JAX's and PyTorch's float32 kernels
NAMES = ("gaussian", "heavy tails", "long rows", "outlier channels", "outlier tokens")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("accuracy") / "accuracy.json"
    options = [f"--only={name}" for name in NAMES]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", *options, "--json", file],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["distributions"]


@pytest.mark.parametrize("name", NAMES)
def test_as_accurate_as_float32(found, name):
    rows, ratios = found[name]["rows"], found[name]["ratios"]["exact / better"]
    for measure in ("max", "rms"):
        for result in ("out", "dq", "dk", "dv"):
            stock = min(rows[row][measure][result] for row in ("jax float32", "torch float32"))
            assert rows["exact"][measure][result] <= BOUND * stock, (measure, result)
            assert ratios[measure][result] == rows["exact"][measure][result] / stock
