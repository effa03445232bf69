"""Ring: what it sends and when, what it leaves out, and that wrong rings are caught.

Its values with every feature, order and degree are in the table of `test_attention_features`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import balance_orders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import ONE_AXIS, MeshCase, slow
from features import Sizes, in_order, in_sequence, operands, run_jax, run_torch
from jax.sharding import PartitionSpec
from questions import compiled, output_and_gradients, permuted_bytes
from wrong_rings import WRONG, WRONG_BOTH_WAYS

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Contiguous,
    Dense,
    Hybrid,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    TokenOrder,
    Ulysses,
    Zigzag,
    blockwise_attention,
    dot_product_attention,
)
from jax_seqpar.plan import collectives
from jax_seqpar.plan import temporaries as temporaries_of
from jax_seqpar.strategies.hops import hops
from torch_ref.masks import attends

pytestmark = [pytest.mark.usefixtures("less_optimised"), pytest.mark.timeout(120)]

SIZES = Sizes(B=2, T=32, S=32, N=4, K=2, H=6, V=5)
ORDERS = (Contiguous(), Zigzag(), Striped())


def ring(degree, order: TokenOrder = Contiguous(), **options):
    layout = MeshCase((degree,), ("seq",), MeshLayout(order=order)).on()
    options = {"kernel": Blockwise(query_chunk=5, key_chunk=3), "strategy": Ring()} | options
    return partial(dot_product_attention, layout=layout, **options)


def largest_error(attend, order, degree, given, inputs):
    """Largest error of output and gradients, relative to float64 by PyTorch."""
    dealt, operands = in_order(order, degree, given, inputs)
    got = in_sequence(order, degree, run_jax(attend, dealt, "blockwise", operands))
    truth = run_torch(given, "blockwise", inputs)
    errors = [
        np.abs(np.asarray(got[n], np.float64) - x).max() / np.abs(x).max() for n, x in truth.items()
    ]
    return float(np.max(errors))  # NaN if one is, unlike Python's


# ---------------------------------------------------------------- wrong rings

GIVEN = {
    "is_causal": True,
    "sinks": np.random.default_rng(1).standard_normal(SIZES.N),
    "alibi_slopes": 0.5 ** np.arange(1.0, SIZES.N + 1),
}


BOTH_WAYS = Ring(bidirectional=True)
BOTH_SIDES = {"local_window_size": (9, 3)}
# Of 48 tokens, the first 13 in one document, the next 5 in another.
DOCUMENTS = {"segment_ids": np.repeat(np.array([[0, 1, 2], [0, 2, 3]], np.int32), [13, 5, 30], 1)}
RIGHT: dict[str, tuple[Ring, TokenOrder, int, dict[str, Any]]] = {
    **{str(order): (Ring(), order, 4, GIVEN) for order in ORDERS},
    "both ways, 8": (BOTH_WAYS, Zigzag(), 8, GIVEN),
    "both ways, 4": (BOTH_WAYS, Striped(), 4, GIVEN),
    "both ways, 3": (BOTH_WAYS, Contiguous(), 3, GIVEN),
    "both ways, window": (BOTH_WAYS, Contiguous(), 8, BOTH_SIDES),
    "both ways, documents": (BOTH_WAYS, Contiguous(), 8, DOCUMENTS),
}


@pytest.mark.parametrize(("strategy", "order", "degree", "given"), RIGHT.values(), ids=RIGHT)
def test_a_right_ring_has_the_precision_of_its_inputs(strategy, order, degree, given):
    with jax.enable_x64(True):
        inputs = operands(replace(SIZES, T=48, S=48), "float64")
        attend = ring(degree, order, strategy=strategy)
        assert largest_error(attend, order, degree, given, inputs) <= 1e-13


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_ring_is_caught(wrong, monkeypatch):
    WRONG[wrong](monkeypatch)
    with jax.enable_x64(True):
        inputs = operands(SIZES, "float64")
        assert largest_error(ring(4, Zigzag()), Zigzag(), 4, GIVEN, inputs) > 1e-4


@pytest.mark.parametrize("wrong", WRONG_BOTH_WAYS)
def test_a_wrong_ring_both_ways_is_caught(wrong, monkeypatch):
    WRONG_BOTH_WAYS[wrong](monkeypatch)
    with jax.enable_x64(True):
        inputs = operands(SIZES, "float64")
        attend = ring(4, Zigzag(), strategy=BOTH_WAYS)
        assert largest_error(attend, Zigzag(), 4, GIVEN, inputs) > 1e-4


def rms_in_bfloat16(degree):
    """Relative to float64, of output and of dq, with keys of a common offset."""
    inputs = operands(replace(SIZES, T=64, S=64, H=16), "bfloat16")
    inputs[1] = (inputs[1].astype(np.float32) + 2).astype(inputs[1].dtype)
    attend = ring(degree) if degree > 1 else blockwise_attention
    got = run_jax(attend, {}, "blockwise", inputs)
    truth = run_torch({}, "blockwise", inputs)
    return {
        n: float(np.sqrt(np.mean((np.asarray(got[n], np.float64) - truth[n]) ** 2)))
        for n in ("out", "dq", "dk", "dv")
    }


def test_parts_are_rounded_once():
    """A ring of eight in bfloat16 errs as one device does: 1.00 times as much, measured."""
    one, eight = rms_in_bfloat16(1), rms_in_bfloat16(8)
    assert {n: x for n, x in eight.items() if x > 1.02 * one[n]} == {}


def test_parts_that_are_rounded_each_are_seen(monkeypatch):
    WRONG["parts in 16 bits"](monkeypatch)
    one, eight = rms_in_bfloat16(1), rms_in_bfloat16(8)
    assert eight["out"] > 1.2 * one["out"]


# ---------------------------------------------------------------- what it sends


# By degree: permutes forward and for the gradients, and how often a slice of float32 is sent.
ONE_WAY = {2: (1, 2, 1), 4: (2, 5, 4), 8: (2, 5, 8)}
AT_ONCE = {2: (1, 2, 1), 3: (2, 4, 2), 4: (3, 6, 3), 8: (5, 12, 9)}


@pytest.mark.parametrize(
    ("bidirectional", "degree", "kv_heads"),
    (
        *((False, 2, 1), (False, 8, 4), (True, 3, 2), (True, 4, 1)),
        *(slow(False, *x) for x in ((4, 2), (8, 1))),
        *(slow(True, *x) for x in ((2, 4), (8, 4))),
    ),
)
@pytest.mark.usefixtures("optimised")
def test_bytes_and_permutes_are_those_of_the_formula(bidirectional, degree, kv_heads):
    sizes = replace(SIZES, T=48, S=48, K=kv_heads, V=6)
    query, key, value, grad = (jnp.asarray(x) for x in operands(sizes, "bfloat16"))
    strategy = Ring(bidirectional=bidirectional)
    attend = ring(degree, strategy=strategy, is_causal=True)
    both = output_and_gradients(attend)
    expected = strategy.traffic(query.shape, key.shape, value.shape, degree=degree, itemsize=2)
    assert expected == (degree - 1) * (key.nbytes + value.nbytes) // degree
    assert permuted_bytes(attend, query, key, value) == expected
    # Keys and values go round again. Their gradients come along in float32, in a loop from the
    # first round and else from the second, and go home on each way that they came.
    of_output, of_gradients, slices = (AT_ONCE if bidirectional else ONE_WAY)[degree]
    gradients = slices * 2 * (key.nbytes + value.nbytes) // degree
    assert permuted_bytes(both, query, key, value, grad) == 2 * expected + gradients
    # One permute of each direction before the loop and one in it, and of the longer one where the
    # shorter ends; with gradients the loop's two of each direction, and those after it.
    forward, program = compiled(attend, query, key, value), compiled(both, query, key, value, grad)
    assert collectives(forward) == {"collective-permute": of_output}
    assert collectives(program)["collective-permute"] <= of_output + of_gradients
    assert set(collectives(program)) == {"collective-permute"}
    # On a CPU as integers, which XLA does not widen.
    assert "f32" not in "".join(x for x in forward.splitlines() if " collective-permute(" in x)


def test_keys_and_values_held_do_not_grow_with_the_degree():
    """Memory of a ring is constant: a device's keys and values, those visiting and those sent."""

    def temporaries(degree, strategy):
        tokens = 64 * degree
        shapes = [jax.ShapeDtypeStruct((1, tokens, n, 64), jnp.float32) for n in (1, 1, 1)]
        attend = ring(degree, strategy=strategy, is_causal=True, kernel=Blockwise(16, 16))
        return temporaries_of(jax.jit(attend).lower(*shapes).compile())

    assert temporaries(8, Ring()) <= temporaries(4, Ring()) * 1.05
    assert temporaries(8, AllGatherKV()) > temporaries(4, AllGatherKV()) * 1.3


