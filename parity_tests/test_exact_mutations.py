"""The comparisons of exact attention see what they are for: each mutation is caught."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import ONE_AXIS, is_array
from exact_cases import (
    CROSS,
    CROSS_OPTIONS,
    KEY,
    NAMES,
    Cross,
    jax_exact,
    many_keys,
    torch_exact,
)
from flat_names import keywords_of
from one_exponent import digits_of_one_exponent, token_of_one_exponent
from questions import output_and_gradients

from jax_seqpar import AllGatherKV, Exact, Ulysses, dot_product_attention, exact_attention
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import arithmetic, backward, block_logits, forward, token_blocks
from jax_seqpar.exact.kv_replicas import SharedHeads
from jax_seqpar.mask import Dropout, Tokens, threefry
from jax_seqpar.parity.inputs import NAMES as INPUT_NAMES
from jax_seqpar.parity.inputs import Arrays, Case, adversarial
from jax_seqpar.strategies import ulysses
from torch_ref.dropout import gain, is_kept
from torch_ref.exact import arithmetic as exact_arithmetic
from torch_ref.exact import attention as torch_attention
from torch_ref.exact import attention_head as exact_head
from torch_ref.masks import places

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

CASE = Case(batch=1, tokens=29, heads=4, kv_heads=2, head_dim=16)
SHARED = Case(batch=1, tokens=16, heads=8, kv_heads=2, head_dim=6)
FEW = {"dropout_rate": 0.3, "dropout_rng": KEY, "sinks": CROSS.sinks()}
# Blocks of the gradients: several, and the last one smaller.
BLOCK = 8


@contextmanager
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        for module in (arithmetic, exact_arithmetic):
            patch.setattr(module, "BLOCK", BLOCK)
        yield


def check_equal(ours, expected):
    report = compare_bits(ours, expected)
    assert report.equal, str(report)


def cancelling():
    """Two keys that outweigh the others, with opposite values: what is left shows every bit.

    Of a weight, that is: rounded far below the largest weights, here not so far below the sum.
    """
    inputs = CASE.inputs()
    query, key, value, _ = inputs.values()
    query[:] = np.abs(query)
    key[:, 3] = key[:, 2] = 5
    value[:, 3] = -value[:, 2]
    return inputs


def nearly_orthogonal():
    """Queries and keys whose products nearly cancel, and norms just below a power of two."""
    rng = np.random.default_rng(0)
    inputs = CASE.inputs()
    for name, large in (("query", (4095, 90)), ("key", (90, -4095))):
        inputs[name] = (rng.standard_normal(inputs[name].shape) * 2.0**-3).astype(np.float32)
        inputs[name][..., :2] = large
    return inputs


def in_bfloat16():
    return {name: x.astype(jnp.bfloat16) for name, x in CASE.inputs().items()}


def alone():
    """One device, chunks and blocks that overlap, numbers of every magnitude."""
    with small_blocks():
        for inputs in (CASE.inputs(), adversarial(CASE.inputs()), cancelling()):
            ours = jax_exact(inputs, is_causal=True, query_chunk=3, key_chunk=5)
            check_equal(ours, torch_exact(inputs, is_causal=True))


def output(inputs: Arrays, attend: Callable[..., Any] = exact_attention) -> Arrays:
    """Output of JAX, without gradients, which take longer to compile."""
    operands = [jnp.asarray(inputs[name]) for name in INPUT_NAMES[:3]]
    return {"forward": np.asarray(jax.jit(attend)(*operands))}


def of_output(results):
    return {"forward": results["forward"]}


def output_alone():
    """Outputs on one device, compared as in `alone`."""
    attend = jax.jit(partial(Exact(query_chunk=3, key_chunk=5), is_causal=True))
    for inputs in (CASE.inputs(), adversarial(CASE.inputs()), cancelling()):
        expected = torch_exact(inputs, is_causal=True)
        check_equal(output(inputs, attend), of_output(expected))


def output_of_nearly_orthogonal_rows():
    inputs = nearly_orthogonal()
    ours = output(inputs, partial(exact_attention, **keywords_of(scale=1.0)))
    check_equal(ours, of_output(torch_exact(inputs, scale=1.0)))


def output_of_many_keys():
    check_equal(output(many_keys()), of_output(torch_exact(many_keys())))


def all_in_bfloat16():
    check_equal(jax_exact(in_bfloat16()), torch_exact(in_bfloat16()))


def subnormal_keys():
    inputs = CASE.inputs()
    inputs["query"] *= np.float32(2.0**124)
    inputs["key"] *= np.float32(2.0**-130)
    check_equal(output(inputs), of_output(torch_exact(inputs)))


def on_devices(strategy, where):
    inputs = SHARED.inputs()
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=where.on(),
        strategy=strategy,
        is_causal=True,
    )
    with small_blocks():
        ours = dict(zip(NAMES, output_and_gradients(attend)(**inputs), strict=True))
        check_equal(ours, torch_exact(inputs, is_causal=True))


def on_devices_that_share_heads():
    on_devices(Ulysses(), ONE_AXIS[8])


def on_devices_that_share_blocks():
    """Comparison on devices that each hold some of the queries of a block."""
    on_devices(AllGatherKV(), ONE_AXIS[4])


def with_dropout_and_sinks():
    """Comparison of the output with dropout and sinks, in chunks that overlap."""
    inputs = CROSS.inputs()
    attend = partial(
        Exact(query_chunk=3, key_chunk=5),
        **keywords_of(**{n: jnp.asarray(x) if is_array(x) else x for n, x in FEW.items()}),
    )
    check_equal(output(inputs, attend), of_output(torch_exact(inputs, **FEW)))


def with_dropout_and_sinks_on_devices():
    """Comparison of the output with dropout and sinks, on devices that split groups of heads."""
    case = Cross(N=6, K=2)
    options = FEW | {"sinks": case.sinks()}
    arrays = {name: jnp.asarray(x) if is_array(x) else x for name, x in options.items()}
    attend = partial(
        dot_product_attention,
        kernel=exact_attention,
        layout=ONE_AXIS[4].on(),
        **keywords_of(**arrays),
    )
    inputs = case.inputs()
    check_equal(output(inputs, attend), of_output(torch_exact(inputs, **options)))


def float32_dots(keys, queries):
    """The same products of float64 integers, added in float32."""
    product = jnp.einsum("sh,hdt->dst", keys.astype(jnp.float32), queries.astype(jnp.float32))
    return product.astype(jnp.float64).sum(0)


def float32_halves(sums):
    return arithmetic.halves(sums.astype(jnp.float32).astype(jnp.float64))


def single_exp(x):
    return jnp.where(x < -80, jnp.float32(0), jnp.exp(x))


def norm_without_reserve(x):
    e = arithmetic.exponent(x, -1)
    magnitudes = jnp.ceil(jnp.abs(x) * arithmetic.power_of_two(12 - e))
    squares = jnp.sum(magnitudes * magnitudes, axis=-1, keepdims=True)
    return e - 12 + (arithmetic.exponent(squares, -1) + 1) // 2


def count_of_one_block(rows, step, carry, true=forward.ChunkOfRows.for_tiles):
    """t of the last block of keys, and all else of every block."""
    if step.__name__ != "count":
        return true(rows, step, carry)
    last = (rows.bounds[1] + rows.size - 1) // rows.size - 1
    return step(Tokens(last * rows.size, rows.size), carry)


def gradients_of_rounded_output(*operands, true=backward.gradients):
    *others, out, rows, grad = operands
    return true(*others, out.astype(jnp.bfloat16).astype(jnp.float32), rows, grad)


def without_sinks(spec, top, true=forward.with_sink):
    return true(spec, top)[0], jnp.zeros_like(top, jnp.float64)


def keys_of_the_first_device(x, axes, *, axis_name, true=ulysses._own_heads, **plan):
    own = true(x, axes, axis_name=axis_name, **plan)
    return jax.lax.all_gather(own, axis_name)[0] if x.dtype == jnp.uint32 else own


# A question, and what to put in place of what.
MUTATIONS = {
    "dot products in float32": (output_alone, block_logits, "dots", float32_dots),
    "sums over tokens in float32": (output_alone, forward, "halves", float32_halves),
    "sums above 2^53 in one float64": (
        output_of_many_keys,
        forward,
        "halves",
        lambda x: jnp.stack([x * 2.0**-20, jnp.zeros_like(x)]),
    ),
    "exp in float32": (output_alone, forward, "exp", single_exp),
    "a norm without its reserve": (
        output_of_nearly_orthogonal_rows,
        arithmetic,
        "norm",
        norm_without_reserve,
    ),
    "one exponent for all values": (
        output_alone,
        forward,
        "token_digits",
        digits_of_one_exponent,
    ),
    "weights of 29 bits": (output_alone, arithmetic, "ROW_BITS", 0),
    "weights of one more bit": (output_alone, arithmetic, "ROW_BITS", 50),
    "t of one block of keys": (
        output_alone,
        forward.ChunkOfRows,
        "for_tiles",
        count_of_one_block,
    ),
    "a last bit of the logits": (
        output_alone,
        block_logits,
        "round32",
        lambda x: (arithmetic.flush(x) * (1 + 2.0**-25)).astype(jnp.float32),
    ),
    "a value of NaN that leaves the logits": (
        output_alone,
        forward,
        "key_operand",
        lambda key, value: arithmetic.right_on_grid(arithmetic.flush(key)),
    ),
    # In PyTorch: XLA:CPU itself reads a subnormal as 0.
    "subnormals kept": (subnormal_keys, exact_head, "flush", lambda x: x.double()),
    "slices in float32": (
        alone,
        backward,
        "slices",
        lambda *x, axis: arithmetic.slices(*x, axis=axis).astype(jnp.float32).astype(jnp.float64),
    ),
    "one slice": (
        alone,
        backward,
        "slices",
        lambda *x, axis: arithmetic.slices(*x, axis=axis) * jnp.array([1.0, 0]).reshape(2, 1, 1),
    ),
    "one exponent for all tokens of the gradients": (
        alone,
        token_blocks,
        "token_digits",
        digits_of_one_exponent,
    ),
    "tokens of two blocks counted twice": (alone, backward, "in_both", lambda keys, queries: None),
    "D of the rounded output": (
        all_in_bfloat16,
        backward,
        "gradients",
        gradients_of_rounded_output,
    ),
    "heads that do not know of one another": (
        on_devices_that_share_heads,
        SharedHeads,
        "sum",
        lambda self, x: x,
    ),
    "anchors of each device's own": (
        on_devices_that_share_heads,
        SharedHeads,
        "max",
        lambda self, x: x,
    ),
    "every device returns the sum": (
        on_devices_that_share_heads,
        SharedHeads,
        "is_first",
        lambda self: jnp.bool_(True),
    ),
    "units of each device's own": (
        on_devices_that_share_blocks,
        Exact,
        "block",
        1,  # no block has to stay together
    ),
    "sinks left out of L": (with_dropout_and_sinks, forward, "with_sink", without_sinks),
    "dropout by the tokens of a block": (
        with_dropout_and_sinks,
        Dropout,
        "keep",
        lambda self, queries, keys: threefry.keep(
            self.rng, self.rate, jnp.arange(queries.size), jnp.arange(keys.size)
        ),
    ),
    "dropout by the heads of a device": (
        with_dropout_and_sinks_on_devices,
        ulysses,
        "_own_heads",
        keys_of_the_first_device,
    ),
    "sinks and keys of other heads": (
        with_dropout_and_sinks_on_devices,
        ulysses,
        "_with_added_heads",
        lambda x, axes, *, plan, heads, **_: jnp.pad(
            x, [(0, plan.query_heads - heads if n == heads else 0) for n in x.shape]
        ),
    ),
}
QUESTIONS = dict.fromkeys(question for question, *_ in MUTATIONS.values())


@pytest.fixture
def compiled_anew():
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize(("question", "owner", "name", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_is_caught(monkeypatch, question, owner, name, mutant):
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError, match="elements differ"):
        question()


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("question", QUESTIONS)
def test_nothing_is_caught_without_one(question):
    question()
    assert np.unique(CASE.inputs()["query"]).size > 1000


def without(**changes):
    """The backward pass for a head of other rows or options."""
    true = exact_head._weights_of_sums

    def mutant(head, do, o, options):
        rows = {name: x for name, x in changes.items() if name in head.rows._fields}
        rest = {name: x for name, x in changes.items() if name not in rows}
        head = head._replace(rows=head.rows._replace(**rows))
        return true(head, do, o, options._replace(**rest))

    return mutant


def torch_norm_without_reserve(x):
    e = exact_arithmetic.exponent(x, dim=-1)
    t = torch.ceil(x.abs() * exact_arithmetic.power(12 - e)).square().sum(dim=-1, keepdim=True)
    return e - 12 + torch.ceil(exact_arithmetic.exponent(t, dim=-1) / 2)


def weights_without_dropped(head, options, true=exact_head._weights):
    weights = true(head, options)
    total = exact_head._sum_of_weights(exact_head._where_kept(weights.kept, weights.p))
    return weights._replace(r=torch.where(total == 0, 0.0, 2.0**41 / total.double()))


def blocks_over_heads(head):
    for start in range(0, len(head.rows.q), exact_arithmetic.BLOCK):
        yield slice(start, start + exact_arithmetic.BLOCK)


def slices_in_float32(R, anchor, true=exact_arithmetic._slices):
    return tuple(x.float().double() for x in true(R, anchor))


def one_slice(R, anchor, true=exact_arithmetic._slices):
    first, second = true(R, anchor)
    return first, torch.zeros_like(second)


def sum_in_one_float64(a, b):
    total = torch.zeros(len(a), b.shape[1], dtype=torch.float64)
    for x, y in zip(a.split(256, dim=1), b.split(256, dim=0), strict=True):
        total += x @ y
    return total


def cross(name):
    return CROSS.inputs, CROSS_OPTIONS[name]


PLAIN = (CASE.inputs, {"is_causal": True})
# Inputs with options, and what to put in place of what in PyTorch's.
TORCH_MUTATIONS = {
    "one exponent for all tokens": (*PLAIN, exact_arithmetic, "token", token_of_one_exponent),
    "a norm without its reserve": (
        *(nearly_orthogonal, {"scale": 1.0}),
        *(exact_arithmetic, "norm", torch_norm_without_reserve),
    ),
    "weights of 29 bits": (cancelling, {}, exact_arithmetic, "ROW_BITS", 0),
    "weights of one more bit": (cancelling, {}, exact_arithmetic, "ROW_BITS", 38),
    "sums over tokens in float32": (
        *PLAIN,
        *(exact_arithmetic, "_integer_product"),
        lambda a, b: (a.float() @ b.float()).double(),
    ),
    "sums above 2^53 in one float64": (
        *(many_keys, {}),
        *(exact_arithmetic, "_integer_product", sum_in_one_float64),
    ),
    "exp in float32": (
        *PLAIN,
        *(exact_head, "exp"),
        lambda x: torch.where(x < -80, 0.0, torch.exp(x.float()).double()),
    ),
    "slices in float32": (*PLAIN, exact_arithmetic, "_slices", slices_in_float32),
    "one slice": (*PLAIN, exact_arithmetic, "_slices", one_slice),
    "blocks that straddle heads": (*PLAIN, exact_head, "_blocks_of_queries", blocks_over_heads),
    "one block": (*PLAIN, exact_arithmetic, "BLOCK", 256),
    "D of the rounded output": (
        *(in_bfloat16, {}),
        *(torch_attention, "backward"),
        lambda head, do, o, *rest: exact_head.backward(head, do, o.bfloat16().float(), *rest),
    ),
    "dropped weights left out of L": (
        *cross("dropout"),
        *(exact_head, "_weights", weights_without_dropped),
    ),
    "sinks left out of the gradients": (
        *cross("sinks"),
        *(exact_head, "_weights_of_sums", without(sink=None)),
    ),
    "dropout left out of the gradients": (
        *cross("dropout"),
        *(exact_head, "_weights_of_sums", without(rng=None)),
    ),
    "gradients of dropout not scaled": (
        *cross("dropout"),
        *(exact_head, "_weights_of_sums", without(rate=0.0)),
    ),
    "dropout scaled twice": (
        *cross("dropout"),
        *(exact_head, "gain", lambda rate: gain(rate) ** 2),
    ),
    "dropout of keys by queries": (
        *cross("dropout"),
        *(exact_head, "is_kept", lambda keys, rate, t, s: is_kept(keys, rate, s, t)),
    ),
    "slopes on both sides": (*cross("slopes"), exact_head, "distance", lambda t, s: t - s),
    "slopes for any distance": (
        *cross("slopes, positions far apart"),
        *(exact_head, "distance", lambda t, s: (t - s).abs()),
    ),
    "slopes by number": (
        *cross("slopes, positions"),
        *(torch_attention, "places"),
        lambda T, S, offset, positions, device: places(T, S, 0, None, device),
    ),
}


@pytest.mark.parametrize(
    ("inputs", "options", "owner", "name", "mutant"), TORCH_MUTATIONS.values(), ids=TORCH_MUTATIONS
)
def test_a_mutation_of_pytorch_is_caught(inputs, options, owner, name, mutant):
    """Mutations change bits that `test_exact_oracle` compares with JAX and with integers."""
    with small_blocks(), pytest.MonkeyPatch.context() as patch:
        expected = torch_exact(inputs(), **options)
        patch.setattr(owner, name, mutant)
        assert not compare_bits(torch_exact(inputs(), **options), expected).equal
