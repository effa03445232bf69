"""`seqpar doctor`: what it finds on a machine where something is missing, too old or broken."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as real_version
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from jax_seqpar import Logits, choose_kernel, cli
from jax_seqpar.cli import devices, installed, kernels_by_feature
from jax_seqpar.cli.finding import State
from jax_seqpar.exact.self_test import certificate
from jax_seqpar.exact.self_test.check import Check

pytestmark = pytest.mark.usefixtures("less_optimised")


def doctor(*arguments):
    environment = {"COLUMNS": "500", "TERMINAL_WIDTH": "500"}
    return CliRunner().invoke(cli.app, ["doctor", *arguments], env=environment)


def rows(output):
    """State and sentence of each finding, by its subject."""
    pattern = r"^ +(\S[\w -]*?) {2,}(ok|note|FAILS) +(\S.*?) *$"
    return {name: (state, says) for name, state, says in re.findall(pattern, output, re.MULTILINE)}


@pytest.fixture(autouse=True)
def certified(monkeypatch):
    """Certificate in place of the self-test, which is tested elsewhere and takes seconds."""
    trusted = certificate.Certificate("JAX", ())
    monkeypatch.setattr(devices, "certify", lambda: trusted)


@pytest.fixture
def versions(monkeypatch):
    """Versions by package that stand in place of the installed ones; None is not installed."""
    faked = {}

    def version(name):
        found = faked[name] if name in faked else real_version(name)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(installed, "version", version)
    return faked


@pytest.fixture
def imports(monkeypatch):
    """Errors by module, which its import raises."""
    errors = {}

    def import_module(name):
        if name in errors:
            raise errors[name]

    monkeypatch.setattr(installed, "import_module", import_module)
    return errors


def test_this_machine(imports):
    result = doctor()
    assert result.exit_code == 0, result.output
    found = rows(result.output)
    for name in ("jax", "jaxlib", "numpy", "jaxtyping", "flax", "torch"):
        state, says = found[name]
        assert (state, says.split()[0]) == ("ok", real_version(name))
    assert found["jax"][1].endswith("fits: jax-seqpar asks for >=0.10.")
    assert found["devices"] == ("ok", "8 of platform cpu (cpu).")
    degrees = "One axis has up to 8 devices; degrees 1, 2, 4, 8 use all."
    assert found["meshes"] == ("ok", f"{degrees} Two axes have 2 x 4, 4 x 2.")
    assert found["attention"][0] == "ok"
    assert found["attention"][1].startswith("It runs on 8 devices, within ")
    assert found["exact attention"][0] == "ok"
    assert "One reason holds for all: cpu: cpu has no fused kernel." in result.output
    assert result.output.splitlines()[-1] == "Attention can run here."


def test_without_pytorch_and_flax_attention_runs(versions, imports):
    versions |= {"torch": None, "flax": None}
    result = doctor()
    assert result.exit_code == 0, result.output
    found = rows(result.output)
    assert found["flax"] == (
        "note",
        "It is not installed, and is needed for the layers for Flax. "
        'Write pip install "jax-seqpar[flax]".',
    )
    assert found["torch"][0] == "note"
    assert found["torch"][1].endswith('Write pip install "jax-seqpar[parity]".')


@pytest.mark.parametrize(
    ("name", "version", "says"),
    (
        (
            "flax",
            "0.8.1",
            '0.8.1 does not fit: jax-seqpar[flax] asks for >=0.12. Write pip install "flax>=0.12".',
        ),
        ("torch", "2.5.1", "2.5.1 does not fit: jax-seqpar[parity] asks for >=2.6."),
        ("jaxlib", "0.4.1", "0.4.1 does not fit: jax asks for "),
        ("jaxlib", "99.0", "99.0 does not fit: jax asks for "),
        ("numpy", "1.26.4", "1.26.4 does not fit: jax-seqpar asks for >=2.0."),
        ("libtpu", "0.0.1", "0.0.1 does not fit: jax[tpu] asks for "),
        ("jax-cuda12-plugin", "0.4.1", "0.4.1 does not fit: jax[cuda12] asks for "),
        ("jax-cuda13-plugin", "0.4.1", "0.4.1 does not fit: jax[cuda13] asks for "),
        ("jaxtyping", None, "It is not installed, and nothing runs without it."),
    ),
)
def test_one_version_that_does_not_fit(versions, imports, name, version, says):
    versions[name] = version
    result = doctor()
    assert result.exit_code == 1, result.output
    found = rows(result.output)
    assert found[name][0] == "FAILS"
    assert found[name][1].startswith(says)
    assert f'Write pip install "{name}' in found[name][1]
    assert [x for x, (state, _) in found.items() if state == "FAILS"] == [name]
    assert result.output.splitlines()[-1] == f"Something does not fit: {name}."
    assert "jax-cuda12-plugin" in found or name == "jax-cuda13-plugin"


@pytest.mark.parametrize(
    ("name", "version"), (("torch", "2.7.0+cu126"), ("jax", "0.11.0.dev20260101"))
)
def test_versions_of_other_builds_fit(versions, imports, name, version):
    versions[name] = version
    found = {x.subject: x for x in map(installed.examine, installed.packages())}
    assert found[name].state is State.OK


def test_an_import_that_fails_is_a_row(imports):
    imports["torch"] = OSError("libcudart.so.12: cannot open shared object file\nmore lines")
    imports["flax"] = ImportError("cannot import name 'x' from 'jax'")
    imports["einops"] = RuntimeError("")
    result = doctor()
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    found = rows(result.output)
    assert "cannot be imported (OSError: libcudart.so.12: cannot open shared" in found["torch"][1]
    assert found["torch"][1].endswith('Write pip install "torch>=2.6" --force-reinstall.')
    assert "(ImportError: cannot import name 'x' from 'jax')" in found["flax"][1]
    assert "(RuntimeError)" in found["einops"][1]
    assert "Something does not fit: flax, torch, einops." in result.output


def test_a_checkout_that_is_not_installed_knows_no_bounds(monkeypatch, imports):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installed, "requires", requires)
    result = doctor()
    assert result.exit_code == 0, result.output
    says = "Which versions fit is unknown, as jax-seqpar is not installed."
    assert rows(result.output)["torch"] == ("note", f"{real_version('torch')}. {says}")
    imports["torch"] = ImportError("broken")
    assert rows(doctor().output)["torch"][0] == "FAILS"


def test_a_library_for_tpus_that_is_no_package(monkeypatch, versions, tmp_path):
    versions["libtpu"] = None
    (package,) = (x for x in installed.PACKAGES if x.name == "libtpu")
    file = tmp_path / "libtpu.so"
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(file))
    assert 'pip install "jax-seqpar[tpu]"' in installed.examine(package).says
    file.touch()
    assert installed.examine(package).says.startswith(f"TPU_LIBRARY_PATH names {file}")


def test_without_devices_nothing_runs(monkeypatch, imports):
    def none(*_):
        raise RuntimeError("Unable to initialize backend 'tpu'")

    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, none)
    result = doctor()
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    found = rows(result.output)
    assert found["devices"][0] == found["attention"][0] == "FAILS"
    assert "Unable to initialize backend 'tpu'" in found["devices"][1]
    assert result.output.splitlines()[-1] == "Something does not fit: devices, attention."


def test_an_accelerator_that_jax_does_not_use(monkeypatch, tmp_path):
    gpu = {str(tmp_path): ("gpu", "an NVIDIA GPU", "cuda"), "/none": ("tpu", "a TPU", "tpu")}
    monkeypatch.setattr(devices, "DRIVERS", gpu)
    *_, last = devices.devices()
    assert (last.subject, last.state) == ("gpu", State.NOTE)
    assert 'pip install "jax-seqpar[cuda]"' in last.says


def test_attention_that_is_wrong_is_seen(monkeypatch):
    """Wrong attention is seen: tokens in reverse, and NaN, which no comparison finds too large."""
    real = devices.dot_product_attention

    def reverse(query, key, value, **options):
        return real(query, key, jnp.flip(value, axis=1), **options)

    def nan(*operands, **options):
        return real(*operands, **options) * jnp.float32(jnp.nan)

    for wrong in (reverse, nan):
        monkeypatch.setattr(devices, "dot_product_attention", wrong)
        found = devices.attention()
        assert found.state is State.FAILS
        assert "It is wrong on 8 devices" in found.says


def test_arithmetic_that_is_not_exact_keeps_no_one_from_attention(monkeypatch, imports):
    wrong = certificate.Certificate("JAX", (Check("exp", 3, 10),))
    monkeypatch.setattr(devices, "certify", lambda: wrong)
    result = doctor()
    assert result.exit_code == 0
    state, says = rows(result.output)["exact attention"]
    assert state == "note"
    assert "NOT TRUSTED" in says

    def fails():
        raise RuntimeError("float64 is not supported")

    monkeypatch.setattr(devices, "certify", fails)
    assert "float64 is not supported" in devices.exact_arithmetic().says


@pytest.mark.parametrize("platform", ("cpu", "gpu", "tpu"))
def test_kernels_are_those_that_are_chosen(platform):
    """Kernels of the table are those that `choose_kernel` takes for arrays."""
    rows = {row.feature: row for row in kernels_by_feature.choices(platform)}
    wanted = {"causal", "window", "documents", "ALiBi", "sinks", "dropout", "dense mask"}
    assert wanted | {"no mask", "grouped queries"} == set(rows)
    slopes = Logits(alibi_slopes=jnp.ones(8))
    for i, dtype in enumerate(("bfloat16", "float32")):
        x = jnp.ones((1, 128, 8, 64), dtype)
        choice = choose_kernel(x, x, x, platform=platform, is_causal=True, logits=slopes)
        assert rows["ALiBi"].kernels[i] == choice.name
    assert not any("none" in row.kernels for row in rows.values())
    if platform == "tpu":
        assert rows["causal"].kernels == ("splash", "splash")
        assert "alibi_slopes is not supported by splash" in rows["ALiBi"].reason
        assert rows["ALiBi"].kernels == ("blockwise", "blockwise")
    if platform == "gpu":
        assert "mask is not supported by cuDNN" in rows["dense mask"].reason
        assert "of 32 bits: dtype float32 is not supported by cuDNN" in rows["causal"].reason


def test_the_table_of_another_platform(imports):
    result = doctor("--platform=tpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ +causal +splash +splash +splash supports all", result.output, re.MULTILINE)
    assert doctor("--platform=npu").exit_code == 2


def test_as_a_command_without_any_optional_package():
    """The command runs in a separate process with typer and rich alone, as in the extra `cli`."""
    code = """
import sys
for name in ("torch", "flax", "einops", "safetensors", "matplotlib", "optax"):
    sys.modules[name] = None
from jax_seqpar.cli import app, devices
from jax_seqpar.exact.self_test.certificate import Certificate
devices.certify = lambda: Certificate("JAX", ())
app(["doctor"], prog_name="seqpar")
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"COLUMNS": "500"},
    )
    assert run.returncode == 1, run.stderr
    found = rows(run.stdout)
    # Installed here, and not to be imported.
    assert "cannot be imported (ModuleNotFoundError" in found["torch"][1]
    assert found["attention"][0] == "ok"
    assert "Traceback" not in run.stderr
