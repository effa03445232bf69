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
import torch_ref.exact.arithmetic
from cases import MeshCase, is_array, slow
from exact_cases import CROSS, NAMES, Cross, torch_exact
from features import in_order, in_sequence, run_jax
from jax.sharding import AxisType
from questions import compiled, output_and_gradients, permuted_bytes

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
from jax_seqpar.exact import arithmetic
from jax_seqpar.parity.inputs import adversarial
from jax_seqpar.plan import collectives
from jax_seqpar.plan import temporaries as temporaries_of
from jax_seqpar.strategies import ring, whole_blocks
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
    # Every feature at once, in every order and at every degree; blocks that no order deals whole.
    "2, everything": (Where((2,), Zigzag(), block=5), CASE, EVERYTHING),
    "4, everything": (Where((4,), Striped(), block=3), CASE, EVERYTHING),
    "8, everything": (Where((8,), Contiguous(), block=7), CASE, EVERYTHING),
    "8, everything, by positions": slow(Where((8,), Zigzag(), block=4), CASE, {}),
    # Blocks that are whole where they are, and rounds that are left out.
    "3, a window": (
        Where((3,), Contiguous(), block=8, kind=AxisType.Explicit),
        replace(CASE, T=48, S=48),
        WINDOW,
    ),
    # How far documents reach is found at run time.
    "2 x 4, documents": (
        Where((2, 4), Zigzag(), block=4, **BESIDE_DATA),
        SAME_LENGTH,
        SEGMENTS,
    ),
    # Two KV heads on four devices of a group: copies of a KV head, and parts of its keys.
    "2 x 4, a hybrid": (
        Where((2, 4), Striped(), Hybrid(Ring(), Ulysses()), block=3, **GROUPS),
        replace(SAME_LENGTH, N=8),
        CAUSAL,
    ),
    "4 x 2, a hybrid": slow(
        Where((4, 2), Contiguous(), Hybrid(Ring(), Ulysses()), **GROUPS), SAME_LENGTH, CAUSAL
    ),
    "2, blocks of 256": slow(Where((2,), Zigzag()), Cross(B=1, T=600, S=600, N=2, K=1), CAUSAL),
    # All the keys, and a part of the queries.
    "4, all-gather": (Where((4,), Striped(), AllGatherKV(), block=3), CASE, EVERYTHING),
    "8, all-gather": (Where((8,), Zigzag(), AllGatherKV(), block=7), CASE, EVERYTHING),
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
