"""The choice of a strategy: its numbers are those of compiled programs."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategy_costs
from cases import ONE_AXIS, MeshCase, slow
from jax.sharding import AbstractMesh
from questions import compiled, output_and_gradients, permuted_bytes

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Chip,
    Contiguous,
    Dense,
    Exact,
    Fused,
    Hybrid,
    Mask,
    MeshLayout,
    Ring,
    Striped,
    Ulysses,
    Zigzag,
    choose_strategy,
    dot_product_attention,
)
from jax_seqpar.chips import CHIPS, chip_of
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import arithmetic
from jax_seqpar.plan.compiled_text import received_bytes
from jax_seqpar.plan.count import count
from jax_seqpar.plan.transfers import transfers
from jax_seqpar.strategies import choice as choice_module
from jax_seqpar.strategies.cost import Group, Layer, cost_of, pairs
from torch_ref.masks import attends

pytestmark = pytest.mark.usefixtures("less_optimised")

V5E = Chip("v5e", 197e12, 45e9, 3.1e9)
TWO_AXES = MeshCase((2, 4), ("outer", "inner"), MeshLayout(tokens=("outer", "inner")))


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def on(degree: int, **options: Any) -> MeshLayout:
    """A layout of more devices than there are here: a mesh that says no more than its sizes."""
    return MeshLayout(mesh=AbstractMesh((degree,), ("seq",)), **options)


def layer_of(
    heads: int, kv_heads: int, tokens: int = 64, mask: Mask = Mask(), gradients: bool = False
) -> Layer:
    query, key = (2, tokens, heads, 8), (2, tokens, kv_heads, 8)
    return Layer(query, key, key, 4, mask, Contiguous(), gradients)


def chosen(q: Any, k: Any, degree: int, *, options: Any = None, **keywords: Any) -> Any:
    options = {"order": Zigzag()} if options is None else options
    return choose_strategy(
        q, k, k, layout=on(degree, **options), kernel=Blockwise(), chip=V5E, **keywords
    )


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("gradients", (False, True), ids=("forward", "gradients"))
@pytest.mark.parametrize("heads", ((8, 8), (8, 2), (6, 3), (16, 1)), ids=str)
@pytest.mark.usefixtures("optimised")
def test_bytes_are_those_of_compiled_programs(heads, gradients):
    """Predicted bytes, and the order of the strategies by bytes, are those of compiled programs."""
    layer, group = layer_of(*heads, gradients=gradients), Group((4,), (4,))
    arrays = [jnp.ones(x, jnp.float32) for x in (layer.query, layer.key, layer.value, layer.query)]
    arrays = arrays if gradients else arrays[:3]
    counted, predicted = {}, {}
    for strategy in (Ulysses(), AllGatherKV(), Ring(), Ring(bidirectional=True)):
        attend = partial(
            dot_product_attention, strategy=strategy, layout=ONE_AXIS[4].on(), kernel=Blockwise()
        )
        run = output_and_gradients(attend) if gradients else attend
        if isinstance(strategy, Ring):
            counted[strategy] = permuted_bytes(run, *arrays)
        else:
            counted[strategy] = received_bytes(compiled(run, *arrays), 4)
        cost = cost_of(strategy, layer, group, V5E, 0.5)
        assert cost.between == 0
        predicted[strategy] = cost.inside
    assert predicted == counted
    assert min(counted.values()) > 0


@pytest.mark.parametrize("gradients", (False, True), ids=("forward", "gradients"))
@pytest.mark.usefixtures("optimised")
def test_bytes_of_a_hybrid_are_those_of_a_compiled_program(gradients):
    layer, group = layer_of(16, 2, gradients=gradients), Group((2, 4), (1, 4))
    arrays = [jnp.ones(x, jnp.float32) for x in (layer.query, layer.key, layer.value, layer.query)]
    arrays = arrays if gradients else arrays[:3]
    attend = partial(dot_product_attention, layout=TWO_AXES.on(), kernel=Blockwise())
    ring, gather = (
        (output_and_gradients if gradients else lambda x: x)(partial(attend, strategy=strategy))
        for strategy in (Hybrid(Ring()), Hybrid(AllGatherKV()))
    )
    cost = cost_of(Hybrid(Ring()), layer, group, V5E, 0.5)
    # Within a group by all-to-alls of four, between the two by a permute.
    assert cost.inside == received_bytes(compiled(ring, *arrays), 4)
    assert cost.between == permuted_bytes(ring, *arrays) > 0
    text = compiled(gather, *arrays)
    gathered = "\n".join(x for x in text.splitlines() if "all-to-all" not in x)
    cost = cost_of(Hybrid(AllGatherKV()), layer, group, V5E, 0.5)
    assert cost.between == received_bytes(gathered, 2) > 0


@pytest.mark.parametrize("kernel", (Exact(), Blockwise()), ids=("exact", "blockwise"))
@pytest.mark.usefixtures("optimised")
def test_bytes_by_kernel(kernel):
    """Exact attention sends 12 query and 3 KV heads as 16 and 4 to 4 devices, others 12 and 12."""
    shapes = layer_of(12, 3).shapes
    arrays = [jnp.ones(x, jnp.float32) for x in shapes]
    attend = partial(dot_product_attention, kernel=kernel)
    sent: Any = {"itemsize": 4, "kernel": kernel}
    text = compiled(partial(attend, layout=ONE_AXIS[4].on()), *arrays)
    assert Ulysses().traffic(*shapes, degree=4, **sent) == received_bytes(text, 4)
    strategy = Hybrid(AllGatherKV())
    text = compiled(partial(attend, layout=TWO_AXES.on(), strategy=strategy), *arrays)
    exchanged = "\n".join(x for x in text.splitlines() if "all-gather" not in x)
    _, inner = strategy.traffic_by_axis(*shapes, degree=(2, 4), **sent)
    assert inner == received_bytes(exchanged, 4)


@pytest.mark.parametrize("kernel", (Exact(), Blockwise()), ids=("exact", "blockwise"))
@pytest.mark.parametrize("block", (8, 256))
@pytest.mark.usefixtures("optimised")
def test_traffic_of_a_ring_by_kernel(kernel, block, monkeypatch):
    """Four turns of exact attention; blocks that are larger than a device's part are dealt anew."""
    monkeypatch.setattr(arithmetic, "BLOCK", block)
    shapes = layer_of(8, 2).shapes
    arrays = [jnp.ones(x, jnp.float32) for x in shapes]
    attend = partial(dot_product_attention, strategy=Ring(), layout=ONE_AXIS[4].on(), kernel=kernel)
    sent = Ring().traffic(*shapes, degree=4, itemsize=4, kernel=kernel)
    assert sent == permuted_bytes(attend, *arrays) > 0


