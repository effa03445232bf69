"""Programs for TPUs and GPUs, compiled without one.

`compiled` loads the compilers in a process of its own, by running this file with their environment.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_seqpar import Ulysses, blockwise_attention, compiler_options, dot_product_attention
from jax_seqpar.kernels import cudnn, fused_attention

HEAD_DIM = 128
DEVICES = {"v5e:2x4": 8, "v5p:2x2x1": 4, "h100:8": 8}
# What a compiled program has for each call of the fused kernel.
KERNELS = {
    "tpu": 'custom_call_target="tpu_custom_call"',
    "gpu": 'custom_call_target="__cudnn$fmha',
}
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


@dataclass(frozen=True)
class Program:
    """Causal attention of one sequence in bfloat16, its tokens over all devices."""

    topology: str
    tokens: int
    heads: int = 16
    kv_heads: int = 8
    gradients: bool = False
    fused: bool = True
    head_chunks: int = 1
    hides_transfers: bool = False
    # "sinks" and "segment_ids" stand for arrays.
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def platform(self) -> str:
        return "gpu" if self.topology == "h100:8" else "tpu"

    def compiled(self) -> Any:
        mesh = Mesh(np.array(self._devices()), ("seq",))
        splash = self.fused and self.platform == "tpu"
        fused = partial(fused_attention, platform=self.platform)
        attend = partial(
            dot_product_attention,
            attention=fused if self.fused else blockwise_attention,
            is_causal=True,
            mesh=mesh,
            strategy=Ulysses(self.head_chunks),
            check_vma=not splash,
            **{name: x for name, x in self.options.items() if x != "array"},
        )

        def array(*shape: int, dtype: Any = jnp.bfloat16, axes: tuple[Any, ...] = ()) -> Any:
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def per_token(heads: int) -> Any:
            return array(1, self.tokens, heads, HEAD_DIM, axes=(None, "seq"))

        arrays = {
            "sinks": array(self.heads, dtype=jnp.float32),
            "segment_ids": array(1, self.tokens, dtype=jnp.int32),
            "key_value_seq_lengths": array(1, dtype=jnp.int32),
        }
        given = {name: arrays[name] for name, x in self.options.items() if x == "array"}

        def run(query: Any, key: Any, value: Any, grad: Any, given: Any) -> Any:
            function = partial(attend, **given)
            if not self.gradients:
                return function(query, key, value)
            out, pull = jax.vjp(function, query, key, value)
            return out, *pull(grad)

        query, key = per_token(self.heads), per_token(self.kv_heads)
        options: Any = compiler_options(self.platform) if self.hides_transfers else {}
        if self.platform == "gpu":
            # Which of several kernels is fastest, a GPU would have to try.
            options = {**options, "xla_gpu_autotune_level": 0}
        return jax.jit(run).lower(query, key, key, query, given).compile(compiler_options=options)

    def _devices(self) -> Any:
        if self.platform == "tpu":
            return topologies.get_topology_desc(self.topology, "tpu").devices
        # As if JAX saw one of those that are compiled for.
        cudnn.compute_capability = lambda: (9, 0)
        return gpus()

    @property
    def most_bytes(self) -> int:
        """Of temporaries on a device: everything gathered once.

        Query, key, value and output, with their gradients if there are any, have all the tokens and
        a device's part of the heads. The kernels leave the log of the sum of exp of each head and
        read positions, in float32; a TPU's over the 128 lanes of a register. Blockwise attention
        has besides, of one head, transposes of eight arrays and three blocks of logits.
        """
        devices = DEVICES[self.topology]
        heads, kv_heads = self.heads // devices, self.kv_heads // devices
        gathered = 2 * (heads + kv_heads) * HEAD_DIM * 2
        row = 4 * (128 if self.platform == "tpu" else 1) * (heads + 1)
        passes = 2 if self.gradients else 1
        most = self.tokens * (passes * gathered + row)
        return most if self.fused else most + self.tokens * 8 * HEAD_DIM * 4 + 3 * 4 * 1024**2


def gpus() -> Any:
    """Eight H100 to compile for."""
    how: Any = {"platform": "cuda", "topology": "1x1x8", "target_config": H100}
    return topologies.get_topology_desc(**how).devices


def libtpu() -> str | None:
    """The path of libtpu, as the environment or the package of that name says."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    if path is None:
        spec = importlib.util.find_spec("libtpu")
        path = None if spec is None else str(Path(spec.origin or "").parent / "libtpu.so")
    return path if path is not None and Path(path).exists() else None


def has_cuda() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))


def compiled(*programs: Program) -> list[dict[str, Any]]:
    """For each: "text", the optimised program, and "temporaries", bytes on a device."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if (path := libtpu()) is not None:
        environment |= {
            "TPU_LIBRARY_PATH": path,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests may run side by side; no chip is touched
            # No question to a metadata server about the machine.
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
    asked = json.dumps([asdict(program) for program in programs])
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def under_transfers(text: str, kernel: str) -> list[str]:
    """The attention kernels that the schedule puts between the start and the end of an all-to-all.

    A kernel is counted once, whatever number of transfers is under way.
    """
    assert "is_scheduled=true" in text
    entry = text[text.index("\nENTRY") :]
    under_way, found = set(), []
    for line in entry.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\((%[\w.-]+)?", line)
        if instruction is None:
            continue
        name, operation, operand = instruction.groups()
        if operation == "all-to-all-start":
            under_way.add(f"%{name}")
        elif operation == "all-to-all-done":
            under_way.remove(operand)
        elif kernel in line and under_way:
            found.append(name)
    return found


def main() -> None:
    results = []
    for asked in json.load(sys.stdin):
        asked["options"] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in asked["options"].items()
        }
        program = Program(**asked).compiled()
        temporaries = program.memory_analysis().temp_size_in_bytes
        results.append({"text": program.as_text(), "temporaries": temporaries})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
