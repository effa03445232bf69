"""The product of features, kernels and degrees: forward and gradients against float64."""

import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cases import ONE_AXIS, MeshCase
from features import (
    ADDED,
    FACTORS,
    KERNELS,
    ORDERS,
    SIZES,
    STRATEGIES,
    as_torch,
    assert_as_near,
    cases,
    exact_by_torch,
    in_order,
    in_sequence,
    is_possible,
    name_of,
    operands,
    options,
    run_jax,
    run_torch,
    sizes_of,
    with_junk,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from questions import QUICK

from jax_seqpar import (
    Blockwise,
    Hybrid,
    MeshLayout,
    Ring,
    Ulysses,
    blockwise_attention,
    choose_kernel,
    dense_attention,
    dot_product_attention,
    exact_attention,
    fused_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.mask import AttentionFunction
from jax_seqpar.strategies.heads import plan_heads
from torch_ref.masks import attends

pytestmark = pytest.mark.usefixtures("less_optimised")


def right(case):
    """Values, and the bits of one device wherever a whole head is computed by itself.

    The dense kernel has all heads in one product, the path for either mode in one sum.
    """
    with jax.enable_x64(case["dtype"] == "float64"):
        _right(case)


def _right(case):
    kernel, sizes, degree = case["kernel"], sizes_of(case), case["degree"]
    eager, batch = case["eager"], case["batch"]
    some, inputs = options(case), operands(sizes, case["dtype"])
    if case["junk"]:
        inputs = with_junk(inputs, some)
    plan = plan_heads(sizes.N, sizes.K, degree, may_copy=kernel != "exact")
    heads, kv_heads = (n // degree for n in (plan.query_heads, plan.padded_kv_heads * plan.copies))
    chunks = case["at once"]
    if heads % chunks or (kv_heads % chunks and (kernel == "exact" or chunks % kv_heads)):
        chunks = 1
    kind = AxisType.Auto if degree // 2 % 2 == 0 else AxisType.Explicit
    strategy, order = STRATEGIES[case["strategy"]], ORDERS[case["order"]]
    if strategy == Ulysses():
        strategy = Ulysses(chunks)
    elif strategy == Ring():
        strategy = Ring(bidirectional=case["at once"] == 2)
    layout = MeshLayout(order=order, batch="data" if batch is not None and batch > 1 else None)
    shape, axes = (degree,), ("seq",)
    if isinstance(strategy, Hybrid):
        shape, axes = (2, degree // 2), ("outer", "inner")
        layout = replace(layout, tokens=axes)
    if batch is not None:
        shape, axes = (2, *shape), ("data", *axes)
    sharded = partial(
        dot_product_attention,
        kernel=KERNELS[kernel],
        layout=MeshCase(shape, axes, layout).on(kind),
        strategy=strategy,
    )
    # Compiled as for a user where one compiler gives both sides of what is compared in bits.
    compiler_options = None if kernel == "blockwise" else QUICK
    dealt = in_order(order, degree, some, inputs)
    got = run_jax(sharded, dealt[0], kernel, dealt[1], compiler_options, eager=eager)
    got = in_sequence(order, degree, got)
    alone = (
        exact_by_torch(some, inputs)
        if kernel == "exact"
        else run_jax(KERNELS[kernel], some, kernel, inputs, compiler_options)
    )
    # Copies of a KV head on several devices, or in several slices of the heads.
    by_heads = isinstance(strategy, Ulysses)
    copies = plan.copies * plan.first_copies * max(chunks // kv_heads, 1) if by_heads else degree
    shared = {"rows": 1 if by_heads else degree, "parts": "ring" in case["strategy"]}
    assert_as_near(got, alone, run_torch(some, kernel, inputs), copies, **shared)
    bitwise = kernel == "exact" or (kernel == "blockwise" and by_heads and not eager)
    if bitwise:
        # Sums over the sequences of several devices.
        apart = {"bias", *(ADDED if batch == 2 else ())}
        for name in got.keys() - apart:
            if copies == 1 or kernel == "exact" or name not in ("dk", "dv"):
                report = compare_bits(got[name], alone[name])
                assert report.equal, f"{name}: {report}"


def test_every_case_attends_to_something():
    """An output of zeros would be right whatever a feature does."""
    for case in cases():
        sizes, given = sizes_of(case), options(case)
        rules = {n: x for n, x in given.items() if n in inspect.signature(attends).parameters}
        allowed = attends(sizes.T, sizes.S, **as_torch(rules))
        assert allowed is None or allowed.any(), name_of(case)


def _is_slow(case):
    """Whether a case takes half a minute to compile and test_strategies_exact_ring has its like."""
    return case["kernel"] == "exact" and "ring" in case["strategy"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name_of(case), marks=[pytest.mark.slow] * _is_slow(case))
        for case in cases()
    ],
)
def test_every_pair(case):
    right(case)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    st.fixed_dictionaries({name: st.sampled_from(x) for name, x in FACTORS.items()}).filter(
        lambda case: is_possible([*case.values()])
    )
)
def test_any_combination(case):
    right(case)


ALL_KERNELS = (
    dense_attention,
    blockwise_attention,
    fused_attention,
    exact_attention,
    dot_product_attention,
)


def test_one_signature():
    """Parameters have the same names, order and defaults in every kernel and public function."""
    signatures = [
        {n: p.default for n, p in inspect.signature(f).parameters.items()} for f in ALL_KERNELS
    ]
    common = list(inspect.signature(AttentionFunction.__call__).parameters)[1:-1]
    for parameters in signatures:
        assert list(parameters)[: len(common)] == common
        assert {name: parameters[name] for name in common} == signatures[0]


def test_the_default_is_the_kernel_that_is_chosen():
    """The default on a CPU is the blockwise kernel, with the bits that it has by name."""
    sizes = SIZES["grouped"]
    q, k, v, _ = map(jnp.asarray, operands(sizes))
    assert choose_kernel(q, k, v, is_causal=True).kernel == Blockwise()
    default = partial(dot_product_attention, is_causal=True, layout=ONE_AXIS[4].on())
    named = partial(default, kernel=blockwise_attention)
    assert compare_bits(jax.jit(default)(q, k, v), jax.jit(named)(q, k, v)).equal
