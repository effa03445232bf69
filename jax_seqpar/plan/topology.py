"""Topologies: devices that programs are compiled for, by name, whether they are there or not."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from .._checks import check_count
from .gpu_targets import gpu_target

_FORMS = {
    "cpu": r"cpu:[1-9]\d*",
    "gpu": r"(h100|.+\.json):[1-8]",
    "tpu": r"(?!cpu|h100)\w+:[1-9]\d*(x[1-9]\d*)+",
}


def platform_of(topology: str) -> str:
    """The platform of a topology: "tpu", "gpu" or "cpu".

    Raises:
      ValueError: for a name of another form.
    """
    for platform, form in _FORMS.items():
        if isinstance(topology, str) and re.fullmatch(form, topology):
            return platform
    raise _unknown(topology, "is unknown")


def missing_compiler(topology: str) -> str | None:
    """Message that the compiler for a topology is missing; None if it is installed.

    Raises:
      ValueError: for an unknown topology.
    """
    platform = platform_of(topology)
    if platform == "tpu" and _libtpu() is None:
        return "the compiler for TPUs is missing: pip install libtpu, or set TPU_LIBRARY_PATH"
    if platform == "gpu" and not _has_cuda():
        return "the compiler for GPUs is missing: pip install jax-seqpar[cuda]"
    return None


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a topology: to compile for, not to run on, but for those of "cpu:<n>".

    `jax.make_mesh(shape, names, devices=devices(topology))` is their mesh, and a
    `jax.ShapeDtypeStruct` with a `NamedSharding` on it an argument of a program.

    Args:
      topology: "v4", "v5e", "v5p", "v6e" or "tpu7x" with the chips along each axis, as "v5e:2x4"
        (tpu7x has two devices on a chip); "h100:<n>", GPUs of one host, or
        "FILE.json:<n>" for other GPUs, as `gpu_targets.py` describes; or "cpu:<n>", the first of
        the simulated devices.
      slices: of a TPU, or hosts of GPUs, each of that topology, joined by the slower network.

    Raises:
      ImportError: if the compiler is missing.
      ValueError: for an unknown topology, and for more CPU devices than there are.
    """
    if missing := missing_compiler(topology):
        raise ImportError(
            f'topology {topology!r}: {missing}. Write "cpu:8" for simulated devices, which need '
            f"no other compiler."
        )
    platform, (_, _, size) = platform_of(topology), topology.partition(":")
    check_count("slices", slices)
    if platform == "cpu":
        return _simulated(topology, int(size) * slices)
    if platform == "gpu":
        # Slices, hosts of each, GPUs of each.
        how: Any = {"platform": "cuda", "topology": f"{slices}x1x{size}"}
        how["target_config"] = gpu_target(topology).config
        return list(topologies.get_topology_desc(**how).devices)
    options: Any = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        # One device a chip, as on a v4 itself; libtpu 0.0.42.1 gives two without, of which
        # `jax.make_mesh` makes no mesh.
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(topology, f"is unknown to libtpu: {error}") from None


def _unknown(topology: str, problem: str) -> ValueError:
    return ValueError(
        f'topology {topology!r} {problem}. Write the chips of a TPU by axis, as "v5e:2x4"; '
        f'"h100:8" for up to 8 GPUs of one host, with slices for more hosts; "a100.json:8" for '
        f'other GPUs, which a file describes; or "cpu:8" for simulated devices.'
    )


def compiler_environment() -> dict[str, str]:
    """Environment variables of a process that compiles for TPUs and touches none.

    Without them libtpu looks for chips and for a metadata server of the machine, writes an error
    about the host's name, and lets one process of a machine use it at a time.

    Example:
      subprocess.run([sys.executable, "plan.py"], env=os.environ | compiler_environment())
    """
    environment = {"JAX_PLATFORMS": "cpu"}
    if (path := _libtpu()) is not None:
        environment |= {
            "TPU_LIBRARY_PATH": path,
            # Several processes may compile side by side; no chip is touched.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            # No question to a metadata server about the machine.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    return environment


def _simulated(topology: str, count: int) -> list[Any]:
    found = jax.devices("cpu")
    if len(found) < count:
        raise ValueError(
            f"topology {topology!r} has more devices than JAX, which has {len(found)} of the CPU. "
            f'Write jax.config.update("jax_num_cpu_devices", {count}) before the first array.'
        )
    return found[:count]


def _libtpu() -> str | None:
    """The path of libtpu, as the environment or the package of that name says."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    if path is None:
        spec = importlib.util.find_spec("libtpu")
        path = None if spec is None else str(Path(spec.origin or "").parent / "libtpu.so")
    return path if path is not None and Path(path).exists() else None


def _has_cuda() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
