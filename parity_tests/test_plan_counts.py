"""Counts of the planner in traced programs, against closed formulas, without a compiler."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_seqpar import Hybrid, Mask, MeshLayout, Ring, Triton, Ulysses
from jax_seqpar.cli.plan_table import host_copies
from jax_seqpar.mask import Tokens
from jax_seqpar.plan import Decoder
from jax_seqpar.plan.answer import Request, answer
from jax_seqpar.plan.count import Counts, count
from jax_seqpar.plan.decoder import shaped
from jax_seqpar.plan.machine import Machine
from jax_seqpar.plan.report import Plan
from jax_seqpar.plan.targets import AttentionLayer, DecoderStep, FromFile, Given, Target

V5E = Machine("v5e:4x4", 1, {"seq": 16})
TOKENS = 1 << 17


def counted(target: Target, machine: Machine = V5E) -> Plan:
    """The plan without a compiler, made in this process."""
    plan = answer(Request(target, machine, compiled=False))
    assert plan.failure is None
    return plan


def counts_of(function: Any, *shapes: Any, machine: Machine = V5E) -> Counts:
    with jax.sharding.use_abstract_mesh(machine.without_devices):
        return count(jax.jit(function).trace(*shapes).jaxpr, machine.mesh)


def test_flops_of_a_train_step():
    """Projections and logits run four times (forward, again, two gradients), attention 2 + 3.5.

    Of the MLP the product down is not computed again. Kernels compute whole blocks on the diagonal.
    """
    decoder = Decoder(TOKENS, layers=2)
    plan = counted(DecoderStep(decoder))
    S, D, F, V = TOKENS, decoder.features, decoder.hidden, decoder.vocabulary
    N, K, H = decoder.heads, decoder.kv_heads, decoder.head_dim
    expected = {
        "layer/projections": 2 * 4 * 2 * S * D * H * (2 * N + 2 * K),
        "layer/attention": 2 * (2 + 3.5) * 4 * (S**2 / 2) * N * H,
        "layer/mlp": 2 * 11 * 2 * S * D * F,
        "loss": 4 * 2 * S * D * V,
    }
    found = {x.name: 16 * x.flops for x in plan.parts if x.flops}
    assert found == {name: pytest.approx(flops, rel=0.02) for name, flops in expected.items()}
    # Without blocks they are exact.
    for name in ("layer/projections", "layer/mlp", "loss"):
        assert found[name] == expected[name]
    assert plan.kernels == {
        "splash_mha_fwd_residuals": 4,
        "splash_mha_dkv_no_residuals": 2,
        "splash_mha_dq_no_residuals": 2,
    }
    assert plan.notes[1:] == ()  # neither open loops nor whole grids


def test_the_collectives_of_a_train_step():
    """Four all-to-alls forward, four again, four back, each time of 2 N + 2 K' heads."""
    plan = counted(DecoderStep(Decoder(TOKENS)))
    (row,) = (x for x in plan.collectives if x.kind == "all-to-all")
    # Eight KV heads become sixteen, one for each device.
    head = TOKENS // 16 * 128 * 2
    assert (row.count, row.axes, row.link, row.written) == (12, ("seq",), "inside", True)
    assert row.inside == 3 * (2 * 32 + 2 * 16) * head * 15 / 16
    assert row.compiled is None


def test_what_a_train_step_offloads():
    """The input of every layer, once there and once back; nothing else of the step changes."""
    whole, offloaded = (Decoder(TOKENS, layers=3, offload=x) for x in (False, True))
    plans = [counted(DecoderStep(x)) for x in (whole, offloaded)]
    block = 3 * TOKENS // 16 * whole.features * 2
    assert [(x.to_host, x.from_host) for x in plans] == [(0, 0), (block, block)]
    assert (plans[0].parts, plans[0].kernels) == (plans[1].parts, plans[1].kernels)
    assert [x.host for x in plans] == [0, block / 15e9]
    # Of short sequences the copies take longer than anything else.
    slow = replace(plans[1], parts=plans[1].parts[:1], chip=replace(plans[1].chip, host=1e8))
    assert slow.exposed > 0
    assert (slow.bound, slow.at_least) == ("host", block / 1e8)
    said = host_copies(plans[1])
    assert said == "host: 0.201 GB to that of each device, 0.201 GB back: 13.4 ms at 15 GB/s"
    unknown = replace(plans[1], chip=replace(plans[1].chip, host=0.0))
    assert (unknown.host, unknown.at_least) == (None, plans[1].at_least)
    assert "unknown, as no speed of a v5e's link is published" in host_copies(unknown)


