"""Importing the library does nothing, and needs neither PyTorch nor Flax."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import jax_seqpar

ROOT = Path(__file__).parent.parent
NO_PARITY_EXTRA = """
import sys
for name in ("torch", "flax", "rich", "typer", "safetensors", "einops"):
    sys.modules[name] = None
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_import_needs_only_jax():
    code = """
import sys, jax
before = dict(jax.config.values)
import jax_seqpar
assert not {"torch", "flax", "torch_ref", "rich", "typer"} & set(sys.modules)
assert not [name for name in sys.modules if "pallas" in name], "for TPUs only"
assert dict(jax.config.values) == before
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_the_bridge_names_the_extra_it_needs():
    code = (
        NO_PARITY_EXTRA
        + """
import jax.numpy as jnp
from jax_seqpar.bridge import to_torch
from jax_seqpar.compare import compare_bits
assert compare_bits(jnp.ones(3), jnp.ones(3)).equal
to_torch(jnp.ones(3))
"""
    )
    result = python(code)
    assert 'pip install "jax-seqpar[parity]"' in result.stderr.splitlines()[-1]


def test_flax_layers_name_the_extra_they_need():
    """An import of the layers without Flax, by `find_spec`, names the extra."""
    result = python("""
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "flax" else found(name, *rest)
import jax_seqpar.flax
""")
    assert result.stderr.splitlines()[-1].endswith("Write pip install 'jax-seqpar[flax]'.")


def test_the_command_names_the_extra_it_needs():
    result = python(NO_PARITY_EXTRA + "import jax_seqpar.cli")
    assert result.returncode == 1
    assert result.stderr.strip() == 'The seqpar command needs: pip install "jax-seqpar[cli]"'


def test_package_metadata_and_command_have_one_version():
    assert jax_seqpar.__version__ == version("jax-seqpar")
    result = python("from jax_seqpar.cli import app; app(['--version'])")
    assert result.stdout == f"jax-seqpar {jax_seqpar.__version__}\n", result.stderr


def imports(path):
    """The packages that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    (
        ("torch_ref", {"jax", "jax_seqpar", "flax"}),
        ("jax_seqpar", {"torch", "torch_ref", "flax", "einops", "rich", "typer", "safetensors"}),
    ),
)
def test_neither_package_imports_the_other(package, forbidden):
    """Packages do not import each other, but for the folders that compare them and Flax layers."""
    exempt = {"bridge", "parity", "cli"}
    if package == "jax_seqpar":
        layers = sorted((ROOT / package / "flax").glob("*.py"))
        assert not any({"torch", "torch_ref"} & set(imports(path)) for path in layers)
        exempt = exempt | {"flax"}
    modules = [
        path
        for path in sorted((ROOT / package).rglob("*.py"))
        if not exempt & set(path.relative_to(ROOT / package).parts)
    ]
    assert len(modules) >= 5
    assert {str(path): found for path in modules if (found := forbidden & set(imports(path)))} == {}


def test_what_dir_shows_is_public():
    """Names that a user writes, and none of the modules that they come from."""
    names = dir(jax_seqpar)
    assert {"dot_product_attention", "Mask", "Ulysses", "Blockwise", "__version__"} <= {*names}
    assert not {"attention", "mask", "kernels", "types", "compiled"} & {*names}
    assert all(hasattr(jax_seqpar, name) for name in names)


# Each folder, and each module beside them, may import those before it.
ORDER = (
    *("_text", "_extras", "_checks", "compiler_options", "varying_axes", "mask", "order"),
    *(
        "mesh_layout",
        "device_order",
        "chips",
        "mesh",
        "kernels",
        "exact",
        "strategies",
        "program_cache",
    ),
    *("attention", "decoding", "training", "flax", "plan", "compare", "bridge", "parity"),
    *("__version__", "cli"),
)


def test_dependencies_point_down():
    seen = set()
    for file in (ROOT / "jax_seqpar").rglob("*.py"):
        path = file.relative_to(ROOT).with_suffix("").parts
        if path[1] in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            package = path[: len(path) - node.level]
            module = (*package, *(node.module or "").split("."))
            names = [module[1]] if module[1:] != ("",) else [alias.name for alias in node.names]
            for name in names:
                seen.add((path[1], name))
                assert ORDER.index(name) <= ORDER.index(path[1]), f"{file} imports {name}"
    assert ("attention", "strategies") in seen
    folders = {"mask", "kernels", "strategies", "plan", "bridge", "parity"}
    assert {room for room, _ in seen} >= folders


# Flax decides what it calls an attention function with.
FLAX_CONTRACT = "SequenceParallel.__call__"
# What was found: read by a user, and made by the library alone.
FINDINGS = {"Divergence", "LeafReport", "Plan"}


def signatures(package: Any) -> Iterator[tuple[str, list[str]]]:
    """The parameters of each public function, class and method of a package, but `self`."""
    for name, x in vars(package).items():
        if name.startswith("_") or not callable(x) or not x.__module__.startswith("jax_seqpar"):
            continue
        if isinstance(x, type) and issubclass(x, Exception):
            continue
        methods = vars(x).items() if isinstance(x, type) else ()
        own = {n: f for n, f in methods if inspect.isfunction(f) and n != "__init__"}
        made = x.__init__ if isinstance(x, type) else x  # the class of an nnx.Module hides it
        for label, function in ((name, made), *((f"{name}.{n}", f) for n, f in own.items())):
            yield label, [n for n in inspect.signature(function).parameters if n != "self"]


def test_no_public_signature_is_longer_than_a_reader_can_hold():
    packages = ("", "mask", "kernels", "strategies", "exact", "flax", "training", "plan", "compare")
    found = {}
    for package in (*packages, "bridge", "parity"):
        module = importlib.import_module(f"jax_seqpar.{package}".rstrip("."))
        found |= dict(signatures(module))
    assert len(found["dot_product_attention"]) == len(found["Attention"]) == 16
    assert {n for n, names in found.items() if len(names) > 16} == {FLAX_CONTRACT, *FINDINGS}
