"""Topologies: devices that programs are compiled for, by name, whether they are there or not."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

# What a GPU's compiler asks a GPU for, where there is one.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
H100_COMPUTE_CAPABILITY = (9, 0)

_FORMS = {
    "cpu": r"cpu:[1-9]\d*",
    "gpu": r"h100:[1-8]",
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
    """What has to be installed before anything can be compiled for a topology; None if nothing.

    Raises:
      ValueError: for an unknown topology.
    """
    platform = platform_of(topology)
    if platform == "tpu" and _libtpu() is None:
        return "the compiler for TPUs is missing: pip install libtpu, or set TPU_LIBRARY_PATH"
    if platform == "gpu" and not _has_cuda():
        return "the compiler for GPUs is missing: pip install jax-seqpar[cuda]"
    return None


def devices(topology: str) -> list[Any]:
    """The devices of a topology: to compile for, not to run on, but for those of "cpu:<n>".

    `jax.make_mesh(shape, names, devices=devices(topology))` is their mesh, and a
    `jax.ShapeDtypeStruct` with a `NamedSharding` on it an argument of a program.

    Args:
      topology: "v4", "v5e", "v5p", "v6e" or "tpu7x" with the chips along each axis, as "v5e:2x4"
        (v4 and tpu7x have two devices on a chip); "h100:<n>", GPUs of one host; or "cpu:<n>", the
        first of the simulated devices.

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
    if platform == "cpu":
        return _simulated(topology, int(size))
    if platform == "gpu":
        # Slices, hosts of each, GPUs of each.
        how: Any = {"platform": "cuda", "topology": f"1x1x{size}", "target_config": H100}
        return list(topologies.get_topology_desc(**how).devices)
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(topology, f"is unknown to libtpu: {error}") from None


def _unknown(topology: str, problem: str) -> ValueError:
    return ValueError(
        f'topology {topology!r} {problem}. Write the chips of a TPU by axis, as "v5e:2x4"; '
        f'"h100:8" for up to 8 GPUs of one host; or "cpu:8" for simulated devices.'
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
