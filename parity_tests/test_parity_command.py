"""`seqpar parity` and `seqpar certify`: what they print and write, their exit status, and what
they refuse to run."""

import io
import json
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from exact_cases import torch_exact
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jax_seqpar import cli, dot_product_attention, sequence_to_heads
from jax_seqpar.bridge.torch_ranks import RankError
from jax_seqpar.cli import certify_command, parity_command, parity_question
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.compare.report import BitsReport
from jax_seqpar.exact.self_test import certificate, questions
from jax_seqpar.mask import Mask, Spec
from jax_seqpar.parity import inputs, torch_self_test
from jax_seqpar.parity import run as parity
from jax_seqpar.parity.checks import pipeline, reshard
from jax_seqpar.parity.golden import digest, expected_digest
from jax_seqpar.parity.inputs import DTYPES, OPTIONAL, Case, keywords
from jax_seqpar.parity.plan import Kernels, inputs_by_label, plan
from jax_seqpar.parity.report import parity_table, summary
from torch_ref import wrong_versions
from torch_ref.dense import dense_attention as torch_dense_attention

pytestmark = pytest.mark.usefixtures("few_optimisations")

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

TINY = ("--batch=2", "--tokens=4", "--heads=4", "--kv-heads=2", "--head-dim=3")
SHAPE, SHAPE_MHA, SHAPE_MQA = "2x4x4/2x3", "2x4x4x3", "2x4x4/1x3"
OUTPUTS = ("forward", "dq", "dk", "dv")
# By kernel and name: the shape, the outputs, and at degree 2 the verdict.
RESHARDS = {
    "reshard to heads": (SHAPE_MHA, ("forward", "dq"), "equal"),
    "reshard to sequence": (SHAPE_MHA, ("forward", "dq"), "equal"),
    "identity": (SHAPE, ("forward", "dq"), "equal"),
    "identity sbhd": (SHAPE, ("forward", "dq"), "equal"),
}
HISTORY = {
    "history v1": (SHAPE, (), "caught"),
    "history v1 sbhd": (SHAPE, OUTPUTS, "caught"),
    "history v2": (SHAPE, (), "caught"),
    "history v2 sbhd": (SHAPE, OUTPUTS, "caught"),
    "history v5": (SHAPE, OUTPUTS, "equal"),
    "history v5 sbhd": (SHAPE, ("forward",), "caught"),
}
ROWS = {
    "exact": {
        **RESHARDS,
        "multi-head exact": (SHAPE_MHA, OUTPUTS, "equal"),
        "multi-query exact": (SHAPE_MQA, OUTPUTS, "equal"),
        "adversarial exact": (SHAPE, OUTPUTS, "equal"),
        "grouped exact": (SHAPE, OUTPUTS, "equal"),
        "grouped exact sbhd": (SHAPE, OUTPUTS, "equal"),
        "grouped exact all-gather": (SHAPE, OUTPUTS, "equal"),
        "grouped exact ring": (SHAPE, OUTPUTS, "equal"),
        "generated plain": (SHAPE, OUTPUTS, "differs"),
        **HISTORY,
    },
    "shared": {
        **RESHARDS,
        "multi-head sdpa": (SHAPE_MHA, OUTPUTS, "equal"),
        "multi-query sdpa": (SHAPE_MQA, OUTPUTS, "equal"),
        "grouped sdpa": (SHAPE, OUTPUTS, "equal"),
        "grouped sdpa sbhd": (SHAPE, OUTPUTS, "equal"),
        "grouped dense": (SHAPE, OUTPUTS, "equal"),
        **HISTORY,
    },
    "plain": {
        "multi-head plain": (SHAPE_MHA, OUTPUTS, "differs"),
        "multi-query plain": (SHAPE_MQA, OUTPUTS, "differs"),
        "grouped plain": (SHAPE, OUTPUTS, "differs"),
    },
}
# Of one rank and device there is nothing to gather.
FROM_DEGREE = {"grouped exact all-gather": 2, "grouped exact ring": 2}
EXACT = [name for name in ROWS["exact"] if " exact" in name]


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """The devices of the tests are there already, and their number cannot be changed any more."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


@pytest.fixture(autouse=True, scope="module")
def remembered_ranks():
    """PyTorch runs the same checks once, as nothing that these tests change is on its side."""
    remembered = {}
    start_ranks = parity.start_ranks

    @contextmanager
    def start(fn, degree, checks, *, timeout):
        bits = (
            (getattr(check, "spec", None), *(x.tobytes() for x in check.inputs.values()))
            for check in checks
        )
        key = degree, tuple(check.name for check in checks), tuple(bits)
        if key not in remembered:
            with start_ranks(fn, degree, checks, timeout=timeout) as collect:
                remembered[key] = collect()
        yield lambda: remembered[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "start_ranks", start)
        yield


def seqpar(*arguments):
    # Wide, so that no message is broken into lines.
    environment = {"COLUMNS": "500", "TERMINAL_WIDTH": "500"}
    return CliRunner().invoke(cli.app, ["parity", *map(str, arguments)], env=environment)


def rows(output):
    """The cells of each row of the table, by the name of the check and the degree."""
    return {key: cells for key, (cells, _) in table_of(output).items()}


def hashes(output):
    """Shown hashes, by row that has one."""
    return {key: sha256 for key, (_, sha256) in table_of(output).items() if sha256 is not None}


def table_of(output):
    found = {}
    for line in output.splitlines():
        line = " ".join(line.split())
        pattern = r"(.*?) (\d+(?:x[\d/]+)+) (\d+) (.*?)(?: ([0-9a-f]{8}))?"
        if match := re.fullmatch(pattern, line):
            name, shape, degree, rest, sha256 = match.groups()
            found[name, int(degree)] = [shape, *rest.split()], sha256
    return found


@pytest.mark.parametrize(("kernel", "degrees"), (("exact", (1, 2)), ("shared", (2,))))
def test_equal_at_every_degree(kernel, degrees, tmp_path):
    file = tmp_path / "results.json"
    # Exact is what runs unasked.
    asked = () if kernel == "exact" else ("--kernel", kernel)
    repeated = [f"--degree={degree}" for degree in (2, *degrees[::-1], 2)]
    result = seqpar(*TINY, *asked, *repeated, "--json", file)
    assert result.exit_code == 0, result.output
    # One rank exchanges nothing, so v1 is right token-first; v2's transpose is wrong all the same.
    right_alone = {"history v1 sbhd"}
    expected_rows, table = ROWS[kernel], rows(result.output)
    expected_keys = [
        (name, degree)
        for degree in degrees
        for name in expected_rows
        if degree >= FROM_DEGREE.get(name, 1)
    ]
    assert set(table) == set(expected_keys)
    for (name, degree), (shape, *cells, verdict) in table.items():
        expected_shape, outputs, expected = expected_rows[name]
        if degree == 1 and name in right_alone:
            expected = "equal"
        assert (shape, verdict) == (expected_shape, expected)
        if verdict == "equal":
            zeros = ["0"] * len(outputs) + ["-"] * (4 - len(outputs))
            assert cells == zeros

    payload = json.loads(file.read_text())
    assert payload["passed"] is True
    results = {(r["case"], r["degree"]): r for r in payload["results"]}
    assert list(results) == expected_keys
    total = 0
    for (name, degree), r in results.items():
        assert [r["shape"], r["verdict"]] == [table[name, degree][0], table[name, degree][-1]]
        assert r["must_differ"] == (r["verdict"] in ("caught", "differs"))
        if r["error"] is not None:
            assert r["outputs"] == {}
            continue
        assert tuple(r["outputs"]) == (expected_rows[name][1] or OUTPUTS)
        for report in r["outputs"].values():
            assert report["total"] == sum(leaf["total"] for leaf in report["leaves"])
            assert report["equal"] == (report["differing"] == 0)
            assert all(leaf["equal"] for leaf in report["leaves"]) == report["equal"]
            total += report["total"] if r["verdict"] == "equal" else 0
    assert all(r["error"] is None for r in results.values() if not r["must_differ"])
    verdicts = [r["verdict"] for r in results.values()]
    plain = [
        x for r in results.values() if r["verdict"] == "differs" for x in r["outputs"].values()
    ]
    assert len(plain) == (8 if kernel == "exact" else 0)
    differing = ""
    if plain:
        share = sum(x["differing"] for x in plain) / sum(x["total"] for x in plain)
        differing = f"; attention that is not exact differs in {share:.0%} of the elements"
        differing = differing.replace("%", " %")
    assert result.output.rstrip().endswith(
        f"EQUAL: {verdicts.count('equal')} checks, {total:,} elements, 0 bits differ; "
        f"{verdicts.count('caught')} wrong versions caught{differing}."
    )
    assert_hashes(kernel, hashes(result.output), results)


def assert_hashes(kernel, shown, results):
    """Every exact row has one, of the same bits whatever the degree and the layout."""
    names = EXACT if kernel == "exact" else []
    assert set(shown) == {
        (name, degree) for name in names for degree in (1, 2) if degree >= FROM_DEGREE.get(name, 1)
    }
    for key, r in results.items():
        assert (r["sha256"] is not None) == (key in shown)
        assert r["golden"] is None  # Sizes of which nobody keeps a hash.
    for name, degree in shown:
        sha256 = results[name, degree]["sha256"]
        assert re.fullmatch("[0-9a-f]{64}", sha256)
        assert shown[name, degree] == sha256[:8]
        assert sha256 == results[name, FROM_DEGREE.get(name, 1)]["sha256"]
    if names:
        grouped = {name for name in names if name.startswith("grouped")}
        assert len({shown[name, 2] for name in grouped}) == 1
        assert len(set(shown.values())) == len(names) - len(grouped) + 1
        # By PyTorch alone, on one rank.
        alone = torch_exact(Case(2, 4, 4, 2, 3).inputs(), is_causal=True)
        assert results["grouped exact", 2]["sha256"] == digest(alone)


def test_plain_kernels_differ(tmp_path):
    """Plain kernels differ: equal bits of inexact sums would mean that nothing is compared."""
    file = tmp_path / "results.json"
    result = seqpar(*TINY, "--kernel=plain", "--degree=2", "--json", file)
    assert result.exit_code == 0, result.output
    table = rows(result.output)
    assert set(table) == {(name, 2) for name in ROWS["plain"]}
    assert not hashes(result.output)
    for r in json.loads(file.read_text())["results"]:
        shape, outputs, verdict = ROWS["plain"][r["case"]]
        differing = [r["outputs"][name]["differing"] for name in outputs]
        assert table[r["case"], 2] == [shape, *map(str, differing), verdict]
        assert (r["expected"], r["outcome"], r["verdict"]) == ("rounded", "rounded", "differs")
        assert r["must_differ"]
        assert sum(differing) > 0
        # By roundings, and by no more.
        leaves = [leaf for x in r["outputs"].values() for leaf in x["leaves"]]
        assert all(leaf["max_abs"] is None or leaf["max_abs"] < 1e-5 for leaf in leaves)
    assert "EQUAL" not in result.output
    assert result.output.splitlines()[-1].startswith("DIFFERENT, as plain kernels must be")


def test_a_plain_row_without_a_difference_sees_nothing(monkeypatch):
    blind = row("grouped plain", expected="rounded")
    assert (blind.outcome, blind.verdict, blind.passed) == ("right", "SEES NOTHING", False)
    assert blind.must_differ
    monkeypatch.setattr(parity_command, "run_parity", lambda *_, **__: [blind])
    result = seqpar(*TINY, "--kernel=plain", "--degree=2")
    assert result.exit_code == 1
    assert rows(result.output)["grouped plain", 2][-2:] == ["SEES", "NOTHING"]
    assert "grouped plain, degree 2: SEES NOTHING" in result.output
    assert "NOT EQUAL: 1 of 1 checks failed." in result.output


def test_a_plain_row_differs_by_one_bit():
    x = np.ones((2, 3), np.float32)
    y = x.copy()
    y.view(np.uint32)[1, 2] ^= 1
    reports = {"forward": compare_bits(x, x), "dq": compare_bits(x, y)}
    seeing = replace(row("grouped plain", expected="rounded"), reports=reports)
    assert (seeing.outcome, seeing.verdict, seeing.passed) == ("rounded", "differs", True)
    assert summary([seeing]).startswith("DIFFERENT")
    # The same difference in a row that has to be equal.
    exact = replace(seeing, expected="right")
    assert (exact.outcome, exact.verdict, exact.passed) == ("scrambled", "DIFFERS", False)


def test_other_dtypes_pass_for_no_rounding_and_for_no_history():
    """Results of two dtypes fail, although a report without differences is within every limit."""
    x = np.ones((2, 3), np.float32)
    reports = {"forward": compare_bits(x, 7 * x.astype(jnp.bfloat16))}
    for expected in ("rounded", "right", "scrambled"):
        result = replace(row("grouped plain", expected=expected), reports=reports)
        assert (result.outcome, result.passed) == ("retyped", False)


def test_an_output_that_pytorch_does_not_give_is_missed():
    check = pipeline.PipelineCheck(2, Case(2, 4, 4, 2, 3).inputs(), "identity")
    jax_side = check.truth()
    parts = [{"forward": x} for x in np.split(jax_side["forward"], 2, axis=1)]
    result, _ = parity._compare(check, 2, parts, jax_side)
    assert (result.verdict, result.error) == ("DIFFERS", "PyTorch gave no dq.")


def test_plain_kernels_that_differ_by_more_than_roundings_are_seen(different):
    result = seqpar(*TINY, "--kernel=plain", "--degree=2")
    assert result.exit_code == 1
    assert {cells[-1] for cells in rows(result.output).values()} == {"DIFFERS"}
    assert "NOT EQUAL: 3 of 3 checks failed." in result.output


def test_the_seed_reaches_the_inputs_of_every_check():
    def inputs(seed):
        named = inputs_by_label(Case(2, 4, 4, 2, 3), [], seed, Kernels.EXACT)
        checks = plan(2, named, Spec(Mask(is_causal=True)), Kernels.EXACT, seed)
        return [(check.name, tuple(x.tobytes() for x in check.inputs.values())) for check in checks]

    for (name, x), (_, other) in zip(inputs(0), inputs(1), strict=True):
        assert x != other, name


def test_a_golden_hash_that_does_not_match(monkeypatch, tmp_path):
    """Both frameworks agree, and on something else than on every other machine."""
    asked = []

    def expected(inputs, rules):
        asked.append((digest(inputs), rules))
        return "0" * 64

    monkeypatch.setattr(parity, "expected_digest", expected)
    file = tmp_path / "results.json"
    result = seqpar(*TINY, "--degree=2", "--json", file)
    assert result.exit_code == 1
    failed = {
        name: cells for (name, _), cells in rows(result.output).items() if cells[-1].isupper()
    }
    assert failed == {name: [ROWS["exact"][name][0], *("0" * 4), "NOT", "GOLDEN"] for name in EXACT}
    assert "grouped exact, degree 2: NOT GOLDEN" in result.output
    assert f"NOT EQUAL: {len(EXACT)} of {len(ROWS['exact'])} checks failed." in result.output
    named = inputs_by_label(Case(2, 4, 4, 2, 3), [], 0, Kernels.EXACT)
    assert set(asked) == {(digest(inputs), Spec(Mask(is_causal=True))) for inputs in named.values()}
    for r in json.loads(file.read_text())["results"]:
        assert r["golden"] == ("0" * 64 if r["case"] in EXACT else None)
        assert r["sha256"] != r["golden"] or r["sha256"] is None


def test_a_hash_is_golden_or_is_not():
    kept, other = "a" * 64, "b" * 64
    golden = row("grouped exact", sha256=kept, golden=kept)
    assert (golden.verdict, golden.passed) == ("equal", True)
    nobody_kept_one = replace(golden, golden=None)
    assert (nobody_kept_one.verdict, nobody_kept_one.passed) == ("equal", True)
    wrong = replace(golden, golden=other)
    assert (wrong.verdict, wrong.passed, wrong.outcome) == ("NOT GOLDEN", False, "right")
    unequal = {"forward": compare_bits(np.zeros(2), np.ones(2))}
    different = replace(golden, reports=unequal)
    assert (different.verdict, different.passed) == ("DIFFERS", False)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_default_size_have_golden_hashes(dtype, causal):
    named = inputs_by_label(Case(dtype=dtype), [], 0, Kernels.EXACT)
    assert list(named) == ["multi-head", "multi-query", "adversarial", "grouped"]
    kept = [expected_digest(inputs, Spec(Mask(is_causal=causal))) for inputs in named.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", str(sha256)) for sha256 in kept)
    others = [
        expected_digest(inputs, Spec(Mask(is_causal=not causal))) for inputs in named.values()
    ]
    assert len({*kept, *others}) == 8
    # One bit of the inputs, and it is another question.
    query = named["grouped"]["query"].copy()
    query.view(np.uint8)[0, 0, 0, 0] ^= 1
    assert (
        expected_digest({**named["grouped"], "query": query}, Spec(Mask(is_causal=causal))) is None
    )


@pytest.fixture
def different(monkeypatch):
    """JAX's pipeline gets the value's tokens in reverse, and v5 is said to be wrong batch-first."""

    def reversed_value(query, key, value, **options):
        return dot_product_attention(query, key, jnp.flip(value, axis=1), **options)

    # Not the programs that other tests have compiled, nor any for them.
    monkeypatch.setattr(pipeline, "_jax_program", pipeline._jax_program.__wrapped__)
    monkeypatch.setattr(pipeline, "dot_product_attention", reversed_value)
    expected = wrong_versions.expected_outcome

    def v5_too(name, layout, *sizes):
        wrong = (name, layout) == ("v5", "bshd")
        return "scrambled" if wrong else expected(name, layout, *sizes)

    monkeypatch.setattr(wrong_versions, "expected_outcome", v5_too)


def test_a_difference_is_reported_and_saved(different, tmp_path):
    folder, file = tmp_path / "new" / "failing", tmp_path / "results.json"
    arguments = ("--kernel=shared", "--degree=2", "--json", file, "--save-failing", folder)
    result = seqpar(*TINY, *arguments)
    assert result.exit_code == 1
    table = rows(result.output)
    failed = {name: cells for (name, _), cells in table.items() if cells[-1].isupper()}
    verdicts = {name: cells[-1] for name, cells in failed.items()}
    assert verdicts == {"grouped dense": "DIFFERS", "history v5": "CAUGHT"}
    assert failed["history v5"][-2:] == ["NOT", "CAUGHT"]
    assert result.output.rstrip().endswith("NOT EQUAL: 2 of 15 checks failed.")
    assert "grouped dense, degree 2: DIFFERS" in result.output
    assert "first at batch 0, token 0, head 0, channel 0" in result.output

    names = {f"{stem}.{suffix}" for stem in failed_stems() for suffix in ("json", "safetensors")}
    assert {path.name for path in folder.iterdir()} == names
    saved = load_file(folder / f"{failed_stems()[0]}.safetensors")
    outputs = ("forward", "dq", "dk", "dv")
    assert set(saved) == {
        *(f"input.{name}" for name in ("query", "key", "value", "grad")),
        *(f"{side}.{name}" for side in ("jax", "torch") for name in outputs),
    }
    rng = np.random.default_rng(0)
    for name, heads in (("query", 4), ("key", 2), ("value", 2), ("grad", 4)):
        expected = rng.standard_normal((2, 4, heads, 3)).astype(np.float32)
        assert np.array_equal(saved[f"input.{name}"], expected)
    payload = json.loads(file.read_text())
    assert payload["passed"] is False
    (row,) = (r for r in payload["results"] if r["case"] == "grouped dense")
    assert json.loads((folder / f"{failed_stems()[0]}.json").read_text()) == row
    for name, cell in zip(outputs, failed["grouped dense"][1:], strict=False):
        # Finite numbers without a zero: their values differ where their bits do.
        differing = np.count_nonzero(saved[f"jax.{name}"] != saved[f"torch.{name}"])
        assert differing > 0
        assert (int(cell), row["outputs"][name]["differing"]) == (differing, differing)

    not_caught = load_file(folder / f"{failed_stems()[1]}.safetensors")
    for name in outputs:
        assert np.array_equal(not_caught[f"jax.{name}"], not_caught[f"torch.{name}"])


def failed_stems():
    return "grouped-dense-degree-2", "history-v5-degree-2"


def test_a_reshard_that_differs_is_saved(monkeypatch, tmp_path):
    def one_token_off(x, axis_name):
        return jnp.roll(sequence_to_heads(x, axis_name), 1, axis=1)

    monkeypatch.setitem(reshard.RESHARDS, "sequence_to_heads", one_token_off)
    result = seqpar(*TINY, "--degree=2", "--save-failing", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "NOT EQUAL: 1 of 18 checks failed." in result.output
    with safe_open(tmp_path / "reshard-to-heads-degree-2.safetensors", "np") as file:
        for dtype in ("int8", "float32", "uint64"):
            on_jax, on_torch = (file.get_tensor(f"{x}.forward.{dtype}") for x in ("jax", "torch"))
            assert np.array_equal(np.roll(on_torch, 1, axis=1).view("u1"), on_jax.view("u1"))
            assert not np.array_equal(on_torch.view("u1"), on_jax.view("u1"))


def random_inputs(dtype, names, heads=4, tokens=4, seed=3, kv_heads=2):
    rng = np.random.default_rng(seed)
    shapes = {"query": heads, "key": kv_heads, "value": kv_heads, "grad": heads}
    return {name: rng.standard_normal((1, tokens, shapes[name], 3)).astype(dtype) for name in names}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file(arrays, path)


def test_files_of_ones_own(tmp_path):
    """A generated and a given gradient, two formats, two dtypes."""
    acts = random_inputs(np.float32, ("query", "key", "value"))
    half = random_inputs(ml_dtypes.bfloat16, ("query", "key", "value", "grad"), tokens=6)
    paths = tmp_path / "acts.npz", tmp_path / "half.safetensors"
    for path, arrays in zip(paths, (acts, half), strict=True):
        write(path, arrays)
    file = tmp_path / "results.json"
    inputs = [f"--input={path}" for path in paths]
    result = seqpar("--degree=2", "--kernel=shared", *inputs, "--json", file)
    assert result.exit_code == 0, result.output
    results = {r["case"]: r for r in json.loads(file.read_text())["results"]}
    labels = {"acts sdpa", "half sdpa", "half sdpa sbhd", "half dense"}
    assert {name for name in results if "acts" in name or "half" in name} == labels
    for name, dtype, shape in (
        ("acts sdpa", "float32", [1, 4, 4, 3]),
        ("half sdpa", "bfloat16", [1, 6, 4, 3]),
        ("half dense", "bfloat16", [1, 6, 4, 3]),
        ("identity", "bfloat16", [1, 6, 4, 3]),
    ):
        leaf = results[name]["outputs"]["forward"]["leaves"][0]
        assert (leaf["dtype_a"], leaf["shape_a"]) == (dtype, shape)


def test_exact_bits_of_a_file(monkeypatch, tmp_path):
    """The bits for a file of 16-bit arrays and a gradient are those of PyTorch on one device."""
    half = random_inputs(ml_dtypes.bfloat16, ("query", "key", "value", "grad"), tokens=6)
    write(tmp_path / "half.safetensors", half)

    def only_exact(*asked):
        return [check for check in plan(*asked) if check.name == "half exact"]

    monkeypatch.setattr(parity_question, "plan", only_exact)
    file = tmp_path / "results.json"
    result = seqpar("--degree=2", "--input", tmp_path / "half.safetensors", "--json", file)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(file.read_text())["results"]
    given = torch_exact({name: half[name] for name in (*QKV, "grad")}, is_causal=True)
    assert found["sha256"] == digest(given)


def test_the_labels_of_files_with_exact_attention(planned, tmp_path):
    for name in ("acts.npz", "half.safetensors"):
        write(tmp_path / name, random_inputs(np.float32, ("query", "key", "value")))
    inputs = [f"--input={tmp_path / name}" for name in ("acts.npz", "half.safetensors")]
    result = seqpar("--degree=2", *inputs)
    assert result.exit_code == 0, result.output
    others = ("sbhd", "all-gather", "ring")
    labels = ["acts exact", "half exact", *(f"half exact {name}" for name in others)]
    assert [c.name for c in planned[2].checks if c.name.startswith(("acts", "half"))] == labels


def test_as_a_command_with_one_sequence(tmp_path):
    """The command in a separate process; with batch 1 the reported bug does not show."""
    sizes = (*TINY, "--batch=1", "--degree=2", "--kernel=shared")
    arguments = [*sizes, "--json", tmp_path / "results.json"]
    done = subprocess.run(
        [sys.executable, "-m", "jax_seqpar", "parity", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    table = rows(done.stdout)
    assert set(table) == {(name, 2) for name in ROWS["shared"]}
    equal = {"history v1", "history v1 sbhd", "history v2 sbhd", "history v5"}
    for name in HISTORY:
        assert table[name, 2][-1] == ("equal" if name in equal else "caught"), name
    equal_rows = [row for row in table.values() if row[-1] == "equal"]
    assert f"\nEQUAL: {len(equal_rows)} checks" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {r["case"] for r in results if not r["must_differ"]} == set(ROWS["shared"]) - {
        "history v2",
        "history v5 sbhd",
    }


@pytest.fixture
def planned(monkeypatch):
    """Planned runs of the command by degree, in place of the runs."""
    runs = {}

    def run_parity(checks, degree, **options):
        runs[degree] = SimpleNamespace(checks=checks, **options)
        return []

    monkeypatch.setattr(parity_command, "run_parity", run_parity)
    return runs


THREE_DTYPES = "(?=.*float32, bfloat16, float16)"
REFUSALS = {
    "heads": (
        ("--degree=17", "--tokens=34"),
        r"query heads N = 16 are fewer than the 17 ranks.*\(2, 34, 16, 20\)",
    ),
    "KV heads and kernels that round sums": (
        ("--degree=3", "--tokens=6", "--kernel=shared"),
        r"kernels that round sums, .* N = 16 and KV heads K = 1 .* the 3 ranks.*\(2, 6, 16, 20\)",
    ),
    "tokens": (
        (*TINY, "--degree=2", "--tokens=5"),
        r"query tokens T = 5 is not divisible by the 2 devices .* pads to 6",
    ),
    "KV heads and query heads": (
        ("--heads=8", "--kv-heads=3"),
        "query heads N = 8 must be a multiple of the KV heads K = 3",
    ),
    "KV heads and devices": (
        ("--heads=12", "--kv-heads=3", "--degree=4"),
        "KV heads K = 3 are fewer than the 4 ranks and do not divide their number",
    ),
    "one degree of two": (
        (*TINY, "--degree=2", "--degree=8", "--tokens=8"),
        "query heads N = 4 are fewer than the 8 ranks",
    ),
    "dtype not of the kernels": (("--dtype=float64",), f"(?s)(?=.*float64){THREE_DTYPES}"),
    "dtype of integers": (("--dtype=int8",), "int8"),
    "unknown dtype": (("--dtype=float99",), f"(?s)(?=.*float99){THREE_DTYPES}"),
    "a seed below 0": (("--seed=-1",), "'--seed': .*-1 is not in the range|greater than or equal"),
    "no time": (
        (*TINY, "--timeout=0"),
        r"--timeout must be a positive number of seconds, got 0\.0",
    ),
    "time that is none": ((*TINY, "--timeout=nan"), "--timeout must be a positive number"),
    "no devices": (("--degree=0",), "'--degree': Input should be greater than or equal to 1"),
    "no option": (("--head_dim=2",), "No such option"),
    "no kernel": (("--kernel=flash",), "--kernel.*'flash' .*'exact', 'shared', 'plain'"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_sizes_that_do_not_fit(planned, case):
    arguments, message = case
    assert_refused(seqpar(*arguments), message)
    assert not planned


def assert_refused(result, message):
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output


QKV = ("query", "key", "value")
SINGLE = random_inputs(np.float32, (*QKV, "grad"))


def claiming(shape, *, unpacked=None):
    """An .npz of three arrays of this shape, by their headers, with 64 bytes each.

    Args:
      unpacked: size of each array with its header that the directory of the archive states.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in QKV:
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(64))
            archive.getinfo(f"{name}.npy").file_size = unpacked or 192
    return file.getvalue()