# ---------------------------------------------------------------- what it leaves out


@pytest.mark.parametrize("window", (1, 7, 8, 9, 16, 17))
def test_a_window_is_heard_from_near_devices_only(window):
    """Rounds by window with eight tokens a device: one up to a reach of 8; a permute for each."""
    rounds = -(-window // 8)
    given = {"is_causal": True, "local_window_size": (window, 0)}
    assert hops(Mask(**given), Contiguous(), 32, 32, 4) == (min(rounds, 3), 0)
    with jax.enable_x64(True):
        inputs = operands(SIZES, "float64")
        assert largest_error(ring(4), Contiguous(), 4, given, inputs) <= 1e-13
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))
    kv = (k.nbytes + v.nbytes) // 4
    assert permuted_bytes(partial(ring(4), **given), q, k, v) == min(rounds, 3) * kv


def test_a_window_to_both_sides():
    mask = Mask(local_window_size=(9, 3))
    assert hops(mask, Contiguous(), 64, 64, 8) == (2, 1)
    assert hops(Mask(), Contiguous(), 64, 64, 8) == (7, 0)
    # Queries that see the devices three before them and earlier, which are nearer from behind.
    assert hops(Mask(is_causal=True, query_offset=-24), Contiguous(), 64, 64, 8) == (0, 5)
    with jax.enable_x64(True):
        inputs = operands(replace(SIZES, T=64, S=64), "float64")
        given = {"local_window_size": (9, 3)}
        assert largest_error(ring(8), Contiguous(), 8, given, inputs) <= 1e-13


