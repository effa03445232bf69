"""The benchmark runs from the command line and measures every row; how fast is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import benchmark_decoding
import plot_benchmarks
import pytest
from cases import slow
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("--heads", "2", "--head-dim", "8")
ONCE = ("--repeats", "1")


def benchmark(*arguments, script="benchmark_ulysses.py"):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow  # the rows of attention alone, below, go through the same tools
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
    done = benchmark("--degree", "4", "--heads", "6", "--kv-heads", "3")
    assert done.returncode == 2
    assert "KV heads K = 3 are fewer than the 4 ranks" in done.stderr


@pytest.mark.parametrize(
    ("command", "sizes", "expected"),
    [
        slow("kernels", ("--tokens", "32", *ONCE), ["torch flash", "blockwise", "jax.nn"]),
        slow(
            "skipping",
            ("--tokens", "32", "--window", "4", "--documents", "4", *ONCE),
            [
                "full",
                "window of 4",
                "4 even documents",
                "4 uneven documents",
                "a quarter of the keys",
                "a quarter of both",
            ],
        ),
        (
            "pipeline",
            ("--tokens", "32", "--degree", "2", *ONCE),
            [
                "jax_seqpar, 2 devices",
                "jax_seqpar ring, 2 devices",
                None,
                "torch_ref ring, 2 ranks",
            ],
        ),
        slow(
            "memory",
            ("--tokens", "64", "--degree", "2", "--chunks", "1"),
            ["blockwise"] * 3 + ["pipeline"],
        ),
    ],
    ids=("kernels", "skipping", "pipeline", "memory"),
)
def test_every_row_of_the_default_attention_is_measured(command, sizes, expected, tmp_path):
    file = tmp_path / "results.json"
    done = benchmark(command, *sizes, *TINY, "--json", str(file), script="benchmark_attention.py")
    assert done.returncode == 0, done.stderr

    found = json.loads(file.read_text())
    rows = found["rows"]
    if command == "pipeline":  # DeepSpeed where it is installed
        assert rows[2]["what"] in ("DeepSpeed, 2 ranks", "torch_ref, 2 ranks")
        assert all(row["outputs_apart"] < 1e-5 for row in rows)
        expected[2] = rows[2]["what"]
    assert [row["what"] for row in rows] == expected
    for row in rows:
        for measured in (row["forward"], row["both"]):
            assert measured["ratio"] > 0
            if command == "memory":
                assert measured["temp_bytes"] > 0 < measured["formula_bytes"]
            else:
                assert len(measured["seconds"]) == 1
                assert measured["median"] == measured["seconds"][0] > 0
                assert measured["ratio"] == 1 or row["what"] != found["baseline"]
    if command == "kernels":
        for row in rows:
            # Output and three gradients; planned by JAX alone.
            assert all(size is None or size >= 0 for size in row["peak_bytes"])
            if row["what"] != "torch flash":
                assert row["planned_bytes"][1] >= 4 * 32 * 2 * 8 * 4
    if command == "skipping":
        assert rows[2]["fewer_pairs"] == (32 * 33 / 2) / (4 * 8 * 9 / 2)


@pytest.mark.slow
def test_every_row_of_exact_attention_is_measured(tmp_path):
    file = tmp_path / "results.json"
    sizes = ("--tokens", "32", *TINY, *ONCE)
    done = benchmark(*sizes, "--json", str(file), script="benchmark_exact.py")
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(file.read_text())["rows"]}
    names = ["torch sdpa", "jax.nn", "exact", "exact, bfloat16", "its products alone"]
    assert list(rows) == [*names, "torch_ref exact"]
    assert all(row[x] > 0 for row in rows.values() for x in ("forward", "both"))


@pytest.mark.slow
def test_every_row_of_compile_times_is_measured(tmp_path):
    file = tmp_path / "results.json"
    done = benchmark("--tokens", "64", *ONCE, "--json", str(file), script="benchmark_compile.py")
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 5
    assert all(0 < row["forward"] < row["32 layers"] for row in rows)


@pytest.mark.parametrize(
    ("script", "command"),
    (("benchmark_gpu.py", ["kernels"]), ("benchmark_gpu.py", ["masks"]), ("tune_triton.py", [])),
)
def test_no_gpu_to_measure(script, command):
    done = benchmark(*command, script=script)
    assert done.returncode == 2
    assert "JAX sees no GPU" in done.stderr


def test_pictures_of_what_was_measured(tmp_path):
    """Pictures of every command, from files as the benchmarks write them."""
    timing = {"ratio": 1.0}
    rows = [{"tokens": n, "what": "ours", "forward": timing, "both": timing} for n in (1024, 2048)]
    errors = {"rms": {"out": 1e-7, "dk": 1e-7}}
    files = {
        "ratios": {"baseline": "ours", "rows": rows},
        "accuracy": {"distributions": {"gaussian": {"rows": {"ours": errors}}}},
    }
    for command in ("ratios", "accuracy", "traffic", "break-even"):
        arguments = [command, "--out", str(tmp_path / f"{command}.png")]
        if command in files:
            (tmp_path / command).write_text(json.dumps(files[command]))
            arguments.append(str(tmp_path / command))
        done = CliRunner().invoke(plot_benchmarks.app, arguments)
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    done = CliRunner().invoke(plot_benchmarks.app, ["ratios", str(tmp_path / "none")])
    assert done.exit_code == 2


@pytest.mark.slow  # the collectives of a step are counted in test_decoding_cache.py
def test_what_a_decoding_step_sends(tmp_path):
    """Decoding sends two all-reduces of 4 B N (V + 2) bytes, as its page says; by heads nothing."""
    file = tmp_path / "decoding.json"
    sizes = ("--tokens", "64", "--prompt", "16", "--heads", "4", "--kv-heads", "2")
    options = (*sizes, "--head-dim", "8", *ONCE, "--json", str(file))
    result = CliRunner().invoke(benchmark_decoding.app, options, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    rows = {(x["what"], x["degree"]): x for x in json.loads(file.read_text())["rows"]}
    for degree in (2, 4, 8):
        step = rows["along the tokens", degree]
        assert step["collectives"] == "2 all-reduce"
        assert 1e3 * step["sent"] == 2 * (degree - 1) / degree * 4 * 2 * 4 * (8 + 2)
    assert rows["by heads", 2]["collectives"] == "none"
    assert rows["prefill, Ulysses", 8]["collectives"] == "4 all-to-all"
    assert min(x["ratio"] for x in rows.values()) > 0
    wrong = CliRunner().invoke(benchmark_decoding.app, ["--tokens", "20"])
    assert wrong.exit_code == 2