def test_a_damaged_header_of_an_npz_is_named(tmp_path):
    """A flipped bit in a header, which moves the data or changes a size, is an error."""
    path = tmp_path / "a.npz"
    write(path, SINGLE)
    good = path.read_bytes()
    begin = good.index(b"\x93NUMPY")
    size = good.index(b"(1, 4", begin) - begin + 1
    for place, bit in ((8, 4), (8, 6), (size, 0), (size + 3, 0)):
        bad = bytearray(good)
        bad[begin + place] ^= 1 << bit
        path.write_bytes(bad)
        result = seqpar("--input", path, "--degree=2")
        assert result.exit_code == 2, (place, bit)
        assert "is not what its name says" in " ".join(result.output.split())


# The file, what is in it, and the error.
MISFITS = {
    "no key": ("a.npz", {n: SINGLE[n] for n in ("query", "value")}, r"a\.npz has no 'key'; it has"),
    "grad of another shape": (
        "a.safetensors",
        {**SINGLE, "grad": SINGLE["grad"][:, :2].copy()},
        r"grad has shape \(1, 2, 4, 3\), expected the query's \(1, 4, 4, 3\)",
    ),
    "grad of another dtype": (
        "a.npz",
        {**SINGLE, "grad": SINGLE["grad"].astype(np.float64)},
        "grad .*float64.*float32",
    ),
    "no batch": (
        "a.npz",
        {name: x[0] for name, x in SINGLE.items()},
        r"query must have 4 axes .*\(4, 4, 3\).* query\[None\]",
    ),
    "two dtypes": (
        "a.npz",
        {**SINGLE, "key": SINGLE["key"].astype(np.float16)},
        "must have one dtype, got float32, float16 and float32",
    ),
    "float8": (
        "a.safetensors",
        {name: x.astype(ml_dtypes.float8_e4m3fn) for name, x in SINGLE.items()},
        "float8_e4m3fn",
    ),
    "wrong suffix": ("a.npy", b"", r"a\.npy must end in \.npz or \.safetensors"),
    "missing .npz": ("a.npz", None, r"No such file.*a\.npz"),
    "missing .safetensors": ("a.safetensors", None, r"No such file.*a\.safetensors"),
    "empty .npz": ("a.npz", b"", r"a\.npz"),
    "cut .npz": ("a.npz", b"PK\x03\x04 and no more", r"a\.npz"),
    "another .npz": ("a.npz", "npy", r"a\.npz"),
    "an .npz that claims a lot": (
        "a.npz",
        claiming((1 << 20, 1 << 20, 4, 4)),
        r"query claims shape .* 70,368,744,177,664 bytes, where the file holds 192 at the most",
    ),
    "an .npz whose directory claims a lot, too": (
        "a.npz",
        claiming((1 << 20, 1 << 20, 4, 4), unpacked=1 << 47),
        r"query claims shape .* 70,368,744,177,664 bytes, where the file holds 192 at the most",
    ),
    "cut .safetensors": ("a.safetensors", b"and no more than this", r"a\.safetensors"),
}