@pytest.mark.parametrize(("kernel", "block"), ((Exact(), 8), (Exact(), 256), (Blockwise(), 256)))
@pytest.mark.usefixtures("optimised")
def test_traffic_of_an_all_gather_by_kernel(kernel, block, monkeypatch):
    """Exact attention has the queries of blocks that are larger than a device's part dealt anew,
    and the output dealt back."""
    monkeypatch.setattr(arithmetic, "BLOCK", block)
    shapes, options = layer_of(8, 2).shapes, {"strategy": AllGatherKV(), "kernel": kernel}
    arrays = [jnp.ones(x, jnp.float32) for x in shapes]
    text = compiled(partial(dot_product_attention, layout=ONE_AXIS[4].on(), **options), *arrays)
    dealt = sum(x.nbytes for x in transfers(text) if x.kind == "collective-permute")
    assert (dealt > 0) == (block > 16 and kernel == Exact())
    sent = AllGatherKV().traffic(*shapes, degree=4, itemsize=4, kernel=kernel)
    assert sent == received_bytes(text, 4) + dealt


@pytest.mark.parametrize("order", (Zigzag(), Striped()), ids=str)
@pytest.mark.parametrize("gradients", (False, True), ids=("forward", "gradients"))
def test_a_ring_counts_the_turns_of_exact_attention(gradients, order, monkeypatch):
    """Predicted bytes include all turns of the ring, and tokens that an order moves into blocks."""
    monkeypatch.setattr(arithmetic, "BLOCK", 8)
    layer = replace(layer_of(8, 2, gradients=gradients), order=order, kernel=Exact())
    arrays = [jnp.ones(x, jnp.float32) for x in (layer.query, layer.key, layer.value, layer.query)]
    where = replace(ONE_AXIS[4].on(), order=order)
    attend = partial(dot_product_attention, strategy=Ring(), layout=where, kernel=Exact())
    run = output_and_gradients(attend) if gradients else attend
    counted = permuted_bytes(run, *arrays[: 4 if gradients else 3])
    assert cost_of(Ring(), layer, Group((4,), (4,)), V5E, 0.5).inside == counted


