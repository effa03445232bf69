"""The benchmark runs from the command line and measures every row; how fast is not tested."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "examples" / "benchmark_ulysses.py"


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=SCRIPT.parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_row_is_measured(tmp_path):
    file = tmp_path / "results.json"
    sizes = ("--tokens", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "8")
    degrees = ("--degree", "1", "--degree", "2")
    done = benchmark(*degrees, *sizes, "--repeats", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr

    found = json.loads(file.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert {what: row["degree"] for what, row in rows.items()} == {
        "jax.nn, one device": 1,
        "dense, one device": 1,
        "jax_seqpar, 1 device": 1,
        "jax_seqpar, 2 devices": 2,
        "torch sdpa, one process": 1,
        "torch_ref on gloo, 1 rank": 1,
        "torch_ref on gloo, 2 ranks": 2,
    }
    for what, row in rows.items():
        assert what in done.stdout
        for timing in (row["forward"], row["forward_backward"]):
            assert len(timing["seconds"]) == 1
            assert timing["min"] == timing["median"] == timing["max"] > 0
            assert timing["ratio"] > 0
    baseline = rows[found["baseline"]]
    assert baseline["forward"]["ratio"] == baseline["forward_backward"]["ratio"] == 1
    # Query and its gradient, key and value: what one device must hold at the least.
    inputs = 32 * (2 * 4 + 2 * 2) * 8 * 4
    assert rows["jax_seqpar, 1 device"]["planned_bytes_per_device"] > inputs
    assert rows["jax_seqpar, 2 devices"]["planned_bytes_per_device"] > inputs // 2


def test_sizes_that_do_not_divide_are_refused():
    done = benchmark("--degree", "4", "--heads", "6", "--kv-heads", "6")
    assert done.returncode == 2
    assert "query heads N = 6 is not divisible by the 4 devices" in done.stderr