@pytest.mark.parametrize("kind", ("pinned_host", None), ids=str)
def test_an_argument_that_lies_on_the_host(kind):
    """An argument comes to the device from the memory that its sharding names."""
    sharding = NamedSharding(V5E.without_devices, PartitionSpec("seq"), memory_kind=kind)
    x = jax.ShapeDtypeStruct((TOKENS, 64), jnp.float32, sharding=sharding)
    plan = counted(Given(lambda x: jnp.sin(jax.device_put(x, jax.memory.Space.Device)), (x,)))
    assert plan.from_host == (TOKENS // 16 * 64 * 4 if kind else 0)


def test_what_the_compiler_keeps_on_the_devices_takes_no_copies():
    """The memory of CPUs is that of the host, so XLA drops the copies that the program writes."""
    device, host = jax.memory.Space.Device, jax.memory.Space.Host

    def there_and_back(x):
        return jnp.sin(jax.device_put(jax.device_put(jnp.sin(x), host), device))

    machine = Machine("cpu:2", 1, {"seq": 2})
    sharding = NamedSharding(machine.without_devices, PartitionSpec("seq"))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=sharding)
    request = Request(Given(there_and_back, (x,)), machine)
    written, kept = answer(replace(request, compiled=False)), answer(request)
    assert (written.failure, kept.failure) == (None, None)
    assert written.to_host == written.from_host > 0
    assert (kept.to_host, kept.from_host, kept.host) == (0, 0, 0)
    assert any("nothing was moved to the host" in note for note in kept.notes)


def test_the_decoder_of_the_examples_has_kernels_for_tpus():
    """The topology decides on the kernels, on a machine with CPUs alone."""
    assert jax.default_backend() == "cpu"
    with jax.numpy_dtype_promotion("standard"):
        plan = counted(FromFile("examples/plan_decoder.py", "train_step", TOKENS))
    assert {name: n for name, n in plan.kernels.items() if name.startswith("splash")} == {
        "splash_mha_fwd_residuals": 2,
        "splash_mha_dkv_no_residuals": 1,
        "splash_mha_dq_no_residuals": 1,
    }
    ours = counted(DecoderStep(Decoder(TOKENS)))
    assert plan.flops == pytest.approx(ours.flops, rel=0.02)


def test_a_kernel_without_a_schedule_computes_every_block():
    """The schedule of dq at a million tokens exceeds scalar memory: three products of all pairs.

    Forward has two products, and the other gradients four, of the half that is allowed.
    """
    tokens = 1 << 20
    plan = counted(AttentionLayer(tokens, train=True), Machine("v5p:4x4x4", 1, {"seq": 64}))
    product = 2 * tokens**2 * 128 * 64 / 64  # a head for each device
    assert plan.flops == pytest.approx((2 / 2 + 4 / 2 + 3) * product, rel=0.01)
    assert not any("skip blocks" in note for note in plan.notes)


@pytest.mark.parametrize(
    "mask",
    (Mask(), Mask(is_causal=True), Mask(query_offset=40, local_window_size=(31, 7))),
    ids=("all", "causal", "a window"),
)
def test_triton_by_its_formula(mask):
    """Two products forward, three for dq, four for dk and dv, of the pairs that attend."""
    B, T, S, N, K, H = 2, 128, 192, 4, 2, 64
    query, key = (jax.ShapeDtypeStruct((B, n, m, H), jnp.bfloat16) for n, m in ((T, N), (S, K)))
    some = mask.attends(Tokens(0, T), Tokens(0, S))
    pairs = T * S if some is None else int(some.sum())

    def both(query: Any, key: Any, value: Any) -> Any:
        kernel = Triton(query_chunk=64, key_chunk=64, platform="gpu")
        out, pull = jax.vjp(partial(kernel, mask=mask), query, key, value)
        return out, pull(out)

    counts = count(jax.jit(both).trace(query, key, key).jaxpr, {})
    assert sum(counts.flops.values()) == 2 * (2 + 3 + 4) * B * N * pairs * H
    names = {f"triton_{name}_kernel" for name in ("forward", "dq", "dkv")}
    assert {name: n for name, n in counts.kernels.items() if n} == dict.fromkeys(names, 1)