@pytest.mark.parametrize(
    ("strategy", "group", "heads"),
    (
        (AllGatherKV(), Group((4,), (4,)), (4, 2)),
        slow(AllGatherKV(), Group((2,), (2,)), (4, 2)),
        slow(AllGatherKV(), Group((8,), (8,)), (8, 4)),
        (Ulysses(), Group((8,), (8,)), (8, 2)),
        slow(Ulysses(), Group((8,), (8,)), (8, 1)),
        slow(Hybrid(AllGatherKV()), Group((2, 4), (2, 4)), (8, 2)),
    ),
    ids=str,
)
@pytest.mark.usefixtures("optimised")
def test_gradients_of_shared_heads_of_exact_attention(strategy, group, heads, monkeypatch):
    """Anchors and slices of what several devices add up are most of what they receive.

    In loops over the heads of a device, which a compiled program has once.
    """
    monkeypatch.setattr(arithmetic, "BLOCK", 8)
    layer = replace(layer_of(*heads, gradients=True), kernel=Exact())
    arrays = [jnp.ones(x, jnp.float32) for x in (layer.query, layer.key, layer.value, layer.query)]
    case = TWO_AXES if isinstance(strategy, Hybrid) else ONE_AXIS[group.degree]
    attend = partial(
        dot_product_attention, strategy=strategy, layout=case.on(), kernel=Exact(), is_causal=True
    )
    run = jax.jit(output_and_gradients(attend))
    received = 0.0
    own_heads = layer.key[2] if strategy == AllGatherKV() else 1
    for x in transfers(compiled(run, *arrays)):
        n = max(map(len, x.groups), default=group.degree)
        of_result = {"reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n}
        times = layer.key[0] * own_heads if x.in_loop else 1
        received += times * x.nbytes * of_result.get(x.kind, (n - 1) / n)
    cost = cost_of(strategy, layer, group, V5E, 0.5)
    assert cost.inside + cost.between == received
    assert received > 3 * cost_of(strategy, replace(layer, gradients=False), group, V5E, 0.5).inside
    # What the planner counts in the traced program, loops multiplied out.
    counted = count(run.trace(*arrays).jaxpr, case.mesh().shape)
    assert sum(x.received for x in counted.sent) == received


@pytest.mark.parametrize("tokens", ((0, 0), (0, 64), (64, 0)), ids=str)
@pytest.mark.parametrize("kernel", (Exact(), Blockwise()), ids=("exact", "blockwise"))
def test_nothing_to_attend_to(kernel, tokens):
    """A ring sends nothing then, and nobody anything where there is nothing at all."""
    q, k = (shape(1, n, 8, 64, dtype=jnp.float32) for n in tokens)
    sent: Any = {"itemsize": 4, "kernel": kernel}
    # Of a token's heads in float32: query and output, or key and value.
    each = sum(tokens) * 2 * 8 * 64 * 4
    for strategy, degree, expected in (
        (Ulysses(), 8, each // 8 * 7 // 8),
        # Exact attention has these queries, less than a block, all on one device.
        (AllGatherKV(), 8, each * 7 // 8 if tokens[1] or kernel == Exact() else 0),
        (Ring(), 8, 0),
        (Hybrid(), (2, 4), each // 8 * 3 // 4),
    ):
        traffic = strategy.traffic(q.shape, k.shape, k.shape, degree=degree, **sent)
        assert strategy.memory(q.shape, k.shape, k.shape, degree=degree, **sent) >= 0
        assert traffic == expected
    found = choose_strategy(q, k, k, layout=on(8), kernel=kernel, chip=V5E)
    assert all(x.cost.attention == 0 for x in found.candidates if x.cost)


@pytest.mark.parametrize("window", (5, 16, 17, 40))
def test_a_ring_counts_the_rounds_that_a_window_needs(window):
    mask = Mask(is_causal=True, local_window_size=(window, 0))
    layer = layer_of(8, 2, mask=mask)
    q, k, v = (jnp.ones(x, jnp.float32) for x in (layer.query, layer.key, layer.value))
    attend = partial(dot_product_attention, strategy=Ring(), layout=ONE_AXIS[4].on(), mask=mask)
    assert cost_of(Ring(), layer, Group((4,), (4,)), V5E, 0.5).inside == permuted_bytes(
        attend, q, k, v
    )


def test_slow_links():
    """Two slices of eight: of fifteen others that a device hears from, eight are far."""
    layer = layer_of(16, 16, tokens=128)
    alone, apart = Group((16,), (16,)), Group((16,), (8,))
    for strategy in (Ulysses(), AllGatherKV()):
        near = cost_of(strategy, layer, alone, V5E, 0.5)
        far = cost_of(strategy, layer, apart, V5E, 0.5)
        assert near.between == 0
        assert far.between == near.inside * 8 // 15
        assert far.inside + far.between == near.inside
    # Of a ring one device hears everything from the other slice, and all wait for it.
    ring = cost_of(Ring(), layer, apart, V5E, 0.5)
    assert (ring.inside, ring.between) == (0, cost_of(Ring(), layer, alone, V5E, 0.5).inside)
    hybrid = cost_of(Hybrid(), layer, Group((2, 8), (1, 8)), V5E, 0.5)
    assert 0 < hybrid.between < ring.between
    assert hybrid.seconds < min(ring.seconds, far.seconds)


# ---------------------------------------------------------------- work


@pytest.mark.parametrize("order", (Contiguous(), Zigzag(), Striped()), ids=str)
@pytest.mark.parametrize(
    "given", ({"is_causal": True}, {"local_window_size": (9, 4)}, {"query_offset": 5}), ids=str
)
def test_pairs_are_those_that_attend(order, given):
    mask = Mask(**given)
    allowed = attends(64, 64, **given)
    allowed = np.ones((64, 64), bool) if allowed is None else np.asarray(allowed)
    allowed = np.broadcast_to(allowed, (1, 1, 64, 64))[0, 0]
    places = order.permutation(64, 4).reshape(4, 16)
    expected = [[allowed[np.ix_(a, b)].sum() for b in places] for a in places]
    np.testing.assert_array_equal(pairs(mask, order, 64, 64, 4), expected)


def test_pairs_are_counted_once():
    """Pairs are counted once for all candidates and for later choices, as of eager "auto" calls."""
    q, k = shape(1, 1 << 10, 8, 16), shape(1, 1 << 10, 8, 16)
    for layout, counts in ((on(8), 1), (replace(TWO_AXES.on(), order=Zigzag()), 2)):
        pairs.cache_clear()
        for _ in range(3):
            mask = Mask(is_causal=True, segment_ids=jnp.zeros((1, 1 << 10), jnp.int32))
            choose_strategy(q, k, k, layout=layout, kernel=Blockwise(), mask=mask)
        # Hybrids count groups of devices once more.
        assert pairs.cache_info().misses == counts
    # Another window is another count.
    one, other = (
        choose_strategy(q, k, k, layout=on(8), kernel=Blockwise(), local_window_size=w).candidates
        for w in (5, 200)
    )
    assert one[0].cost is not None
    assert other[0].cost is not None
    assert one[0].cost.attention < other[0].cost.attention


def test_a_causal_mask_in_order_is_twice_the_work_for_the_last_device():
    q, k = shape(1, 1 << 17, 32, 128), shape(1, 1 << 17, 8, 128)
    costs = {}
    for order in (Contiguous(), Zigzag()):
        layout = on(16, order=order)
        found = choose_strategy(
            q, k, k, layout=layout, chip=V5E, kernel=Blockwise(), is_causal=True
        )
        costs[order] = {x.strategy: x.cost for x in found.candidates}
    for strategy in (Ring(), AllGatherKV()):
        slow, fast = (costs[order][strategy].attention for order in costs)
        assert 1.85 < slow / fast < 2
    assert costs[Contiguous()][Ulysses()] == costs[Zigzag()][Ulysses()]


# ---------------------------------------------------------------- the choice


def test_few_kv_heads():
    """An all-gather on 16 chips, forward, sends less than Ulysses where K P < N + K'."""
    for N, K in ((64, 1), (128, 4), (32, 4), (32, 8)):
        q, k = shape(1, 1 << 14, N, 128), shape(1, 1 << 14, K, 128)
        found = chosen(q, k, 16, is_causal=True, gradients=False)
        costs = {type(x.strategy): x.cost for x in found.candidates}
        less = costs[AllGatherKV].inside < costs[Ulysses].inside
        assert less == (N + max(K, 16) > K * 16), (N, K)
        # A ring sends as much as the all-gather, and hides it where there is work enough.
        assert costs[Ring].inside == costs[AllGatherKV].inside
        assert isinstance(found.strategy, Ring) == (costs[Ring].waiting < costs[Ulysses].waiting)


def test_a_window_of_4096_in_a_million_tokens():
    q, k = shape(1, 1 << 20, 32, 128), shape(1, 1 << 20, 8, 128)
    window = {"is_causal": True, "local_window_size": (4095, 0)}
    found = chosen(q, k, 16, options={}, **window)
    assert found.strategy == Ring()
    ring, ulysses = (
        next(x.cost for x in found.candidates if x.strategy == s) for s in (Ring(), Ulysses())
    )
    assert ring.inside < ulysses.inside / 2
    assert ring.waiting < ulysses.waiting / 10
    assert "Ring() takes" in found.reason
    assert "Ulysses(head_chunks=1, overlap=True)" in found.reason
    assert "with more waiting" in found.reason
    # The table has a line for each.
    lines = str(found).splitlines()
    assert [x.split()[0] for x in lines[1:4]] == [
        "Ring()", "Ulysses(head_chunks=1,", "AllGatherKV()"
    ]  # fmt: skip
    assert lines[-1].startswith("v5e: Ring() takes")


@pytest.mark.parametrize(("degree", "both"), ((1, False), (2, False), (3, True), (8, True)))
def test_a_ring_both_ways_has_two_neighbours(degree, both):
    """A ring of both ways is that of one way on fewer than three devices, and no candidate."""
    q = shape(1, 240, 8, 128)
    options: Any = {"layout": on(degree), "chip": CHIPS["TPU v5 lite"], "kernel": Blockwise()}
    found = {x.strategy for x in choose_strategy(q, q, q, **options).candidates}
    assert (Ring(bidirectional=True) in found) == both
    assert Ring() in found


def test_a_ring_both_ways_where_transfers_take_longer_than_attention():
    """With 16 chips it waits for 8 transfers in place of 15, and else takes as long."""
    v5e, h100 = CHIPS["TPU v5 lite"], CHIPS["NVIDIA H100"]
    options: Any = {"layout": on(16, order=Zigzag()), "is_causal": True, "gradients": False}
    for tokens, ratio, chip in ((1 << 12, 8 / 15, v5e), (1 << 17, 1, v5e), (1 << 12, 1, h100)):
        q, k = shape(1, tokens, 32, 128), shape(1, tokens, 32, 128)
        found = choose_strategy(q, k, k, chip=chip, kernel=Fused("tpu"), **options)
        costs: Any = {x.strategy: x.cost for x in found.candidates}
        order = [x for x in costs if isinstance(x, Ring)]
        if chip == h100:  # what arrives from both sides shares a link
            assert order == [Ring()]
            continue
        one, both = costs[Ring()], costs[Ring(bidirectional=True)]
        assert both.inside == one.inside
        assert both.seconds == pytest.approx(ratio * one.seconds, rel=0.02)
        assert order[0] == Ring(bidirectional=ratio < 1)
        assert both.memory > one.memory


def test_two_slices(monkeypatch):
    """Sixteen query heads on two groups of four: little may cross."""
    monkeypatch.setattr(choice_module, "_place", lambda device: device.id // 4)
    q, k = shape(1, 1 << 16, 16, 128), shape(1, 1 << 16, 16, 128)
    options = {"kernel": Blockwise(), "chip": V5E, "is_causal": True}
    layout = replace(TWO_AXES.on(), order=Zigzag())
    found = choose_strategy(q, k, k, layout=layout, **options)
    assert isinstance(found.strategy, Hybrid)
    assert "crosses" not in found.reason
    alone = choose_strategy(q, k, k, layout=replace(ONE_AXIS[8].on(), order=Zigzag()), **options)
    assert "crosses slices or hosts: 4 of its 8 devices are of one" in alone.reason
    best, other = (x.candidates[0].cost for x in (found, alone))
    assert best is not None
    assert other is not None
    assert best.seconds < other.seconds


def test_the_fast_axis_named_first(monkeypatch):
    """The last axis of a Hybrid should be within a slice: the hint says so, and why."""
    q = shape(1, 1 << 10, 16, 64)
    options: Any = {"kernel": Blockwise(), "chip": V5E}
    for near, crosses in ((2, False), (1, True)):
        # Of devices 0 to 7 in rows of four: slices of rows, and of columns.
        places = {2: lambda device: device.id // 4, 1: lambda device: device.id % 4}
        monkeypatch.setattr(choice_module, "_place", places[near])
        reason = choose_strategy(q, q, q, layout=TWO_AXES.on(), **options).reason
        assert ("last token axis crosses slices or hosts: 1 of its 4 devices" in reason) == crosses
        assert ("name an axis within one last" in reason) == crosses


@pytest.mark.parametrize(
    ("device", "place"),
    (
        ({"platform": "tpu", "slice_index": 1, "process_index": 3}, ("slice", 1)),
        ({"platform": "tpu", "slice_index": None, "process_index": 3}, ("slice", 0)),
        ({"platform": "gpu", "slice_index": None, "process_index": 3}, ("host", 3)),
        ({"platform": "gpu", "process_index": 2}, ("host", 2)),
    ),
    ids=("slices", "one slice", "a GPU", "no slices"),
)
def test_where_a_device_is(device, place):
    assert choice_module._place(SimpleNamespace(**device)) == place


UNABLE = {
    "a ring of dense attention": (Ring(), {"kernel": Dense()}, Ulysses()),
    "a ring of a function": (Ring(), {"kernel": lambda q, k, v: q}, Ulysses()),
    "an all-gather for a function": (AllGatherKV(), {"kernel": lambda q, k, v: q}, Ulysses()),
    "a hybrid on one axis": (Hybrid(), {}, Ulysses()),
}


@pytest.mark.parametrize(("strategy", "options", "instead"), UNABLE.values(), ids=UNABLE)
def test_a_strategy_that_cannot_names_one_that_can(strategy, options, instead):
    """The strategy that the message names runs."""
    where = TWO_AXES if "kernel" in options and isinstance(strategy, Hybrid) else ONE_AXIS[4]
    x = jnp.ones((1, 32, 8, 8), jnp.float32)
    attend = partial(dot_product_attention, x, x, x, layout=where.on(), **options)
    with pytest.raises(ValueError, match=r"Write .*strategy=jax_seqpar\.Ulysses\(\)"):
        attend(strategy=strategy)
    assert jax.eval_shape(partial(attend, strategy=instead)).shape == x.shape


def test_more_devices_than_heads():
    """More devices than heads raise nothing: Ulysses adds heads, so another strategy is first."""
    q, k = shape(1, 1 << 16, 4, 128), shape(1, 1 << 16, 4, 128)
    found = chosen(q, k, 16, is_causal=True)
    costs = {type(x.strategy): x.cost for x in found.candidates}
    assert found.strategy != Ulysses()
    assert costs[Ulysses].attention == pytest.approx(4 * costs[Ring].attention, rel=0.1)


def test_what_cannot_be_taken_says_why():
    q, k = shape(1, 64, 8, 16, dtype=jnp.float32), shape(1, 64, 4, 16, dtype=jnp.float32)
    found = choose_strategy(q, k, k, layout=on(4), kernel=Dense())
    assert {type(x.strategy): x.why_not for x in found.candidates} == {
        Ulysses: None,
        AllGatherKV: None,
        Ring: "Dense() does not attend to a part of the keys",
    }
    found = choose_strategy(q, k, k, layout=on(4), kernel=Fused(interpret=True))
    able = {(x.strategy, x.kernel) for x in found.candidates if x.cost}
    assert able == {(Ulysses(), "splash"), (Ring(), "splash")}
    assert "a part of the queries with all keys is not supported by splash" in str(found)


def test_heads_of_exact_attention_are_counted_as_they_are_sent():
    """Each of 8 devices has 8 of 40 query heads on 5 KV heads, as no KV head is split."""
    q, k = shape(1, 1 << 14, 40, 128), shape(1, 1 << 15, 5, 128)
    options = {"is_causal": True, "mask": Mask(query_offset=1 << 14), "chip": V5E}
    exact, other = (
        choose_strategy(q, k, k, layout=on(8), kernel=kernel, **options)
        for kernel in (Exact(), Blockwise())
    )
    costs: list[Any] = [
        next(x.cost for x in found.candidates if x.strategy == Ulysses())
        for found in (exact, other)
    ]
    assert costs[0].attention / costs[1].attention == pytest.approx(8 / 5)
    assert costs[0].inside < costs[1].inside  # no copies of KV heads
    assert exact.strategy == AllGatherKV()


def test_the_table_of_costs(capsys):
    strategy_costs.main(tokens=1 << 12)
    rows = [x.split() for x in capsys.readouterr().out.splitlines() if x.split()]
    assert rows[0][:4] == ["K", "P", "Ring", "Ulysses"]
    assert [x[:2] for x in rows[2:]] == [
        [kv_heads, degree]
        for kv_heads in ("1", "4", "8", "16")
        for degree in ("2", "4", "8", "16", "32", "64")
    ]


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_the_call_would_refuse_is_refused():
    q, k = shape(1, 64, 8, 16), shape(1, 64, 4, 16)
    with pytest.raises(TypeError, match=r"choose_strategy\(\) got an unexpected .*'causal'\. Use"):
        choose_strategy(q, k, k, layout=on(4), causal=True)
    with pytest.raises(ValueError, match=r"query heads N = 8 must be a multiple"):
        choose_strategy(q, shape(1, 64, 3, 16), shape(1, 64, 3, 16), layout=on(4))
    with pytest.raises(ValueError, match=r"bias must broadcast|bias"):
        choose_strategy(q, k, k, layout=on(4), bias=shape(3, 3))
    with pytest.raises(ValueError, match=r"60 tokens"):
        choose_strategy(*[shape(1, 60, 4, 16)] * 3, layout=on(4, order=Zigzag()))


def test_a_residual_takes_the_kernel_of_the_platform_away():
    """A residual, which splash lacks, leaves strategies that all have the blockwise kernel."""
    device = jax.sharding.AbstractDevice("TPU v5p", num_cores=1, platform="tpu")
    mesh = AbstractMesh((8,), ("seq",), abstract_device=device)
    q, k = shape(1, 1 << 17, 32, 128), shape(1, 1 << 17, 8, 128)
    layout = MeshLayout(mesh=mesh, order=Zigzag())
    for asked, kernel in ((False, "splash"), (True, "blockwise")):
        found = choose_strategy(q, k, k, layout=layout, is_causal=True, return_residual=asked)
        assert found.chip.name == "v5p"
        assert {x.strategy: x.kernel for x in found.candidates}[Ulysses()] == kernel


@pytest.mark.parametrize(
    ("kind", "name"),
    (("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
     ("NVIDIA H100 80GB HBM3", "H100"), ("cpu", "unknown chip")),
)  # fmt: skip
def test_chips_by_their_kind(kind, name):
    device = jax.sharding.AbstractDevice(kind, num_cores=1, platform="tpu")
    assert chip_of(AbstractMesh((8,), ("seq",), abstract_device=device)).name == name


@pytest.mark.usefixtures("unchecked_shapes")
def test_where_there_is_nothing_to_choose():
    x = shape(1, 64, 8, 16)
    with pytest.raises(ValueError, match=r"shards no tokens, so there is no strategy to choose"):
        choose_strategy(x, x, x, layout=on(4, tokens=None))
    with pytest.raises(ValueError, match=r"inside of a Chip must be positive, got 0\. Write"):
        Chip("none", 1e12, 0, 1e9)


@pytest.mark.parametrize("where", (ONE_AXIS[4], TWO_AXES), ids=("one axis", "two axes"))
def test_auto_is_the_chosen_one(where):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 32, n, 8)), jnp.float32) for n in (8, 1, 1))
    attend = partial(dot_product_attention, layout=where.on(), is_causal=True)
    best = choose_strategy(q, k, v, layout=where.on(), is_causal=True).strategy
    assert best != Ulysses()
    out = attend(q, k, v, strategy="auto")
    assert compare_bits(out, attend(q, k, v, strategy=best)).equal
    alone = dot_product_attention(q, k, v, strategy="auto", layout=replace(where.on(), tokens=None))
    np.testing.assert_allclose(
        dot_product_attention(q, k, v, strategy="auto", layout=where.on()), alone, atol=2e-6
    )