MISFITS |= {
    "an unknown name": (
        "a.npz",
        {**SINGLE, "sink": np.zeros(4, np.float32)},
        r"a\.npz has 'sink', of which .* It takes query, key, .* sinks, .* Leave out or rename",
    ),
    "an unknown name in the other format": (
        "a.safetensors",
        {**SINGLE, "context": SINGLE["query"]},
        r"a\.safetensors has 'context', of which",
    ),
    "sinks of another number": (
        "a.npz",
        {**SINGLE, "sinks": np.zeros(2, np.float32)},
        r"a: sinks must be floating of shape \(N,\) = \(4,\)",
    ),
    "wide sinks": (
        "a.npz",
        {**SINGLE, "sinks": np.zeros(4)},
        r"sinks must be float32, .* got float64. Write sinks\.astype\(np\.float32\)",
    ),
    "wide segments": (
        "a.npz",
        {**SINGLE, "segment_ids": np.full((1, 4), 2**31)},
        r"segment_ids has numbers from 2147483648 .*return_inverse=True",
    ),
    "segments of the queries alone": (
        "a.npz",
        {**SINGLE, "query_segment_ids": np.zeros((1, 4), np.int32)},
        "a.npz has no 'segment_ids'",
    ),
    "a mask of numbers": (
        "a.npz",
        {**SINGLE, "mask": np.zeros((1, 1, 4, 4), np.float32)},
        r"a: mask must be boolean, got dtype float32; write mask == 0 if 0 attends",
    ),
    "float64": (
        "a.npz",
        {name: x.astype(np.float64) for name, x in SINGLE.items()},
        r"got float64\. Write x\.astype\(np\.float32\)",
    ),
    "integers": (
        "a.npz",
        {name: x.astype(np.int32) for name, x in SINGLE.items()},
        r"query must have a floating dtype, got int32. Write query\.astype",
    ),
    "bytes of another machine": (
        "a.npz",
        {**SINGLE, "query": SINGLE["query"].astype(">f4")},
        r"query has dtype >f4, .*newbyteorder",
    ),
    "Python objects": (
        "a.npz",
        {**SINGLE, "query": SINGLE["query"].astype(object)},
        r"a\.npz is not what its name says: Object arrays",
    ),
    "no sequence": (
        "a.npz",
        {name: x[:0] for name, x in SINGLE.items()},
        r"nothing to compare: query \(0, 4, 4, 3\).* Write at least one sequence",
    ),
    "values of another width": (
        "a.npz",
        {**SINGLE, "value": SINGLE["value"][..., :2]},
        r"key and value must have one shape .*\(1, 4, 2, 2\)\. Pad",
    ),
    "a folder": ("a.npz", "folder", r"a\.npz is a folder. Write --input once for each"),
}