def test_the_balance_of_orders():
    """Blocks of a causal mask are even in zigzag, and a window takes few rounds."""
    allowed = balance_orders.masks(512)
    window = {"is_causal": True, "local_window_size": (64, 0)}
    for order in ORDERS:
        count = balance_orders.blocks_of_rounds(allowed["window 64"], order, 8, 16)
        rounds = sum(hops(Mask(**window), order, 512, 512, 8))
        assert (count.sum(1) > 0).sum() - 1 <= rounds
        if order == Contiguous():
            assert (count.sum(1) > 0).sum() - 1 == rounds == 1
    even, uneven = (
        balance_orders.blocks_of_rounds(allowed["causal"], order, 8, 16)
        for order in (Zigzag(), Contiguous())
    )
    assert (even == even[:, :1]).all()
    assert uneven.max(1).sum() > 1.8 * uneven.sum() / 8


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("is_causal", (False, True))
def test_rounds_are_those_that_some_device_needs(order, is_causal):
    """Rounds agree with the mask written out, for documents and windows in every order."""
    rng = np.random.default_rng(3)
    for trial in range(12):
        tokens, degree = 32, (4, 8)[trial % 2]
        segment_ids = np.sort(rng.integers(0, 1 + trial, (2, tokens)), 1).astype(np.int32)
        given = {"is_causal": is_causal}
        if trial % 3:
            given["local_window_size"] = ((5, 0), (3, 6))[trial % 3 - 1]
        mask = Mask(segment_ids=jnp.asarray(segment_ids), **given)
        before, after = map(int, hops(mask, order, tokens, tokens, degree))
        longest = tuple(map(int, hops(mask, order, tokens, tokens, degree, True)))
        assert max(longest) <= max(before, after)
        assert sum(longest) >= before + after
        allowed: Any = attends(tokens, tokens, segment_ids=torch.from_numpy(segment_ids), **given)
        allowed = allowed.numpy().any((0, 1))
        place = order.permutation(tokens, degree)
        size = tokens // degree
        seen = allowed[place][:, place].reshape(degree, size, degree, size).any((1, 3))
        for a, b in zip(*np.nonzero(seen), strict=True):
            distance = (a - b) % degree
            for ahead, behind in ((before, after), longest):
                assert distance <= ahead or degree - distance <= behind, (trial, a, b)


