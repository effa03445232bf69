"""Slices of the heads: the same bits, more and smaller all-to-alls, less memory."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from cases import ONE_AXIS, slow
from flat_names import keywords_of
from jax.sharding import AxisType
from questions import attend, bytes_by_formula, compiled, output_and_gradients, sharded_inputs

from jax_seqpar import (
    Logits,
    MeshLayout,
    Ulysses,
    compiler_options,
    dot_product_attention,
    exact_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.parity.inputs import Case
from jax_seqpar.plan import all_to_all_bytes, collectives, temporaries

CASES = {
    "multi-head": Case(batch=2, tokens=16, heads=16, kv_heads=16, head_dim=5),
    # 8 query heads and 2 KV heads on each of 4 devices: 4 slices are two for each KV head.
    "grouped": Case(batch=2, tokens=16, heads=32, kv_heads=8, head_dim=5),
    "fewer KV heads than devices": Case(batch=2, tokens=16, heads=16, kv_heads=2, head_dim=5),
}
WHERE = ONE_AXIS[4]


@cache
def whole_of(case, kind):
    return output_and_gradients(attend(case, WHERE, kind))(**case.inputs())


@pytest.mark.parametrize(("chunks", "overlap"), ((2, True), slow(4, True), (4, False)))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_bit_depends_on_them(case, chunks, overlap):
    """Bits do not depend on head chunks, but dk and dv where a chunk splits a KV head's queries."""
    kind = (AxisType.Auto, AxisType.Explicit)[overlap]
    whole = whole_of(case, kind)
    sliced = attend(case, WHERE, kind, strategy=Ulysses(chunks, overlap))
    got = output_and_gradients(sliced)(**case.inputs())
    splits = max(case.kv_heads // 4, 1) % chunks != 0
    for a, b in list(zip(got, whole, strict=True))[: 2 if splits else 4]:
        assert compare_bits(a, b).equal
    if splits:
        for a, b in zip(got[2:], whole[2:], strict=True):
            unit = jnp.finfo(jnp.float32).eps * jnp.max(jnp.abs(b))
            assert jnp.max(jnp.abs(a - b)) <= chunks * unit, "one addition for each slice"


def test_exact_attention_in_slices():
    case = CASES["grouped"]
    exact = partial(attend, case, WHERE, kernel=exact_attention)
    whole = output_and_gradients(exact())(**case.inputs())
    got = output_and_gradients(exact(strategy=Ulysses(2)))(**case.inputs())
    assert compare_bits(got, whole).equal


@pytest.mark.parametrize("chunks", (1, 2, 4))
def test_as_many_bytes_in_more_all_to_alls(chunks):
    case = Case(batch=2, tokens=16, heads=32, kv_heads=16, head_dim=5)
    *inputs, grad = sharded_inputs(case, WHERE)
    sliced = attend(case, WHERE, strategy=Ulysses(chunks))
    forward = compiled(sliced, *inputs)
    both = compiled(output_and_gradients(sliced), *inputs, grad)
    assert collectives(forward) == {"all-to-all": 4 * chunks}
    assert collectives(both) == {"all-to-all": 8 * chunks}
    moved = bytes_by_formula(case, WHERE, 1)
    assert all_to_all_bytes(forward) == moved
    assert all_to_all_bytes(both) == 2 * moved


def test_keys_travel_once_for_all_the_slices_that_read_them():
    case = CASES["fewer KV heads than devices"]
    *inputs, _ = sharded_inputs(case, WHERE)
    program = compiled(attend(case, WHERE, strategy=Ulysses(4)), *inputs)
    assert collectives(program) == {"all-to-all": 2 + 2 * 4}
    assert all_to_all_bytes(program) == bytes_by_formula(case, WHERE, 1)


def test_one_after_another_they_divide_the_memory():
    """Head chunks divide the memory of gathered query, key and value, and of the residuals."""
    case = Case(batch=1, tokens=2048, heads=16, kv_heads=16, head_dim=16)
    *inputs, grad = sharded_inputs(case, WHERE)

    def bytes_held(strategy):
        run = output_and_gradients(attend(case, WHERE, strategy=strategy))
        return temporaries(jax.jit(run).lower(*inputs, grad).compile())

    whole, half, quarter = (bytes_held(Ulysses(c, False)) for c in (1, 2, 4))
    gathered = 2048 * 4 * 16 * 4  # bytes of one of query, key, value of a device's heads
    assert whole > half > quarter
    assert whole - quarter >= 3 * gathered, "at least query, key and value of three slices in four"


def test_a_mask_of_each_head_is_sliced():
    case = CASES["grouped"]
    mask = jax.random.bernoulli(jax.random.key(0), 0.7, (2, 32, 16, 16))
    sinks = jnp.linspace(-1, 1, 32)
    q, k, v, _ = map(jnp.asarray, case.inputs().values())
    options = {"mask": mask, "logits": Logits(sinks=sinks), "layout": WHERE.on()}
    whole = jax.jit(partial(dot_product_attention, **keywords_of(**options)))(q, k, v)
    for chunks in (2, 4):
        got = jax.jit(
            partial(dot_product_attention, strategy=Ulysses(chunks), **keywords_of(**options))
        )(q, k, v)
        assert compare_bits(got, whole).equal


REFUSED = {
    "that do not divide": ({"head_chunks": 3}, r"head_chunks must divide the 4 query heads"),
    "of nothing": (
        {"head_chunks": 0},
        r"head_chunks must divide the 4 query heads of a device",
    ),
    "that are a float": ({"head_chunks": 2.0}, r"head_chunks must divide the 4 query heads"),
    "of exact attention": (
        {"head_chunks": 4, "kernel": exact_attention},
        r"head_chunks = 4 would split the 2 KV heads of a device.*Use one of \[1, 2\]",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked_shapes")
def test_slices(options, message):
    q, k, v, _ = map(jnp.asarray, Case(2, 16, 16, 8, 5).inputs().values())
    strategy, kernel = Ulysses(options["head_chunks"]), options.get("kernel")
    attend = partial(dot_product_attention, layout=WHERE.on(), kernel=kernel)
    with pytest.raises(ValueError, match=message):
        attend(q, k, v, strategy=strategy)


@pytest.mark.usefixtures("unchecked_shapes")
def test_slices_that_cut_groups_unevenly():
    q, k, v, _ = map(jnp.asarray, Case(2, 16, 24, 8, 5).inputs().values())
    with pytest.raises(ValueError, match=r"neither divides nor is divisible by the 4 KV heads"):
        dot_product_attention(q, k, v, layout=ONE_AXIS[2].on(), strategy=Ulysses(3))


@pytest.mark.usefixtures("unchecked_shapes")
def test_slices_without_a_reshard():
    q, k, v, _ = map(jnp.asarray, Case(2, 16, 8, 8, 5).inputs().values())
    with pytest.raises(ValueError, match=r"Ulysses.head_chunks=2.* has no reshard to work on"):
        dot_product_attention(
            q, k, v, layout=MeshLayout(tokens=None).on(WHERE.mesh()), strategy=Ulysses(2)
        )


def test_the_options_of_gpus_are_options():
    """XLA reads them on a CPU, too; those of TPUs are tried in `test_tpu_aot`."""
    added = jax.jit(lambda x: x + 1, compiler_options=compiler_options("gpu"))
    assert added(1) == 2
