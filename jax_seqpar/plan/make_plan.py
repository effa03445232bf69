"""`plan`: costs of a function on a machine that may be absent."""

from collections.abc import Mapping
from typing import Any

from .answer import Request, answer
from .machine import Machine, devices_of_slice
from .report import Plan
from .targets import Given
from .worker import ask


def plan(
    function: Any,
    *shapes: Any,
    topology: str,
    slices: int = 1,
    mesh: Mapping[str, int] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    timeout: int | float | None = 600,
) -> Plan:
    """Costs of a function on a machine: memory, collectives, FLOPs, and seconds at least.

    The function is traced and compiled under `jax.set_mesh` of a mesh of that machine, so that
    kernels are chosen for its platform; nothing runs. Without the compiler of the platform the
    traced program alone is counted, and `notes` says what was not checked.

    Args:
      function: anything that `jax.jit` takes or returns, with its donations.
      shapes: pytrees of `jax.ShapeDtypeStruct`, whose `NamedSharding`s may be on any mesh with
        these axes, such as `jax.sharding.AbstractMesh((16,), ("seq",))`.
      topology: as for `jax_seqpar.plan.devices`.
      slices: of that topology, or hosts of GPUs, over which the first mesh axes go.
      mesh: size of each mesh axis; if None, of the mesh of the shapes, or all devices as "seq".
      compiler_options: of `jax.jit`, such as `jax_seqpar.compiler_options("tpu")`.
      timeout: seconds for a separate process, to which function and shapes are pickled; if None,
        this process compiles, and an abort of the compiler ends it.

    Raises:
      ValueError: for a topology that cannot be, a mesh of another size, and a function that cannot
        be pickled.

    Example:
      mesh = jax.sharding.AbstractMesh((16,), ("seq",))
      x = jax.ShapeDtypeStruct((1, 131072, 32, 128), "bfloat16",
                               sharding=jax.NamedSharding(mesh, MeshLayout().partition_spec))
      print(plan(dot_product_attention, x, x, x, topology="v5e:4x4").memory)
    """
    target = Given(function, shapes)
    sizes = mesh or target.mesh() or {"seq": devices_of_slice(topology) * slices}
    machine = Machine(topology, slices, dict(sizes))
    request = Request(target, machine, dict(compiler_options or {}))
    return answer(request) if timeout is None else ask(request, timeout)