@pytest.mark.parametrize("case", MISFITS.values(), ids=MISFITS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_files_that_do_not_fit(planned, case, tmp_path):
    name, content, message = case
    path = tmp_path / name
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, SINGLE["query"])
    elif content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content)
    assert_refused(seqpar("--degree=2", "--input", path), message)
    assert not planned


@pytest.mark.parametrize("error", (MemoryError, RecursionError))
def test_a_file_that_needs_too_much_memory(planned, error, tmp_path, monkeypatch):
    def read(*_):
        raise error("too much")

    monkeypatch.setattr(inputs, "npz_array", read)
    write(tmp_path / "a.npz", SINGLE)
    assert_refused(
        seqpar("--degree=2", "--input", tmp_path / "a.npz"), rf"a\.npz needs .*{error.__name__}"
    )


def test_arrays_that_nobody_asked_for_are_not_read(tmp_path):
    write(tmp_path / "a.npz", SINGLE)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("other.npy", b"no array")
    with pytest.raises(ValueError, match=r"a\.npz has 'other', of which"):
        inputs.load_inputs(tmp_path / "a.npz")


def test_help_lists_every_option():
    result = seqpar("--help")
    assert result.exit_code == 0
    listed = set(re.findall(r"--[a-z][a-z-]*", result.output))
    assert listed == {
        *("--degree", "--batch", "--tokens", "--heads", "--kv-heads", "--head-dim", "--dtype"),
        *("--causal", "--no-causal", "--seed", "--input", "--json", "--save-failing"),
        *("--kernel", "--timeout", "--help", "--report", "--training", "--decode"),
        *("--window", "--scale", "--soft-cap", "--query-offset"),
    }
    assert "Exit status: 0" in result.output
    commands = CliRunner().invoke(cli.app, ["--help"]).output
    assert "parity" in commands
    assert "certify" in commands
    assert "doctor" in commands


