"""One of several JAX processes: attends, and saves what its devices hold.

`python two_processes.py PROCESS PROCESSES DEVICES ADDRESS FOLDER`. One process with all the devices
does the same work: what both save is to be equal in every bit.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

from jax_seqpar import MeshLayout, dense_attention, dot_product_attention, exact_attention
from jax_seqpar.parity.inputs import Case


def main(process: int, processes: int, devices: int, address: str, folder: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, processes, process)
    assert jax.device_count() == devices
    # Both kinds of axes and both kernels: how they combine is asked in one process.
    for kind, kernel in (
        (AxisType.Auto, dense_attention),
        (AxisType.Explicit, exact_attention),
    ):
        mesh = jax.make_mesh((devices,), ("seq",), axis_types=(kind,))
        sharding = NamedSharding(mesh, MeshLayout().partition_spec)
        inputs = [
            jax.make_array_from_callback(x.shape, sharding, lambda index, x=x: x[index])
            for x in Case(batch=2, tokens=24, heads=16, kv_heads=2, head_dim=5).inputs().values()
        ]

        def run(query, key, value, grad, mesh=mesh, kernel=kernel):
            def attend(*qkv):
                return dot_product_attention(
                    *qkv, is_causal=True, kernel=kernel, layout=MeshLayout(mesh=mesh)
                )

            out, pull = jax.vjp(attend, query, key, value)
            return (out, *pull(grad))

        for name, x in zip(("out", "dq", "dk", "dv"), jax.jit(run)(*inputs), strict=True):
            for shard in x.addressable_shards:
                where = f"{kind.name}-{type(kernel).__name__}-{name}-{shard.index[1].start or 0:03}"
                np.save(f"{folder}/{where}.npy", np.asarray(shard.data))


if __name__ == "__main__":
    process, processes, devices, address, folder = sys.argv[1:]
    main(int(process), int(processes), int(devices), address, folder)