BORDERS = np.array([0] * 12 + [1] * 8 + [2] * 12)  # documents that reach into one neighbour


@pytest.mark.parametrize(("strategy", "around"), ((Ring(), (3, 0)), (BOTH_WAYS, (2, 1))), ids=str)
def test_documents_decide_at_run_time(strategy, around):
    """One compiled program makes as many rounds as the segment ids of each call need."""
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))
    attend = jax.jit(lambda ids: ring(4, strategy=strategy)(q, k, v, mask=Mask(segment_ids=ids)))
    index = np.arange(32)
    for row, expected in (
        (index // 8, (0, 0)),
        (BORDERS, (1, 1)),
        (np.zeros(32), around),
        (index, (0, 0)),
    ):
        ids = jnp.asarray(np.stack([row, row]), jnp.int32)
        alone = blockwise_attention(q, k, v, mask=Mask(segment_ids=ids))
        np.testing.assert_allclose(attend(ids), alone, rtol=0, atol=2e-6)
        rounds = hops(Mask(segment_ids=ids), Contiguous(), 32, 32, 4, strategy.bidirectional)
        assert tuple(map(int, rounds)) == expected


@pytest.mark.parametrize(
    ("strategy", "other", "check_vma"),
    (
        (Ring(), np.arange(32) // 8, True),
        (Ring(), BORDERS, False),
        (Ring(bidirectional=True), np.arange(32) // 8, False),
        (Ring(bidirectional=True), BORDERS, True),
    ),
    ids=("8 tokens", "borders, unchecked", "both ways, 8 tokens, unchecked", "both ways, borders"),
)
def test_shards_of_the_batch_make_the_same_rounds(strategy, other, check_vma):
    """Shards of the batch make the same rounds, though one has a document across all devices.

    No transfer waits for ever, and no device is heard from both sides.
    """
    where = MeshCase((2, 4), ("data", "seq"), MeshLayout(batch="data", check_vma=check_vma))
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))
    mask = Mask(segment_ids=jnp.asarray(np.stack([np.zeros(32), other]), jnp.int32))
    attend = partial(dot_product_attention, strategy=strategy, layout=where.on(), mask=mask)

    def loss(attend, q):
        return jnp.sum(attend(q, k, v) ** 2)

    got, expected = (
        jax.jit(jax.value_and_grad(partial(loss, f)))(q)
        for f in (attend, partial(blockwise_attention, mask=mask))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, expected)


def test_second_derivatives_are_refused():
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))

    def loss(q):
        return jnp.sum(ring(4)(q, k, v) ** 2)

    for second in (
        lambda: jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (q,)))(q),
        lambda: jax.jit(jax.grad(lambda q: jnp.sum(jax.grad(loss)(q))))(q),
    ):
        with pytest.raises(ValueError, match=r"has the first derivative in reverse mode alone"):
            second()


def test_products_have_the_precision_of_the_call():
    """Products of derivatives have the precision, too, though JAX traces them after the call."""
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))

    def loss(q):
        with jax.default_matmul_precision("highest"):
            return jnp.sum(ring(4)(q, k, v) ** 2)

    for gradient in (jax.grad(loss), jax.grad(jax.checkpoint(loss)), jax.grad(jax.jit(loss))):
        program = str(jax.make_jaxpr(gradient)(q))
        products = program.split("dot_general")[1:]
        assert len(products) >= 7  # two of the attention, five of its gradients
        assert all("HIGHEST" in x[:300] for x in products)


@pytest.mark.parametrize(
    "mesh", (("inner", "outer"), ("outer", "data", "inner"), ("inner", "data", "outer")), ids=str
)
def test_axes_in_another_order_than_the_mesh_has_them(mesh):
    """`ppermute` counts devices in the order of the mesh, everything else by the names."""
    tokens, sizes = ("outer", "inner"), {"outer": 2, "data": 2, "inner": 2}
    layout = MeshLayout(tokens, batch="data" if "data" in mesh else None, order=Zigzag())
    where = MeshCase(tuple(sizes[name] for name in mesh), mesh, layout)
    degree = 4
    for strategy in (Ring(), AllGatherKV(), Ulysses()):
        attend = partial(dot_product_attention, strategy=strategy, layout=where.on())
        error = largest_error(attend, layout.order, degree, GIVEN, operands(SIZES, "float32"))
        assert error <= 2e-6, strategy