@pytest.mark.parametrize("kernel", ROWS)
def test_every_option_arrives(planned, kernel):
    result = seqpar(
        f"--kernel={kernel}", "--no-causal", "--dtype=float16", "--seed=5", "--timeout=7"
    )
    assert result.exit_code == 0
    assert list(planned) == [1, 2, 4, 8]
    last = {"exact": "generated plain", "shared": "grouped dense", "plain": "grouped plain"}[kernel]
    grouped = {"exact": "grouped exact", "shared": "grouped sdpa", "plain": "grouped plain"}[kernel]
    for degree, run in planned.items():
        names = [x for x in run.checks if x.name != "grouped exact hybrid"]
        known = [n for n in ROWS[kernel] if degree >= FROM_DEGREE.get(n, 1)]
        assert [check.name for check in names] == known
        assert {check.degree for check in run.checks} == {degree}
        assert (run.timeout, run.save_failing) == (7.0, None)
        by_name = {check.name: check for check in run.checks}
        assert not by_name[grouped.replace("grouped", "multi-head")].spec.mask.is_causal
        assert not by_name[last].spec.mask.is_causal
        if kernel != "plain":
            # Without the mask a wrong version may be right by chance.
            assert by_name["history v1"].spec.mask.is_causal
        query = by_name[grouped].inputs["query"]
        expected = np.random.default_rng(5).standard_normal((2, 48, 16, 20)).astype(np.float16)
        assert np.array_equal(query, expected)


