"""Exact attention in a ring, and in every order of the tokens: the bits of one device.

Those of the PyTorch reference, which is written apart and knows no devices.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MeshCase, slow
from exact_cases import NAMES, Cross, torch_exact
from features import in_order, in_sequence, run_jax
from jax.sharding import AxisType
from questions import compiled, output_and_gradients, permuted_bytes

import torch_ref.exact.arithmetic
from jax_seqpar import (
    AllGatherKV,
    Contiguous,
    Exact,
    Hybrid,
    MeshLayout,
    Ring,
    Striped,
    TokenOrder,
    Ulysses,
    Zigzag,
    dot_product_attention,
)
from jax_seqpar.compare import compare_bits
from jax_seqpar.exact import arithmetic, forward_in_turns
from jax_seqpar.parity.inputs import adversarial
from jax_seqpar.plan import collectives
from jax_seqpar.plan import temporaries as temporaries_of
from jax_seqpar.strategies import hops, ring, whole_blocks
from jax_seqpar.strategies.whole_blocks import Deal

pytestmark = [
    pytest.mark.usefixtures("less_optimised", "one_torch_thread"),
    pytest.mark.timeout(300),
]

CASE = Cross(T=16, S=32)


@dataclass(frozen=True)
class Where:
    """A mesh, a strategy on it, and the tokens that share one unit in the gradients."""

    shape: tuple[int, ...]
    order: TokenOrder
    strategy: Any = Ring()
    axes: tuple[str, ...] = ("seq",)
    layout: MeshLayout = field(default_factory=MeshLayout)
    block: int = 256
    kind: AxisType = AxisType.Auto

    @property
    def mesh(self) -> MeshCase:
        return MeshCase(self.shape, self.axes, replace(self.layout, order=self.order))

    def attend(self, **options: Any) -> Any:
        asked = {"kernel": Exact(), "strategy": self.strategy} | options
        return partial(dot_product_attention, layout=self.mesh.on(self.kind), **asked)


def differing(where: Where, given: dict[str, Any], inputs: dict[str, np.ndarray], patch: Any):
    """Elements of output and gradients whose bits are not those of one device, by name."""
    for module in (arithmetic, torch_ref.exact.arithmetic):
        patch.setattr(module, "BLOCK", where.block)
    degree = where.mesh.degree
    dealt, operands = in_order(where.order, degree, given, list(inputs.values()))
    got = run_jax(where.attend(), dealt, "exact", operands)
    got = in_sequence(where.order, degree, got)
    expected = torch_exact(inputs, **given)
    assert all(len(np.unique(x)) > 9 for x in expected.values())
    return {
        ours: compare_bits(np.asarray(got[ours]), expected[name]).differing
        for ours, name in zip(("out", "dq", "dk", "dv"), NAMES, strict=True)
    }


BOTH_WAYS = Ring(bidirectional=True)
SAME = {"out": 0, "dq": 0, "dk": 0, "dv": 0}
GROUPS = {"axes": ("outer", "inner"), "layout": MeshLayout(tokens=("outer", "inner"))}
BESIDE_DATA = {"axes": ("data", "seq"), "layout": MeshLayout(batch="data")}
CAUSAL = {"is_causal": True}
WINDOW = {"is_causal": True, "local_window_size": (5, 0)}
SEGMENTS = {
    "is_causal": True,
    "segment_ids": np.sort(np.random.default_rng(0).integers(0, 4, (2, 32)), 1).astype(np.int32),
}
EVERYTHING = CASE.all_at_once(by_positions=False)
SAME_LENGTH = replace(CASE, T=32)
PLACES: dict[str, Any] = {
    # Every feature at once, in every order and at every degree, one of them unless slow tests are
    # asked for; blocks that no order deals whole.
    "2, everything": slow(Where((2,), Zigzag(), block=5), CASE, EVERYTHING),
    "4, everything": slow(Where((4,), Striped(), block=3), CASE, EVERYTHING),
    "8, everything, both ways": (Where((8,), Contiguous(), BOTH_WAYS, block=7), CASE, EVERYTHING),
    "8, everything, by positions": slow(Where((8,), Zigzag(), block=4), CASE, {}),
    # Blocks that are whole where they are, and rounds that are left out.
    "3, a window": (
        Where((3,), Contiguous(), block=8, kind=AxisType.Explicit),
        replace(CASE, T=48, S=48),
        WINDOW,
    ),
    # How far documents reach is found at run time.
    "2 x 4, documents, both ways": slow(
        Where((2, 4), Zigzag(), BOTH_WAYS, block=4, **BESIDE_DATA),
        SAME_LENGTH,
        SEGMENTS,
    ),
    # Two KV heads on four devices of a group: copies of a KV head, and parts of its keys.
    "2 x 4, a hybrid": (
        Where((2, 4), Striped(), Hybrid(Ring(), Ulysses()), block=3, **GROUPS),
        replace(SAME_LENGTH, N=8),
        CAUSAL,
    ),
    # One KV head on both devices of each group, whose anchors vary over the ring alone.
    "4 x 2, a hybrid": slow(
        Where((4, 2), Contiguous(), Hybrid(Ring(), Ulysses()), block=8, **GROUPS),
        replace(SAME_LENGTH, B=1, N=2, K=1),
        CAUSAL,
    ),
    "2, blocks of 256": slow(Where((2,), Zigzag()), Cross(B=1, T=600, S=600, N=2, K=1), CAUSAL),
    # All the keys, and a part of the queries.
    "4, all-gather": (Where((4,), Striped(), AllGatherKV(), block=3), CASE, EVERYTHING),
    "8, all-gather": slow(Where((8,), Zigzag(), AllGatherKV(), block=7), CASE, EVERYTHING),
    "2 x 4, a hybrid of all-gathers": (
        Where((2, 4), Zigzag(), Hybrid(AllGatherKV(), Ulysses()), block=4, **GROUPS),
        SAME_LENGTH,
        CAUSAL,
    ),
}
PLACES["8, everything, by positions"].values[2].update(CASE.all_at_once(by_positions=True))


@pytest.mark.parametrize(("where", "case", "given"), PLACES.values(), ids=PLACES)
def test_the_bits_of_one_device(where, case, given, monkeypatch):
    assert differing(where, given, case.inputs(), monkeypatch) == SAME


def test_special_numbers_on_their_way(monkeypatch):
    """NaN, infinity, subnormals and zeros of both signs, in 16 bits."""
    inputs = adversarial(replace(CASE, B=1, T=32, V=5, dtype="bfloat16").inputs())
    assert differing(Where((4,), Zigzag(), block=5), CAUSAL, inputs, monkeypatch) == SAME


@pytest.mark.usefixtures("unchecked_shapes")
def test_under_vmap_and_with_64_bits():
    """A loop, of which the transfers are a part; and loops that count in int64."""
    q, k, v = (jnp.asarray(x) for x in list(SAME_LENGTH.inputs().values())[:3])
    layout = MeshLayout(check_vma=False)
    attend = Where((4,), Contiguous(), layout=layout).attend(is_causal=True)
    alone = Exact()(q, k, v, is_causal=True)
    assert compare_bits(jax.vmap(attend)(q[:, None], k[:, None], v[:, None])[:, 0], alone).equal
    with jax.enable_x64(True):
        assert compare_bits(jax.jit(attend)(q, k, v), alone).equal


# ---------------------------------------------------------------- wrong rings


def one_device_left_out(patch):
    right = hops.hops
    patch.setattr(hops, "hops", lambda *x: (right(*x)[0] - 1, right(*x)[1]))


def logits_of_the_last_part(patch):
    """Mutation: the largest logit is that of the keys that were visited last."""
    right = forward_in_turns._Queries.turn

    def turn(self, visit, held, values, nothing, meet, *rows):
        last = (lambda a, b: b) if meet is jnp.maximum else meet
        return right(self, visit, held, values, nothing, last, *rows)

    patch.setattr(forward_in_turns._Queries, "turn", turn)


def anchors_of_its_own(patch):
    """Mutation: anchors of the queries of the device that has the keys alone."""
    right = ring.RingPlan.turn

    def turn(self, visit, held, spec, nothing, meet, nothing_added=None, join=jnp.add):
        own = (lambda a, b: b) if join is jnp.maximum else join
        return right(self, visit, held, spec, nothing, meet, nothing_added, own)

    patch.setattr(ring.RingPlan, "turn", turn)


def own_keys_forgotten(patch):
    right = ring.RingPlan.turn

    def turn(self, visit, held, spec, nothing, *rest):
        def others(here, spec):
            found, added = visit(here, spec)
            return (nothing if here is held else found), added

        return right(self, others, held, spec, nothing, *rest)

    patch.setattr(ring.RingPlan, "turn", turn)


def sums_that_stay_away(patch):
    patch.setattr(ring.RingPlan, "send_home", lambda self, tree, distance, direction: tree)


def blocks_in_parts(patch):
    patch.setattr(Exact, "block", 1)


def padding_that_counts(patch):
    """Mutation: tokens that fill the last block count as tokens of the sequence."""
    patch.setattr(ring, "padded", lambda spec, batch, **deals: _padded_alone(spec, batch, deals))


def _padded_alone(spec, batch, deals):
    longer = whole_blocks.padded(spec, batch, **deals)
    lengths = {"query_seq_lengths": None, "key_value_seq_lengths": None}
    return replace(longer, mask=replace(longer.mask, **lengths))


def one_large_gradient():
    """Inputs with a query of no weight on most keys, whose gradient raises their anchors by 2^50.

    The sums of the other queries, far below the anchors, are cut where a float32 shows it.
    """
    inputs = SHORT.inputs()
    inputs["query"][..., 0], inputs["key"][..., 0] = 0, 0
    inputs["query"][:, -1, :, 0], inputs["key"][:, -1, :, 0] = 400, 1
    inputs["grad"][:, -1] *= np.float32(2.0**50)
    return inputs


SHORT = replace(SAME_LENGTH, N=2, K=1)
OTHERS_WRONG = {
    "one device left out": (one_device_left_out, SHORT.inputs, {"out", "dq", "dk", "dv"}),
    "logits of the last part": slow(logits_of_the_last_part, SHORT.inputs, {"out"}),
    "anchors of its own": slow(anchors_of_its_own, one_large_gradient, {"dk", "dv"}),
    "own keys forgotten": slow(own_keys_forgotten, SHORT.inputs, {"out", "dq"}),
    "sums that stay away": slow(sums_that_stay_away, SHORT.inputs, {"dk", "dv"}),
    "blocks in parts": (blocks_in_parts, SHORT.inputs, {"dq", "dk", "dv"}),
    "padding that counts": slow(padding_that_counts, SHORT.inputs, {"out"}),
}


@pytest.mark.parametrize(("wrong", "inputs", "seen"), OTHERS_WRONG.values(), ids=OTHERS_WRONG)
def test_a_wrong_ring_is_caught(wrong, inputs, seen, monkeypatch):
    wrong(monkeypatch)
    found = differing(Where((2,), Striped(), block=5), {}, inputs(), monkeypatch)
    assert seen <= {name for name, count in found.items() if count}


def test_a_large_gradient_of_another_device(monkeypatch):
    inputs = one_large_gradient()
    assert differing(Where((2,), Striped(), block=5), {}, inputs, monkeypatch) == SAME


# ---------------------------------------------------------------- what it sends and holds


def kernel_bytes(degree, gradients):
    """Bytes of one key of a KV head by all turns: those sent in each round, and the sums added to
    them, which come home as well."""
    forward, backward = Exact().turns(CASE.H, CASE.V, 2)
    turns = (*forward, *backward) if gradients else forward
    rounds = degree - 1
    home = [turn.added * (rounds + 1 if rounds > 1 else 1) for turn in turns]
    return sum(turn.sent for turn in turns) * rounds + sum(home)


@pytest.mark.parametrize("degree", (2, 4))
@pytest.mark.usefixtures("optimised")
def test_bytes_and_permutes_are_those_of_the_formula(degree, monkeypatch):
    """Whole blocks, of which none moves."""
    case = replace(SAME_LENGTH, dtype="bfloat16")
    monkeypatch.setattr(arithmetic, "BLOCK", 4)
    attend = Where((degree,), Zigzag()).attend(is_causal=True)
    *operands, grad = map(jnp.asarray, case.inputs().values())
    both = output_and_gradients(attend)
    keys = case.B * case.S * case.K // degree
    assert permuted_bytes(attend, *operands) == keys * kernel_bytes(degree, False)
    assert permuted_bytes(both, *operands, grad) == keys * kernel_bytes(degree, True)
    # Two arrays in each of four turns, a permute before the loop and one in it. Some turns begin
    # with the same, which XLA sends once.
    program = compiled(attend, *operands)
    assert set(collectives(program)) == {"collective-permute"}
    assert collectives(program)["collective-permute"] <= (8 if degree == 2 else 16)
    assert "f32" not in "".join(x for x in program.splitlines() if " collective-permute(" in x)


def test_tokens_that_move_are_counted(monkeypatch):
    """A striped order deals no block whole: queries, keys and values go there, the output back."""
    case, degree = SAME_LENGTH, 4
    monkeypatch.setattr(arithmetic, "BLOCK", 4)
    *operands, _ = map(jnp.asarray, case.inputs().values())
    deal = Deal.in_blocks(Striped(), 4, case.S, degree)
    # Of eight tokens on a device two stay, and two go to each of the others.
    assert [(x.distance, x.source.shape) for x in deal.moves] == [(i, (4, 2)) for i in range(4)]
    moved = case.B * deal.received * (case.N + case.K) * (case.H + case.V) * 4
    attend = Where((degree,), Striped()).attend()
    keys = case.B * case.S * case.K // degree
    forward, _ = Exact().turns(case.H, case.V, 4)
    sent = keys * sum(turn.sent for turn in forward) * (degree - 1)
    assert permuted_bytes(attend, *operands) == sent + moved


def test_nothing_grows_with_the_degree():
    """Memory of a ring is constant: a device's keys and values, those visiting and those sent."""

    def temporaries(degree, strategy):
        shape = jax.ShapeDtypeStruct((1, 256 * degree, 1, 64), jnp.float32)
        attend = Where((degree,), Contiguous(), strategy).attend(is_causal=True)
        return temporaries_of(jax.jit(attend).lower(shape, shape, shape).compile())

    assert temporaries(8, Ring()) <= temporaries(4, Ring()) * 1.05
    assert temporaries(8, AllGatherKV()) > temporaries(4, AllGatherKV()) * 1.3
