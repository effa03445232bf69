"""Findings about installed packages: versions within the declared bounds, and imports."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from .finding import Finding, State, in_one_line


@dataclass(frozen=True)
class Package:
    """A package that attention, or a part of the library, needs.

    Attributes:
      name: as it is installed.
      asked_by: the package that declares the bounds of its version, and the extra in which it does.
      extra: of jax-seqpar, which installs it; "" for what the library cannot do without.
      purpose: what it is needed for, if not for everything.
      module: to import; "" for a library that JAX loads itself, when it looks for devices.
    """

    name: str
    asked_by: tuple[str, str] = ("jax-seqpar", "")
    extra: str = ""
    purpose: str = ""
    module: str = ""


PACKAGES = (
    Package("jax", module="jax"),
    Package("jaxlib", ("jax", ""), module="jaxlib"),
    Package("numpy", module="numpy"),
    Package("jaxtyping", module="jaxtyping"),
    Package("flax", ("jax-seqpar", "flax"), "flax", "the layers for Flax", "flax"),
    Package("torch", ("jax-seqpar", "parity"), "parity", "seqpar parity and the bridge", "torch"),
    Package("einops", ("jax-seqpar", "parity"), "parity", "the PyTorch reference", "einops"),
    Package("safetensors", ("jax-seqpar", "parity"), "parity", "files of tensors", "safetensors"),
    Package("optax", ("jax-seqpar", "parity"), "parity", "seqpar parity --training", "optax"),
    Package("libtpu", ("jax", "tpu"), "tpu", "TPUs"),
    Package("jax-cuda12-plugin", ("jax", "cuda12"), "cuda", "NVIDIA GPUs"),
    Package("jax-cuda13-plugin", ("jax", "cuda13"), "cuda", "NVIDIA GPUs"),
)
# One of them is enough, and the extra `cuda` installs the first.
CUDA = ("jax-cuda12-plugin", "jax-cuda13-plugin")


def packages() -> Iterator[Package]:
    """The packages to look at: of JAX's plugins for CUDA the installed ones, or the first."""
    found = [name for name in CUDA if installed_version(name) is not None] or [CUDA[0]]
    return (package for package in PACKAGES if package.name not in CUDA or package.name in found)


def installed_version(name: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def bounds(package: Package) -> SpecifierSet | None:
    """The versions that the package's dependent declares; None if that is not installed."""
    dependent, extra = package.asked_by
    try:
        declared = [Requirement(line) for line in requires(dependent) or ()]
    except PackageNotFoundError:
        return None
    specifiers = SpecifierSet()
    for need in declared:
        applies = need.marker is None or need.marker.evaluate({"extra": extra})
        if applies and canonicalize_name(need.name) == canonicalize_name(package.name):
            specifiers &= need.specifier
    return specifiers


def examine(package: Package) -> Finding:
    """Finding about a package: whether it is installed, its version fits, and it imports."""
    found = installed_version(package.name)
    if found is None:
        return _missing(package)
    wanted, install = bounds(package), _install(package)
    dependent, extra = package.asked_by
    asks = f"{dependent}[{extra}]" if extra else dependent
    if wanted is not None and not wanted.contains(found, prereleases=True):
        says = f"{found} does not fit: {asks} asks for {wanted}. Write {install}."
        return Finding(package.name, State.FAILS, says)
    if error := _import_error(package):
        says = f"{found} cannot be imported ({error}). Write {install} --force-reinstall."
        return Finding(package.name, State.FAILS, says)
    if wanted is None:
        says = f"{found}. Which versions fit is unknown, as {dependent} is not installed."
        return Finding(package.name, State.NOTE, says)
    return Finding(package.name, State.OK, f"{found} fits: {asks} asks for {wanted or 'any'}.")


def _install(package: Package) -> str:
    """The command that installs a version that fits."""
    return f'pip install "{package.name}{bounds(package) or ""}"'


def _missing(package: Package) -> Finding:
    if not package.extra:
        says = f"It is not installed, and nothing runs without it. Write {_install(package)}."
        return Finding(package.name, State.FAILS, says)
    path = os.environ.get("TPU_LIBRARY_PATH") if package.name == "libtpu" else None
    if path is not None and os.path.exists(path):
        says = f"TPU_LIBRARY_PATH names {path}, whose version is not known."
        return Finding(package.name, State.NOTE, says)
    says = f"It is not installed, and is needed for {package.purpose}. Write pip install"
    return Finding(package.name, State.NOTE, f'{says} "jax-seqpar[{package.extra}]".')


def _import_error(package: Package) -> str | None:
    """Error of an import, of any class: a broken library may raise OSError, for example."""
    try:
        if package.module:
            import_module(package.module)
    except Exception as error:
        return in_one_line(error)
    return None