def test_where_to_save_arrives(planned, tmp_path):
    seqpar(*TINY, "--degree=2", "--save-failing", tmp_path)
    assert planned[2].save_failing == tmp_path
    assert planned[2].timeout == 300.0


def test_no_file_is_left_out(planned, tmp_path):
    """Two files of one name, from two folders, have a check each, of another name."""
    paths = [tmp_path / folder / "acts.npz" for folder in ("layer0", "layer1")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        write(path, random_inputs(np.float32, QKV, seed=seed))
    result = seqpar("--degree=2", *(f"--input={path}" for path in paths))
    assert result.exit_code == 0, result.output
    attention = [c for c in planned[2].checks if c.name.endswith(" exact")]
    assert len(attention) == 2
    assert attention[0].name != attention[1].name


def row(name, **fields):
    reports = {output: BitsReport(()) for output in OUTPUTS}
    return parity.Result(name, SHAPE, 2, reports, **fields)


def test_the_table_shows_everything_at_any_length_of_a_name():
    """A file's name may be long, or hold what rich would take for a style."""
    names = ["[red]acts[/red] sdpa", "activations-of-layer-17-after-the-first-epoch-" * 2 + " sdpa"]
    console = Console(width=80, record=True)
    console.print(parity_table([row(name, expected="scrambled") for name in names], 80))
    text = console.export_text()
    assert "[red]acts[/red]" in text
    header = text.splitlines()[1].split()
    assert header == ["case", "shape", "degree", "forward", "dq", "dk", "dv", "verdict"]
    assert re.findall(r" 0 +0 +0 +0 +(.*)", text) == ["NOT CAUGHT"] * 2


def test_the_table_has_hashes_only_where_a_row_has_one():
    rows_without, rows_with = (
        [row("grouped sdpa")],
        [row("identity"), row("a exact", sha256="c" * 64)],
    )
    for shown, count in ((rows_without, 0), (rows_with, 1)):
        console = Console(width=100, record=True)
        console.print(parity_table(shown))
        text = console.export_text()
        assert text.count("SHA-256") == count
        assert text.count("c" * 8) == count
        assert "c" * 9 not in text


def test_a_failing_check_is_named_as_it_is(monkeypatch):
    failing = row("[red]acts[/red] sdpa", expected="scrambled")
    monkeypatch.setattr(parity_command, "run_parity", lambda *_, **__: [failing])
    result = seqpar(*TINY, "--degree=2")
    assert result.exit_code == 1
    assert "[red]acts[/red] sdpa, degree 2: NOT CAUGHT" in result.output


def test_what_a_kernel_makes_nothing_of_is_refused(planned, tmp_path):
    path = tmp_path / "a.npz"
    key = SINGLE["key"].copy()
    key[0, 1, 1, 2] = np.nan
    write(path, {**SINGLE, "key": key})
    for kernel in ("shared", "plain"):
        refused = seqpar("--degree=2", "--input", path, f"--kernel={kernel}")
        assert_refused(refused, "a: NaN or infinities.* Write --kernel exact")
    result = seqpar("--degree=2", "--input", path)
    assert "a: key with NaN or infinities." in result.output
    assert_refused(seqpar("--degree=2", "--input", path, "--input", path), "one file twice")


def test_how_a_file_is_read_is_said_first(planned, tmp_path):
    """A file laid out `[B, N, S, H]` has as many heads as it should have tokens."""
    path = tmp_path / "acts.npz"
    arrays = random_inputs(np.float32, (*QKV, "grad"), tokens=6)
    beside = {"sinks": np.zeros(4, np.float32), "segment_ids": np.zeros((1, 6), np.int64)}
    write(path, arrays | beside)
    first, *more = seqpar("--degree=2", "--input", path, "--window", 3, 0).output.splitlines()
    assert first == (
        "acts: batch 1, 6 tokens, 4 query and 2 KV heads of dimension 3, float32, causal, "
        "local window size (3, 0), segment_ids [1, 6], sinks [4]."
    )
    assert "no gradient of sinks is computed or compared" in more[0]
    assert not any("WARNING" in line for line in more)

    swapped = {name: np.repeat(x, 2, axis=0).swapaxes(1, 2) for name, x in arrays.items()}
    swapped |= {name: swapped["query"] for name in QKV}
    write(path, swapped)
    first, warning, *_ = seqpar("--degree=2", "--input", path).output.splitlines()
    assert first.startswith("acts: batch 2, 4 tokens, 6 heads of dimension 3")
    assert warning.startswith("WARNING: acts has more heads than tokens.")
    assert warning.endswith("Of arrays [B, N, S, H] write x.swapaxes(1, 2).")

    # One side alone is enough.
    for few in (("query", "grad"), ("key", "value")):
        mixed = arrays | {name: arrays[name][:, :1] for name in few}
        write(path, mixed)
        _, warning, *_ = seqpar("--degree=1", "--input", path).output.splitlines()
        assert warning.startswith("WARNING: acts has more heads than tokens.")


def packed_inputs(heads=4, kv_heads=2):
    """Inputs with every array that a file may hold, as far as gradients allow them together."""
    rng = np.random.default_rng(5)
    arrays = random_inputs(np.float32, (*QKV, "grad"), heads, 16, kv_heads=kv_heads)
    tokens = np.arange(16)[None]
    beside = {
        "bias": rng.standard_normal((1, heads, 16, 16)).astype(np.float32),
        "mask": rng.random((1, heads, 16, 16)) < 0.8,
        "query_seq_lengths": np.array([11]),
        "key_value_seq_lengths": np.array([10]),
        "segment_ids": (tokens > 8).astype(np.int64),
        "query_segment_ids": (tokens > 9).astype(np.int64),
        "positions": tokens,
        "query_positions": tokens + tokens // 4,
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.1, 0.2, 0.3], np.float32)[:heads],
        "sinks": np.array([0.5, -1.0, 2.0, 0.0, 1.0, -0.5], np.float32)[:heads],
    }
    assert set(beside) == set(OPTIONAL)
    return arrays, beside


