"""GPUs that programs are compiled for: the attributes that the compiler would ask of them.

Of others than an H100 it is read from a JSON file, whose `target_config` is the text of XLA's
`GpuTargetConfigProto`, as XLA's own repository has it for A100 and others in `gpu_target_config`:

    {"name": "A100", "compute_capability": [8, 0], "target_config": "gpu_device_info {...}"}
"""

import json
from dataclasses import dataclass
from pathlib import Path

H100_CONFIG = """
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


@dataclass(frozen=True)
class GpuTarget:
    """A kind of GPU.

    Attributes:
      name: as in the table of chips.
      compute_capability: what cuDNN's limits depend on.
      config: the text of XLA's GpuTargetConfigProto.
    """

    name: str
    compute_capability: tuple[int, int]
    config: str


H100 = GpuTarget("H100", (9, 0), H100_CONFIG)


def gpu_target(topology: str) -> GpuTarget:
    """The GPU of a topology, as "h100:8" or "a100.json:8".

    Raises:
      ValueError: for a file that is missing, or lacks a field.
    """
    name, _, _ = topology.rpartition(":")
    if name == "h100":
        return H100
    try:
        found = json.loads(Path(name).read_text())
        major, minor = (int(n) for n in found["compute_capability"])
        texts = {key: found[key] for key in ("name", "target_config")}
    except FileNotFoundError:
        raise _undescribed(topology, f"there is no file {name!r}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{name} does not describe a GPU ({type(error).__name__}: {error})"
        raise _undescribed(topology, reason) from None
    for key, value in texts.items():
        if not isinstance(value, str):
            raise _undescribed(topology, f"{key} is {value!r} in {name}, not a string")
    return GpuTarget(texts["name"], (major, minor), texts["target_config"])


def _undescribed(topology: str, reason: str) -> ValueError:
    return ValueError(
        f"topology {topology!r}: {reason}. Write a JSON object with the keys name, "
        f"compute_capability and target_config to that file."
    )