@pytest.mark.parametrize("train", (False, True))
def test_cudnn_by_its_formula(train):
    plan = counted(AttentionLayer(TOKENS, train=train), Machine("h100:8", 1, {"seq": 8}))
    assert plan.flops == (3.5 if train else 1) * 4 * TOKENS**2 / 2 * 32 * 128 / 8
    assert sum(plan.kernels.values()) == 1 + train
    assert "pip install jax-seqpar[cuda]" in plan.notes[0] or len(plan.notes) == 0


def test_ulysses_across_slices_sends_between_them():
    """Each of 16 devices receives from 8 of the other slice, and from 7 of the same slice."""
    plan = counted(AttentionLayer(TOKENS), Machine("v5e:2x4", 2, {"seq": 16}))
    (row,) = plan.collectives
    head = TOKENS // 16 * 128 * 2
    assert (row.count, row.link) == (4, "between")
    assert row.between == pytest.approx((2 * 32 + 2 * 16) * head * 8 / 16)
    assert row.inside == pytest.approx((2 * 32 + 2 * 16) * head * 7 / 16)


def test_a_hybrid_sends_keys_and_values_between_slices():
    layer = AttentionLayer(
        TOKENS,
        layout=MeshLayout(tokens=("ring", "seq")),
        strategy=Hybrid(Ring()),
        kv_heads=8,
    )
    plan = counted(layer, Machine("v5e:2x4", 2, {"ring": 2, "seq": 8}))
    links = {x.kind: x for x in plan.collectives}
    assert links["all-to-all"].link == "inside"
    assert links["collective-permute"].link == "between"
    R, head = 2, TOKENS // 16 * 128 * 2
    assert links["collective-permute"].between == 2 * 8 * (R - 1) * head