OPTIONS = {
    "local_window_size": ((4, 1), ("--window", 4, 1)),
    "scale": (0.7, ("--scale", 0.7)),
    "logits_soft_cap": (1.5, ("--soft-cap", 1.5)),
}


@pytest.mark.parametrize("kernel", ("exact", "shared", "plain"))
def test_the_attention_that_a_file_describes(kernel, monkeypatch, tmp_path):
    """Every array and option reaches both frameworks: outputs are those of float64 attention, which
    each of them changes. Of exact sums two ranks have the bits of JAX with three KV heads, too."""
    arrays, beside = packed_inputs(*((6, 3) if kernel == "exact" else (4, 2)))
    path, found = tmp_path / "acts.npz", []
    write(path, arrays | beside)
    compare = parity._compare

    def keep(check, degree, parts, jax_side):
        result, torch_side = compare(check, degree, parts, jax_side)
        found.append((result, jax_side, torch_side))
        return result, torch_side

    monkeypatch.setattr(parity, "_compare", keep)
    own = {"exact": "acts exact", "shared": "acts dense", "plain": "acts plain"}[kernel]

    def only_own(*asked):
        return [check for check in plan(*asked) if check.name == own]

    monkeypatch.setattr(parity_question, "plan", only_own)
    file = tmp_path / "results.json"
    options = [word for _, words in OPTIONS.values() for word in words] + ["--seed=5"]
    result = seqpar("--degree=2", f"--kernel={kernel}", "--input", path, "--json", file, *options)
    assert result.exit_code == 0, result.output
    ((_, jax_side, torch_side),) = found

    given = {name: x for name, (x, _) in OPTIONS.items()} | keywords(
        {name: x.astype(np.int32) if x.dtype.kind == "i" else x for name, x in beside.items()}
    )
    truth = float64(arrays, given)
    for name, expected in truth.items():
        for side in (jax_side, torch_side):
            assert np.allclose(side[name], expected, rtol=0, atol=1e-5), name
    for name in given:
        without = float64(arrays, {n: x for n, x in given.items() if n != name})
        changed = max(np.abs(without[n] - x).max() for n, x in truth.items())
        assert changed > 1e-3, f"{name} changes nothing"

    lines = result.output.splitlines()
    asked = any("scaled_dot_product_attention is not asked about" in line for line in lines)
    assert asked == (kernel != "exact")
    payload = json.loads(file.read_text())
    assert payload["versions"]["jax"] == jax.__version__
    assert set(payload["versions"]) >= {"python", "jax-seqpar", "jaxlib", "numpy", "torch"}
    assert payload["platform"] == platform.platform()
    assert (payload["seed"], payload["options"]["window"]) == (5, [4, 1])
    assert payload["options"]["input"] == [str(path)]


def float64(arrays, given):
    *leaves, grad = (numpy_to_torch(arrays[name]).double() for name in (*QKV, "grad"))
    leaves = [x.requires_grad_() for x in leaves]
    out = torch_dense_attention(*leaves, is_causal=True, **jax.tree.map(as_tensor, given))
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(OUTPUTS, (x.detach().numpy() for x in (out, *gradients)), strict=True))


def as_tensor(x):
    return numpy_to_torch(x) if isinstance(x, np.ndarray) else x


def test_a_name_of_its_own_for_every_file_that_is_saved(tmp_path):
    names = ["a b", "a-b", "a.b", "A b", "a  b", "a_b", "\u00e9", "x" * 300, "y" + "x" * 299]
    for name in names:
        parity._save(tmp_path, row(name), {}, {}, {})
    saved = list(tmp_path.glob("*.json"))
    assert {json.loads(path.read_text())["case"] for path in saved} == set(names)
    assert len({path.name.lower() for path in saved}) == len(names)
    assert "a-b-degree-2.json" in {path.name for path in saved}


def test_narrow_tables_leave_out_columns_and_break_no_word():
    full = ["case", "shape", "degree", *OUTPUTS, "verdict", "SHA-256"]
    names = [name for name in ROWS["exact"] if "v1" not in name]
    results = [row(name, sha256="c" * 64) for name in names]
    for width, dropped in ((None, 0), (80, 0), (60, 1), (52, 2), (30, 6)):
        table = parity_table(results, width)
        console = Console(width=width or 200, record=True)
        console.print(table)
        text = console.export_text()
        shown = [column.header for column in table.columns]
        left = [c for c in full if c not in shown]
        assert len(left) == dropped, (width, left)
        assert ("Left out" in text) == bool(left)
        assert all(len(line) <= (width or 200) for line in text.splitlines())
        words = {word for line in text.splitlines() for word in line.split()}
        assert {word for name in names for word in name.split()} <= words