def test_no_keys_at_all():
    q, k, v, _ = (jnp.asarray(x) for x in operands(SIZES))
    for strategy, where in (
        (Ring(), ONE_AXIS[4]),
        (AllGatherKV(), ONE_AXIS[4]),
        (Hybrid(), MeshCase((2, 2), ("a", "b"), MeshLayout(tokens=("a", "b")))),
    ):
        attend = partial(dot_product_attention, strategy=strategy, layout=where.on())
        assert not jnp.any(attend(q, k[:, :0], v[:, :0]))


# ---------------------------------------------------------------- refusals


REFUSED = {
    "dense in a ring": (
        {"kernel": Dense()},
        {},
        r"kernel=Dense.* does not attend to a part of the keys.*strategy=jax_seqpar.Ulysses",
    ),
    "a hybrid on one axis": ({"strategy": Hybrid()}, {}, r"two mesh axes of the tokens, got"),
    "halves that do not divide": (
        {},
        {"order": Zigzag()},
        r"query has 36 tokens, which is no multiple of 8",
    ),
}


@pytest.mark.parametrize(("options", "layout", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(options, layout, message):
    q, k, v, _ = (jnp.asarray(x) for x in operands(replace(SIZES, T=36, S=36)))
    options = {"strategy": Ring()} | options
    layout = replace(ONE_AXIS[4].on(), **layout)
    with pytest.raises(ValueError, match=message):
        dot_product_attention(q, k, v, layout=layout, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_ways_that_are_neither():
    with pytest.raises(ValueError, match=r"bidirectional must be .* Write bidirectional=True or"):
        Ring(bidirectional="both")  # pyright: ignore


def test_tokens_that_an_order_does_not_deal():
    """The order raises itself, and so does a call with the arrays of one device."""
    with pytest.raises(ValueError, match=r"36 tokens, which is no multiple of 8.*Pad them to 40"):
        Zigzag().reorder(np.zeros((1, 36)), 1, 4)
    x = jnp.zeros((1, 12, 2, 4))  # three tokens a device
    layout, spec = MeshLayout("seq", order=Zigzag()), PartitionSpec(None, "seq")
    per_device = jax.shard_map(
        lambda x: dot_product_attention(x, x, x, layout=layout),
        mesh=ONE_AXIS[4].mesh(),
        in_specs=spec,
        out_specs=spec,
    )
    with pytest.raises(ValueError, match=r"query has 12 tokens, which is no multiple of 8"):
        per_device(x)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_hybrid_of_what_it_is_not_made_of():
    for outer, inner in ((Hybrid(), Ulysses()), (Ring(), Ring()), (Ulysses(), Ulysses())):
        with pytest.raises(ValueError, match=r"Hybrid takes Ring\(\) or AllGatherKV\(\) as outer"):
            Hybrid(outer, inner)  # pyright: ignore


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_order_must_be_one():
    with pytest.raises(ValueError, match=r"order must be Contiguous\(\), Zigzag\(\) or Striped"):
        MeshLayout(order="zigzag")  # pyright: ignore

    class Shifted(TokenOrder):
        def __init__(self, by: int) -> None:
            self.by = by

    @dataclass(frozen=True)
    class Rotated(Contiguous):
        pass

    @dataclass(frozen=True)
    class FromOne(TokenOrder):
        def numbers(self, size: int, index: Any, degree: int) -> Any:
            return 1 + Contiguous().numbers(size, index, degree)

    with pytest.raises(ValueError, match=r"Rotated is a subclass of Contiguous, .*TokenOrder"):
        MeshLayout(order=Rotated())
    x = jnp.zeros((1, 16, 2, 4))
    for strategy in (Ulysses(), AllGatherKV(), Ring()):
        with pytest.raises(ValueError, match=r"deals 16 tokens to 4 devices as \[1 2"):
            ring(4, FromOne(), strategy=strategy)(x, x, x)
    with pytest.raises(ValueError, match=r"Shifted has \['by'\], by which two orders are not comp"):
        MeshLayout(order=Shifted(1))
