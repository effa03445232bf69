"""Flags, instruction sets and numbers of threads change no bit: one hash, which is PyTorch's.

Nor does a compiler that drops a conversion and its inverse: no rounding is such a pair.
"""

import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import exact_hash
import jax
import jax.numpy as jnp
import pytest
import torch
from cases import is_array, slow
from exact_cases import CROSS, NAMES, jax_exact, torch_exact
from flat_names import keywords_of
from jax.extend import core

from jax_seqpar import exact_attention
from jax_seqpar.exact import arithmetic, elementary

SCRIPT = Path(__file__).parent / "support" / "exact_hash.py"

SETTINGS = {
    "AVX2": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"},
    "SSE4.2, one thread, configuration": {
        "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2 --xla_cpu_multi_thread_eigen=false",
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    },
    # Lets the compiler reorder sums and products, and suppose that no number is NaN.
    "fast math": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    "not optimised": {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
}


@cache
def inputs():
    query, key, value, grad = exact_hash.inputs()
    return {"query": query, "key": key, "value": value, "grad": grad}


@cache
def expected():
    results = torch_exact(inputs(), **exact_hash.OPTIONS)
    return exact_hash.sha256([results[name] for name in NAMES])


@pytest.mark.parametrize("name", [slow(n) if n == "AVX2" else n for n in SETTINGS])
def test_flags(name):
    found = subprocess.run(
        [sys.executable, SCRIPT],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | SETTINGS[name],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [expected()] * 2, "on one device, and on four"


def test_not_compiled_as_a_whole():
    """Bits are equal where each operation around the loops is compiled by itself."""
    results = jax_exact(inputs(), False, **exact_hash.OPTIONS)
    assert exact_hash.sha256([results[name] for name in NAMES]) == expected()


@pytest.mark.parametrize("precision", ("F32_F32_F32", "BF16_BF16_F32_X6", "float32"))
def test_precision_of_the_caller(precision):
    """A preset of JAX rounds the operands of every product that names no precision."""
    with jax.default_matmul_precision(precision):
        results = jax_exact(inputs(), **exact_hash.OPTIONS)
    assert exact_hash.sha256([results[name] for name in NAMES]) == expected()


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_of_pytorch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = torch_exact(inputs(), **exact_hash.OPTIONS)
    finally:
        torch.set_num_threads(before)
    assert exact_hash.sha256([results[name] for name in NAMES]) == expected()


def test_the_hash_sees_one_bit():
    results = torch_exact(inputs(), **exact_hash.OPTIONS)
    arrays = [results[name].copy() for name in NAMES]
    arrays[2].ravel().view("u4")[7] ^= 1
    assert exact_hash.sha256(arrays) != expected()


# What a compiler may move a conversion past.
LAYOUT = {
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "reshape",
    "slice",
    "squeeze",
    "transpose",
}


def widened(jaxpr, narrow=()):
    """Conversions to more bits of what was just converted to fewer; and which results are narrow.

    XLA:GPU leaves out both, and so the rounding; `test_gpu_aot` asks it.
    """
    narrow, found = set(narrow), []
    for eqn in jaxpr.eqns:
        inputs = [isinstance(x, core.Var) and x in narrow for x in eqn.invars]
        name = eqn.primitive.name
        if name == "convert_element_type":
            bits = [jnp.finfo(x.aval.dtype).bits for x in (*eqn.invars, *eqn.outvars) if floats(x)]
            if len(bits) == 2 and bits[0] < bits[1]:
                found += [eqn] if inputs[0] else []
            elif len(bits) == 2 and (bits[0] > bits[1] or inputs[0]):
                narrow.add(eqn.outvars[0])
        elif name in LAYOUT and any(inputs):
            narrow.add(eqn.outvars[0])
        for inner in inner_jaxprs(eqn):
            # From the end: a condition or the constants of another function may come first.
            pairs = zip(reversed(inner.invars), reversed(inputs), strict=False)
            more, results = widened(inner, [x for x, is_narrow in pairs if is_narrow])
            found += more
            narrow |= {x for x, y in zip(eqn.outvars, results, strict=False) if y}
    return found, [isinstance(x, core.Var) and x in narrow for x in jaxpr.outvars]


def floats(x):
    return jnp.issubdtype(x.aval.dtype, jnp.floating)


def inner_jaxprs(eqn):
    for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
        if hasattr(leaf, "eqns"):
            yield getattr(leaf, "jaxpr", leaf)


def conversions(dtype, options):
    operands = map(jnp.asarray, CROSS.inputs().values())
    arrays = jax.tree.map(jnp.asarray, {n: x for n, x in options.items() if is_array(x)})
    static = {n: x for n, x in options.items() if n not in arrays}

    def run(*operands):
        # As a caller may do it, in the same program.
        *operands, grad = (x.astype(dtype) for x in operands)
        out, pull = jax.vjp(partial(exact_attention, **keywords_of(**arrays, **static)), *operands)
        return (out, *pull(grad))

    return widened(jax.make_jaxpr(run)(*operands).jaxpr)[0]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_no_rounding_is_a_conversion_and_back(dtype):
    assert not conversions(dtype, CROSS.all_at_once(by_positions=False))


def test_a_rounding_by_a_conversion_alone_is_seen(monkeypatch):
    def round32(x):
        return arithmetic.flush(x).astype(jnp.float32)

    jax.clear_caches()
    monkeypatch.setattr(elementary, "round32", round32)
    # Of the tanh, which is multiplied by the cap in float64.
    assert conversions("float32", {"is_causal": True, "logits_soft_cap": 2.0})
    jax.clear_caches()


def in_a_loop(f, x):
    def step(carry):
        i, total, limit = carry
        return i + 1, total + f(x), limit

    return jax.lax.while_loop(lambda c: c[0] < c[2], step, (0, jnp.float32(0), 3))[1]


def in_a_branch(f, x):
    return jax.lax.cond(x[0] > 1, f, lambda y: jnp.float32(0), x)


@pytest.mark.parametrize(
    "wrapped", (lambda f, x: f(x), in_a_loop, in_a_branch), ids=("plain", "loop", "branch")
)
def test_a_pair_of_conversions_is_found(wrapped):
    def pair(x):
        narrow = x.astype(jnp.bfloat16)
        return wrapped(lambda y: y[:1].astype(jnp.float32).sum(), narrow)

    assert len(widened(jax.make_jaxpr(pair)(jnp.ones(3)).jaxpr)[0]) == 1