def test_piped_into_a_file_nothing_is_cut(monkeypatch, tmp_path):
    """Output without a terminal and COLUMNS has whole lines, progress on the other stream."""
    long = "activations-of-layer-17-after-the-first-epoch-" * 3 + "x sdpa"
    failing = replace(row(long, expected="scrambled"), error=None)
    monkeypatch.setattr(parity_command, "run_parity", lambda *_, **__: [failing])
    environment = {"COLUMNS": None, "TERMINAL_WIDTH": None}
    folder = tmp_path / ("f" * 100)
    arguments = ["parity", *TINY, "--degree=2", "--degree=1", "--save-failing", str(folder)]
    result = CliRunner().invoke(cli.app, arguments, env=environment)
    assert result.exit_code == 1
    line, _ = (line for line in result.stdout.splitlines() if SHAPE in line and "axes" not in line)
    assert line.startswith(long)
    assert line.split()[-2:] == ["NOT", "CAUGHT"]
    assert str(folder) in result.stdout
    assert result.stderr.splitlines() == ["degree 1: 16 checks", "degree 2: 18 checks"]


def test_places_that_cannot_be_written_are_refused_at_once(planned, tmp_path):
    file = tmp_path / "there"
    file.write_text("")
    assert_refused(seqpar(*TINY, "--save-failing", file / "x"), "there is a file, not a folder")
    assert_refused(seqpar(*TINY, "--json", tmp_path), "is a folder. Write the name of a file")
    assert_refused(
        seqpar(*TINY, "--degree=2", "--json", "/proc/results.json"), "/proc/results.json"
    )
    assert not planned


def test_the_version():
    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"jax-seqpar {version('jax-seqpar')}\n")


def test_without_pytorch_jax_alone_is_certified(monkeypatch):
    monkeypatch.setattr(torch_self_test, "find_spec", lambda name: None)
    monkeypatch.setattr(certify_command, "find_spec", lambda name: None)
    trusted = certificate.Certificate("JAX", ())
    monkeypatch.setattr(torch_self_test, "certify", lambda backend: trusted)
    result = seqpar_certify()
    assert result.exit_code == 0, result.output
    assert "PyTorch is not installed, so it was not asked" in result.output


def test_without_its_packages_the_command_names_its_extra():
    code = "import sys; sys.modules['typer'] = None; import jax_seqpar.cli"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.strip() == 'The seqpar command needs: pip install "jax-seqpar[cli]"'
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert {"packaging", "rich", "typer"} == {re.split("[><=]", need)[0] for need in extras["cli"]}
    assert "jax-seqpar[cli]" in extras["parity"]


def test_what_a_file_decides_is_not_asked(planned, tmp_path):
    path = tmp_path / "a.npz"
    write(path, SINGLE)
    result = seqpar("--degree=2", "--input", path, "--heads=8", "--kv-heads=2")
    assert_refused(result, r"Leave out --heads, --kv-heads")
    assert not planned


def test_a_folder_that_is_not_there_is_said_at_once(planned, tmp_path):
    result = seqpar(*TINY, "--degree=2", "--json", tmp_path / "none" / "a.json")
    assert_refused(result, "there is no folder")
    assert not planned


def test_ranks_that_fail_are_not_a_difference(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RankError("rank 1 of 2 failed")

    monkeypatch.setattr(parity_command, "run_parity", fail)
    file = tmp_path / "results.json"
    file.write_text('{"passed": true}')
    result = seqpar(*TINY, "--degree=2", "--json", file)
    assert result.exit_code == 3
    found = json.loads(file.read_text())
    assert (found["passed"], found["error"]) == (False, "the run did not end"), "not that before"
    assert "The PyTorch ranks failed: rank 1 of 2 failed" in result.output


def seqpar_certify(*arguments):
    environment = {"COLUMNS": "500", "TERMINAL_WIDTH": "500"}
    return CliRunner().invoke(cli.app, ["certify", *arguments], env=environment)


def answers(output):
    """Numbers of wrong answers and of all answers by JAX and by PyTorch, by question."""
    cells = r" +([\d,]+) of ([\d,]+)"
    found = re.findall(rf"^ *(\S.*?){cells}{cells} *$", output, re.MULTILINE)
    return {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in found}


@pytest.mark.usefixtures("optimised")
def test_this_machine_is_certified(monkeypatch):
    found = []

    def certificates(backend):
        found.extend(torch_self_test.certificates(backend))
        return found

    monkeypatch.setattr(certify_command, "certificates", certificates)
    result = seqpar_certify()
    assert result.exit_code == 0, result.output
    expected = [(check.name, check.total) for check in found[0].checks]
    assert len(expected) == len(questions._QUESTIONS)
    assert all(total > 0 for _, total in expected)
    assert answers(result.output) == {name: [0, total] * 2 for name, total in expected}
    jax_line, torch_line = result.output.splitlines()[-2:]
    assert re.fullmatch(r"JAX \S+ on cpu \(cpu\): trusted, .*", jax_line)
    assert re.fullmatch(r"PyTorch \S+ on cpu: trusted, .*", torch_line)


@pytest.mark.parametrize("framework", ("JAX", "PyTorch"))
def test_one_wrong_answer_is_not_trusted(monkeypatch, framework):
    module, name = {
        "JAX": (certificate, "jax_operations"),
        "PyTorch": (torch_self_test, "_operations"),
    }[framework]
    operations = getattr(module, name)()

    def last_bit(x):
        y = operations.reciprocal(x).copy()
        y.view(np.uint64)[7] ^= np.uint64(1)
        return y

    monkeypatch.setattr(module, name, lambda: replace(operations, reciprocal=last_bit))
    few = (questions._reciprocals, questions._roundings)
    monkeypatch.setattr(questions, "_QUESTIONS", few)
    result = seqpar_certify()
    assert result.exit_code == 1
    table = answers(result.output)
    wrong = table["division: float64"]
    assert wrong[::2] == ([1, 0] if framework == "JAX" else [0, 1])
    del table["division: float64"]
    assert table
    assert all(numbers[::2] == [0, 0] for numbers in table.values())
    lines = result.output.splitlines()[-2:]
    said = f": NOT TRUSTED, its bits may differ: division: float64 (1 of {wrong[1]} wrong)."
    for line in lines:
        assert line.endswith(said) == line.startswith(f"{framework} ")
        assert ("NOT TRUSTED" in line) == line.startswith(f"{framework} ")


def test_certify_says_which_backend_there_is_none_of():
    try:
        jax.devices("gpu")
    except RuntimeError:
        assert_refused(
            seqpar_certify("--backend=gpu"), "gpu.*no platforms that are instances of gpu"
        )
    else:
        pytest.skip("there is a GPU")


def test_certify_lists_its_options():
    result = seqpar_certify("--help")
    assert result.exit_code == 0
    assert set(re.findall(r"--[a-z][a-z-]*", result.output)) == {"--backend", "--help"}
    assert "Exit status: 0" in result.output
