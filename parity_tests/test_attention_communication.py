"""Right communication: right numbers can hide wrong collectives, so they are counted."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, FEWER_ON_MESHES, MESHES, ONE_AXIS, slow
from questions import attend, bytes_by_formula, compiled, right_communication, sharded_inputs

from jax_seqpar import MeshLayout, dot_product_attention
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import all_to_all_bytes, collectives

# XLA:CPU widens 16-bit cotangents; forward their bytes are counted below.
FLOAT32 = {name: case for name, case in CASES.items() if case.dtype == "float32"}


# On two devices the two ways for KV heads to lie: their own, and shared.
BY_DEGREE = (
    *((name, 4) for name in FLOAT32 if name != "not causal"),
    *((name, 8) for name in ("fewer KV heads than devices", "multi-query")),
    *(slow(name, 2) for name in ("grouped", "multi-query")),
    ("not causal", 2),
)


@pytest.mark.parametrize(("name", "degree"), BY_DEGREE)
def test_four_and_eight_all_to_alls_by_degree(name, degree):
    right_communication(FLOAT32[name], ONE_AXIS[degree])


@pytest.mark.parametrize(("case", "where", "kind"), FEWER_ON_MESHES, ids=str)
def test_four_and_eight_all_to_alls_by_mesh(case, where, kind):
    right_communication(case, where, kind)


@pytest.mark.parametrize("name", ("bfloat16", "float16"))
def test_16_bit_inputs_move_16_bits(name):
    case, where = CASES[name], ONE_AXIS[4]
    *inputs, _ = sharded_inputs(case, where)
    program = compiled(attend(case, where), *inputs)
    assert collectives(program) == {"all-to-all": 4}
    assert all_to_all_bytes(program) == bytes_by_formula(case, where, 1)


def test_vmap_adds_none():
    """`jax.vmap` adds no collectives, over an axis that `spmd_axis_name` shards or over another."""
    case, where = CASES["grouped"], MESHES[2]
    mesh, layout = where.mesh(), MeshLayout()
    stacked = []
    for x in list(case.inputs().values())[:3]:
        spec = jax.sharding.PartitionSpec("data", *layout.partition_spec)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        stacked.append(jax.device_put(jnp.stack([jnp.asarray(x)] * 2), sharding))
    # JAX does not check loops that a vmap makes vary over one axis more.
    function = partial(dot_product_attention, layout=replace(layout, mesh=mesh, check_vma=False))
    vmapped = jax.vmap(function, spmd_axis_name="data")
    assert collectives(compiled(vmapped, *stacked)) == {"all-to-all": 4}


def test_seven_where_the_output_is_not_used():
    """Gradients without the output take seven all-to-alls: the output's reshard is dropped."""
    case, where = CASES["grouped"], ONE_AXIS[4]
    *inputs, grad = sharded_inputs(case, where)

    def gradients(query, key, value, grad):
        return jax.vjp(attend(case, where), query, key, value)[1](grad)

    assert collectives(compiled(gradients, *inputs, grad)) == {"all-to-all": 7}


def test_masks_add_no_communication():
    case, where = Case(batch=4, tokens=24, heads=16, kv_heads=8, head_dim=6), MESHES[4]
    *inputs, _ = sharded_inputs(case, where)
    masks = {
        "mask": jnp.ones((4, 1, 24, 24), bool),
        "bias": jnp.ones((1, 16, 24, 24)),
        "key_value_seq_lengths": jnp.full(4, 9),
    }
    mesh = where.mesh()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    masks = {name: jax.device_put(x, whole) for name, x in masks.items()}

    def function(query, key, value, masks):
        return attend(case, where, **masks)(query, key, value)

    assert collectives(compiled(function, *inputs, masks)) == {"all-to-all": 4}


def test_segments_travel_as_integers_of_the_tokens():
    """Sharded like the tokens, they are gathered; of the T x S mask nothing is ever made."""
    case, where = Case(batch=4, tokens=24, heads=16, kv_heads=8, head_dim=6), ONE_AXIS[4]
    *inputs, _ = sharded_inputs(case, where)
    sharding = jax.sharding.NamedSharding(where.mesh(), jax.sharding.PartitionSpec(None, "seq"))
    ids = jax.device_put(jnp.zeros((4, 24), jnp.int32), sharding)

    def function(query, key, value, ids):
        return attend(case, where, segment_ids=ids)(query, key, value)

    program = compiled(function, *inputs, ids)
    assert collectives(program) == {"all-to-all": 4, "all-gather": 1}
    assert re.search(r"= s32\[4,24\]\S* all-gather\(", program)
    assert all_to_all_bytes(program) == bytes_by_formula(case, where, 1)


def test_one_device_communicates_nothing():
    case, where = CASES["grouped"], ONE_AXIS[1]
    *inputs, _ = sharded_inputs(case, where)
    assert collectives(compiled(attend(case, where), *inputs)) == {}