def test_loops_are_multiplied_out():
    x = shaped_on(V5E, (64, 64))

    def run(x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            return x @ x, None

        return jax.lax.scan(body, x, length=7)[0]

    assert sum(counts_of(run, x).flops.values()) == 7 * 2 * 64**3 / 16


def test_a_loop_of_unknown_length_is_told():
    def run(x: Any) -> Any:
        return jax.lax.while_loop(lambda x: x.sum() < 3.0, lambda x: x @ x, x)

    found = counts_of(run, shaped_on(V5E, (64, 64)))
    assert (sum(found.flops.values()), found.open_loops) == (2 * 64**3 / 16, 1)
    plan = counted(Given(run, (shaped_on(V5E, (64, 64)),)))
    assert any("lower bound" in note for note in plan.notes)


def test_a_branch_that_computes_more_counts():
    def run(x: Any, n: Any) -> Any:
        return jax.lax.cond(n > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    n = jax.ShapeDtypeStruct((), jnp.int32)
    assert sum(counts_of(run, shaped_on(V5E, (64, 64)), n).flops.values()) == 2 * 2 * 64**3 / 16


@pytest.mark.parametrize(
    ("collective", "kind", "received"),
    (
        (lambda x: jax.lax.psum(x, "seq"), "all-reduce", 2 * 15 / 16),
        (lambda x: jax.lax.all_gather(x, "seq"), "all-gather", 15),
        (lambda x: jax.lax.psum_scatter(x, "seq"), "reduce-scatter", 15 / 16),
        (lambda x: jax.lax.all_to_all(x, "seq", 0, 0), "all-to-all", 15 / 16),
        (lambda x: jax.lax.ppermute(x, "seq", [(i, (i + 1) % 16) for i in range(16)]),
         "collective-permute", 1),
    ),
)  # fmt: skip
def test_what_a_device_receives(collective, kind, received):
    def run(x: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        spec = PartitionSpec(None, "seq")
        mapped = partial(jax.shard_map, mesh=mesh, in_specs=spec, check_vma=False)
        return mapped(lambda x: collective(x).ravel(), out_specs=PartitionSpec("seq"))(x)

    (sent,) = counts_of(run, shaped_on(V5E, (16, 1024))).sent
    assert (sent.kind, sent.axes, sent.count) == (kind, ("seq",), 1)
    assert sent.received == received * 16 * 64 * 4


def test_an_array_of_one_device_is_not_sent():
    machine = Machine("v5e:4x4", 1, {"data": 16, "seq": 1})
    plan = counted(AttentionLayer(1 << 15, batch=16, layout=MeshLayout(batch="data")), machine)
    assert plan.collectives == ()


@pytest.mark.parametrize(
    ("topology", "devices", "flops"),
    (("tpu7x:2x2x2", 16, 2307e12 / 2), ("v4:2x2x2", 8, 275e12), ("v5p:2x2x2", 8, 459e12)),
)
def test_a_device_has_its_share_of_a_chip(topology, devices, flops):
    plan = counted(AttentionLayer(1 << 15), Machine(topology, 1, {"seq": devices}))
    assert (plan.devices, plan.chip.flops) == (devices, flops)
    assert plan.step.compute == plan.flops / flops


def test_the_choice_of_the_strategy():
    """The choice across slices on two axes is Ulysses, before a Hybrid as the runner-up."""
    layer = AttentionLayer(TOKENS, layout=MeshLayout(tokens=("ring", "seq")), strategy=Ring())
    machine = Machine("v5e:2x4", 2, {"ring": 2, "seq": 8})
    asked = answer(Request(layer, machine, compiled=False))
    chosen = answer(Request(layer, machine, compiled=False, automatic=True))
    assert asked.choice == chosen.choice
    assert chosen.choice is not None
    assert chosen.choice.strategy == repr(Ulysses())
    assert "Hybrid" in str(chosen.choice.runner_up)
    assert chosen.choice.seconds < (chosen.choice.runner_up_seconds or math.inf)
    kinds = [{x.kind for x in plan.collectives} for plan in (asked, chosen)]
    assert kinds == [{"collective-permute"}, {"all-to-all"}]


def shaped_on(machine: Machine, shape: Any) -> Any:
    sharding = NamedSharding(machine.without_devices, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: Machine("v5e:2x2x2", 1, {"seq": 8}), r"3 dimensions, .* have 2. Write v5e:2x4"),
        (lambda: Machine("v9:2x2", 1, {"seq": 4}), r"'v9' that the table .* lacks. Write v4"),
        (lambda: Machine("v5e:2x4", 1, {"seq": 4}), r"does not have the 8 devices .* is 8"),
        (lambda: Machine("nobody.json:8", 1, {"seq": 8}), r"no file 'nobody.json'. Write a JSON"),
        (
            lambda: Decoder(64, train=False, offload=True),
            r"train = False there are none. Write train=True",
        ),
        (lambda: Given(len, ()).sized(8), r"len has shapes of its own, .* 8 tokens. Write"),
        (lambda: FromFile("nowhere.py", "f").build(), r"no file 'nowhere.py'. Write FILE.py"),
        (lambda: FromFile("examples/plan_decoder.py", "f").build(), r"no function 'f'. Write"),
        (lambda: FromFile("examples/plan_decoder.py", "shaped").build(), r"Write --tokens 128K"),
    ),
)
def test_what_cannot_be_planned(make, message):
    with pytest.raises((ValueError, KeyError), match=message):
        make()


def test_shapes_in_a_file_of_a_decoder_keep_their_sharding():
    with jax.sharding.use_abstract_mesh(V5E.without_devices):
        x = shaped((4, 16), jnp.int32, PartitionSpec(None, "seq"))
        (weights, *_), tokens, _ = DecoderStep(replace(Decoder(64), features=32)).build()[1]
    assert x.sharding.spec == PartitionSpec(None, "seq")
    assert tokens.sharding.spec == MeshLayout().token_spec
    assert weights["layers"]["q"].sharding.spec == PartitionSpec(None, ("seq",), None, None)
