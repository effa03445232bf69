"""A sequence that crosses hosts or slices without need is named, and the better mesh written."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_seqpar import MeshLayout, device_order, dot_product_attention
from jax_seqpar.device_order import place_of, slow_order
from jax_seqpar.training import TokenLayout

BY_FOUR = [0, 0, 0, 0, 1, 1, 1, 1]
BY_TWO = [0, 0, 1, 1, 2, 2, 3, 3]
SEQ, BATCH = MeshLayout(), MeshLayout(batch="data")
HYBRID = MeshLayout(("ring", "heads"))


@dataclass(frozen=True)
class Device:
    """Stand-in for a device, with the attributes that a mesh and its device order read."""

    id: int
    process_index: int
    platform: str
    slice_index: int | None
    client: Any = None


def mesh_of(hosts: list[int], sizes: dict[str, int], platform: str = "gpu") -> Mesh:
    """A mesh of devices that are not there: `hosts` tells the process, or the slice, of each."""
    devices = np.empty(len(hosts), object)
    for i, host in enumerate(hosts):
        devices[i] = Device(i, host, platform, host if platform == "tpu" else None)
    return Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


GOOD = {
    "one host": (SEQ, [0] * 8, {"seq": 8}),
    "two hosts, both needed": (SEQ, BY_FOUR, {"seq": 8}),
    "four hosts, all needed": (SEQ, BY_TWO, {"seq": 8}),
    "each sequence within a host": (BATCH, BY_FOUR, {"data": 2, "seq": 4}),
    "two sequences in a host": (BATCH, BY_FOUR, {"data": 4, "seq": 2}),
    "each sequence on two hosts": (BATCH, BY_TWO, {"data": 2, "seq": 4}),
    "a process for each device": (BATCH, [*range(8)], {"seq": 4, "data": 2}),
    "heads of a hybrid within a host": (HYBRID, BY_FOUR, {"ring": 2, "heads": 4}),
    "tokens on no axis": (MeshLayout(None, "data"), BY_FOUR, {"data": 8}),
    "tokens on one device": (BATCH, BY_FOUR, {"data": 8, "seq": 1}),
}
BAD = {
    "the sequence axis first": (
        (BATCH, BY_FOUR, {"seq": 4, "data": 2}),
        r"'seq' of the tokens crosses 2 slices or hosts \(host 0, host 1\), where 1 would hold",
        {"data": 2, "seq": 4},
    ),
    "a host for each device of a sequence": (
        (BATCH, BY_TWO, {"seq": 4, "data": 2}),
        r"crosses 4 slices or hosts \(host 0, host 1, host 2, host 3\), where 2 would hold",
        {"data": 2, "seq": 4},
    ),
    "hosts in turns": (
        (SEQ, [0, 1] * 4, {"seq": 8}),
        r"crosses 2 slices or hosts \(host 0, host 1\), 7 times, where 1 would do",
        None,
    ),
    "heads of a hybrid between hosts": (
        (HYBRID, BY_FOUR, {"heads": 2, "ring": 4}),
        r"'ringxheads' of the tokens crosses 2 .* 7 times, where 1 would do",
        {"ring": 4, "heads": 2},
    ),
}


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("platform", ("gpu", "tpu"))
def test_no_word_where_no_order_is_better(case, platform):
    layout, hosts, sizes = case
    assert slow_order(layout, mesh_of(hosts, sizes, platform)) is None


@pytest.mark.parametrize(("case", "message", "better"), BAD.values(), ids=BAD)
def test_a_crossing_without_need_is_named_and_the_advice_helps(case, message, better):
    layout, hosts, sizes = case
    found = slow_order(layout, mesh_of(hosts, sizes))
    assert found is not None
    assert re.search(message, found), found
    on_tpu = slow_order(layout, mesh_of(hosts, sizes, "tpu"))
    assert on_tpu == re.sub(r"host (\d)", r"slice \1", found)
    if better is not None:
        assert f"jax.make_mesh({tuple(better.values())}, {tuple(better)})" in found
        assert slow_order(layout, mesh_of(hosts, better)) is None


def test_a_tpu_of_one_slice_has_no_slow_links():
    """Hosts of one TPU slice share the fast network of the chips."""
    assert place_of(Device(0, process_index=3, platform="tpu", slice_index=None)) == ("slice", 0)


def test_batches_and_attention_warn(monkeypatch):
    """Batches and attention warn, on simulated devices of which four stand for a host each."""
    monkeypatch.setattr(device_order, "place_of", lambda device: ("host", device.id // 4))
    bad = jax.make_mesh((4, 2), ("seq", "data"))
    good = jax.make_mesh((2, 4), ("data", "seq"))
    x = jnp.ones((2, 8, 4, 4))
    for warns, mesh in ((True, bad), (False, good)):
        assert isinstance(mesh, Mesh)
        layout = BATCH.on(mesh)
        for call in (
            lambda layout=layout: TokenLayout(layout),
            lambda layout=layout: jax.eval_shape(
                lambda q: dot_product_attention(q, q, q, layout=layout), x
            ),
        ):
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                call()
            assert ["crosses 2 slices or hosts" in str(w.message) for w in found] == [True] * warns
