"""The product of features, kernels and degrees: forward and gradients against float64."""

from functools import partial

import pytest
from cases import ONE_AXIS
from features import KERNELS, SIZES, assert_as_near, cases, operands, options, run_jax, run_torch
from jax.sharding import AxisType

from jax_seqpar import dot_product_attention
from jax_seqpar.bridge import compare_bits
from jax_seqpar.heads import plan_heads


def name_of(case):
    return ", ".join(f"{n} {x}" for n, x in case.items() if x not in (None, False, 0.0))


@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_every_pair(case):
    """Also: the bits of one device, wherever a head is computed by itself."""
    kernel, sizes, degree = case["kernel"], SIZES[case["sizes"]], case["degree"]
    given, inputs = options(case), operands(sizes)
    plan = plan_heads(sizes.N, sizes.K, degree, may_copy=kernel != "exact")
    heads, kv_heads = (n // degree for n in (plan.query_heads, plan.padded_kv_heads * plan.copies))
    chunks = case["chunks"]
    if heads % chunks or (kv_heads % chunks and (kernel == "exact" or chunks % kv_heads)):
        chunks = 1
    kind = (AxisType.Auto, AxisType.Explicit)[degree // 2 % 2]
    sharded = partial(
        dot_product_attention,
        attention=KERNELS[kernel],
        mesh=ONE_AXIS[degree].mesh(kind),
        head_chunks=chunks,
    )
    got = run_jax(sharded, given, kernel, inputs)
    alone = run_jax(KERNELS[kernel], given, kernel, inputs)
    # Copies of a KV head on several devices, or in several slices of the heads.
    copies = plan.copies * plan.first_copies * max(chunks // kv_heads, 1)
    assert_as_near(got, alone, run_torch(given, kernel, inputs), copies)
    # The dense kernel has all heads in one product, the path for either mode in one sum.
    if kernel in ("blockwise", "exact"):
        for name in got.keys() - {"bias"}:
            if copies == 1 or kernel == "exact" or name not in ("dk", "dv"):
                report = compare_bits(got[name], alone[name])
                assert report.equal, f"{name}: {report}"
