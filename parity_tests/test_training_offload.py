"""Layer inputs that wait for their gradients in the memory of the host: the same bits, in pieces.

Compiled for TPUs in `test_plan_machines.py`, in a decoder in `test_examples_decoder.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KINDS
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from jax_seqpar import MeshLayout
from jax_seqpar.compare import compare_bits
from jax_seqpar.plan.count import Counts, count
from jax_seqpar.training import offload_policy, offloaded

LAYOUT = MeshLayout(batch="data")
GiB = 1 << 30
rng = np.random.default_rng(3)


def loss(weights: Any, x: Any, offload: bool) -> Any:
    """Loss of three layers in a scan, each computed again for its gradient."""

    def layer(x: Any, weight: Any) -> Any:
        x = offloaded(x, layout=LAYOUT) if offload else x
        return jnp.tanh(jnp.einsum("BSD,DE->BSE", x, weight)), None

    layer = jax.checkpoint(layer, policy=offload_policy if offload else None)
    return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jit", (True, False), ids=("jit", "eager"))
def test_no_bit_depends_on_it(kind, jit):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types=(kind,) * 2)
    weights = jnp.asarray(rng.standard_normal((3, 8, 8)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((4, 16, 8)), jnp.float32)
    x = jax.device_put(x, NamedSharding(mesh, LAYOUT.token_spec))
    results = []
    with jax.set_mesh(mesh):
        for offload in (False, True):
            function = jax.value_and_grad(partial(loss, offload=offload), argnums=(0, 1))
            if offload:
                with pytest.warns(UserWarning, match=r"on CPUs .*nothing moves"):
                    results.append((jax.jit(function) if jit else function)(weights, x))
            else:
                results.append((jax.jit(function) if jit else function)(weights, x))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert compare_bits(np.asarray(a), np.asarray(b)).equal


def counted(tokens: int, features: int, offload: bool = True) -> tuple[Counts, int]:
    """Counts of a step on a mesh of unknown platform, and the number of pieces of an input."""
    mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        weights = jax.ShapeDtypeStruct((3, features, features), jnp.bfloat16)
        x = jax.ShapeDtypeStruct((2, tokens, features), jnp.bfloat16)
        traced = jax.jit(jax.grad(partial(loss, offload=offload))).trace(weights, x)
    forward = next(x for x in traced.jaxpr.jaxpr.eqns if x.primitive.name == "scan")
    names = [x for x in forward.params["jaxpr"].jaxpr.eqns if x.primitive.name == "name"]
    return count(traced.jaxpr, mesh.shape), len(names)


@pytest.mark.parametrize(
    ("tokens", "features", "pieces"),
    ((4096, 256, 1), (GiB // 64, 256, 1), (GiB // 64 + 4, 256, 2), (GiB // 32, 384, 3)),
)
def test_copies_that_a_compiler_takes(tokens, features, pieces):
    """Each of 2 GiB on a device at most; all together each layer's input, once."""
    counts, found = counted(tokens, features)
    assert (counts.to_host, found) == (3 * 2 * tokens * features * 2 // 8, pieces)
    assert counted(tokens, features, offload=False)[0].to_host == 0


@pytest.mark.parametrize("features", (8, 128))
def test_a_copy_at_which_a_compiler_aborts(features):
    """Of 2^24 tokens on a device of a TPU; fewer than 128 features are padded to as many."""
    device = AbstractDevice("TPU v5", 1, "tpu")
    names, types = ("data", "seq"), (AxisType.Auto,) * 2
    mesh = AbstractMesh((2, 4), names, axis_types=types, abstract_device=device)

    def trace(tokens: int) -> Any:
        return jax.eval_shape(
            partial(offloaded, layout=LAYOUT),
            jax.ShapeDtypeStruct((2, tokens, features), jnp.bfloat16),
        )

    with jax.sharding.use_abstract_mesh(mesh):
        assert trace((1 << 26) - 4).shape == (2, (1 << 26) - 4, features)
        with pytest.raises(ValueError, match=r"copy 4.0 GiB .* with 2 times the devices along 's"):
            trace(1 << 26)


def test_a_layout_that_the_mesh_does_not_have():
    x = jnp.ones((2, 8, 4))
    mesh, message = jax.make_mesh((8,), ("seq",)), r"names axis 'data', which the mesh does not"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        offloaded(x, layout=LAYOUT)
