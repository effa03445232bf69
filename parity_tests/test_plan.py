"""The planner, without a compiler for TPUs or GPUs: programs for simulated devices, and messages.

`test_tpu_aot` and `test_gpu_aot` ask the same of those compilers.
"""

import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_seqpar import (
    AllGatherKV,
    Blockwise,
    Dropout,
    Exact,
    Logits,
    Mask,
    MeshLayout,
    Ulysses,
)
from jax_seqpar.kernels import cudnn
from jax_seqpar.plan import (
    Program,
    all_to_all_bytes,
    collectives,
    devices,
    kernel_calls,
    kernels_under_transfers,
    missing_compiler,
    platform_of,
    received_bytes,
    temporaries,
    topology,
)

PROGRAM = Program("cpu:4", query=(2, 16, 8, 5), key=(2, 16, 4, 5), dtype=jnp.float32)


@pytest.mark.parametrize(
    ("strategy", "kinds"),
    ((Ulysses(), {"all-to-all": 4}), (AllGatherKV(), {"all-gather": 2})),
    ids=("Ulysses", "AllGatherKV"),
)
def test_a_program_sends_what_its_strategy_says(strategy, kinds):
    program = replace(
        PROGRAM,
        key=(2, 24, 4, 5),
        value=(2, 24, 4, 3),
        mask=Mask(is_causal=True),
        strategy=strategy,
    )
    compiled = program.compile()
    assert collectives(compiled) == kinds
    sent = strategy.traffic(program.query, program.key, program.value, degree=4, itemsize=4)
    assert received_bytes(compiled, 4) == sent > 0


def test_gradients_double_the_all_to_alls():
    forward, both = (replace(PROGRAM, gradients=x).compile() for x in (False, True))
    assert collectives(both) == {"all-to-all": 8}
    assert all_to_all_bytes(both) == 2 * all_to_all_bytes(forward) > 0
    assert 0 < temporaries(forward) < temporaries(both)


def array(*shape: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_arrays_of_the_options_are_shapes():
    """Arrays of the options are planned as shapes, and add no communication."""
    program = replace(
        PROGRAM,
        mask=Mask(segment_ids=array(2, 16, dtype=jnp.int32), array=array(1, 8, 16, 16, dtype=bool)),
        logits=Logits(sinks=array(8, dtype=jnp.float32)),
        dropout=Dropout(0.1, jax.random.key(0)),
    )
    assert collectives(program.compile()) == {"all-to-all": 4}


def test_a_mesh_of_data_and_tensor_parallelism():
    """All-to-alls send each device's part of batch and heads; one KV head is on both devices."""
    layout = MeshLayout(batch="data", heads="tensor")
    axes = {"data": 2, "seq": 2, "tensor": 2}
    program = replace(PROGRAM, topology="cpu:8", layout=layout, mesh_shape=axes)
    for key in ((2, 16, 4, 5), (2, 16, 1, 5)):
        compiled = replace(program, key=key).compile()
        assert collectives(compiled) == {"all-to-all": 4}
        part = (1, 16, 4, 5), (1, 16, max(key[2] // 2, 1), 5)
        sent = Ulysses().traffic(*part, part[1], degree=2, itemsize=4)
        assert received_bytes(compiled, 2) == sent


def test_a_program_travels_to_another_process():
    program = replace(PROGRAM, mask=Mask(is_causal=True), kernel=Exact())
    assert pickle.loads(pickle.dumps(program)) == program


def test_a_gpu_that_is_assumed_is_forgotten():
    before = cudnn.compute_capability()
    with cudnn.assume_compute_capability((9, 0)):
        assert cudnn.compute_capability() == (9, 0)
    assert cudnn.compute_capability() == before


# As libtpu and XLA for GPUs write them, shortened.
SCHEDULED = """HloModule jit_run, is_scheduled=true

%loop (p: f32[2]) -> f32[2] {
  %inside = bf16[4,8]{1,0} all-gather(%p), dimensions={0}
}

ENTRY %main () -> f32[2] {
  %all_to_all.1 = u16[4,8]{1,0:T(8,128)(2,1)S(1)} all-to-all(%a), dimensions={0}
  %all-to-all-start = ((u16[4,8]{1,0}), u16[4,8]{1,0}, u32[]) all-to-all-start(%b)
  %all-to-all-start.2 = ((f8e4m3fn[4,8]), f8e4m3fn[4,8]) all-to-all-start(%c)
  %splash.1 = bf16[4,8] custom-call(%d), custom_call_target="tpu_custom_call"
  %all-to-all-done = u16[4,8]{1,0:T(8,128)(2,1)S(1)} all-to-all-done(%all-to-all-start)
  %fmha.1 = bf16[4,8] custom-call(%d), custom_call_target="__cudnn$fmhaSoftmax"
  %all-to-all-done.2 = f8e4m3fn[4,8] all-to-all-done(%all-to-all-start.2)
  %all-to-all-start.3 = ((pred[4,8]), pred[4,8]) all-to-all-start(%e), {"is_sync":true}
  ROOT %all-to-all-done.3 = pred[4,8] all-to-all-done(%all-to-all-start.3)
}
"""


def test_the_text_of_asynchronous_transfers():
    assert collectives(SCHEDULED) == {"all-to-all": 4, "all-gather": 1}
    assert all_to_all_bytes(SCHEDULED) == 2 * (4 * 8 * 2) + 2 * (4 * 8)
    assert received_bytes(SCHEDULED, 4) == (3 * (4 * 8 * 2) + 2 * (4 * 8)) * 3 // 4
    assert kernel_calls(SCHEDULED) == 2
    assert kernels_under_transfers(SCHEDULED) == {
        "all-to-all-start": ("splash.1",),
        "all-to-all-start.2": ("splash.1", "fmha.1"),
    }


def test_the_names_of_topologies():
    named = {"v5e:2x4": "tpu", "v5p:4x4x4": "tpu", "h100:8": "gpu", "cpu:8": "cpu"}
    assert {name: platform_of(name) for name in named} == named
    assert missing_compiler("cpu:8") is None
    assert devices("cpu:4") == jax.devices("cpu")[:4]


REFUSED = {
    "an unknown topology": (
        {"topology": "h200:8"},
        r"topology 'h200:8' is unknown. Write the chips of a TPU by axis, as \"v5e:2x4\"",
    ),
    "devices that are not there": (
        {"topology": "cpu:9"},
        r"'cpu:9' has more devices than JAX, which has 8 .*jax_num_cpu_devices\", 9\)",
    ),
    "a layout with a mesh": (
        {"layout": MeshLayout(mesh=jax.sharding.AbstractMesh((4,), ("seq",)))},
        r"layout has a mesh, .*mesh_shape={'seq': 4}",
    ),
    "a mesh that is not told": (
        {"layout": MeshLayout(batch="data")},
        r"mesh_shape is None, but MeshLayout.*batch='data'.* does not name one mesh axis",
    ),
    "a mesh of another size": (
        {"mesh_shape": {"seq": 2}},
        r"mesh_shape {'seq': 2} does not have the 4 devices of topology 'cpu:4'",
    ),
    "an axis that the mesh lacks": (
        {"mesh_shape": {"data": 4}},
        r"names axis 'seq', which the mesh does not have",
    ),
    "tokens that do not divide": (
        {"query": (2, 18, 8, 5)},
        r"query tokens T = 18 is not divisible by the 4 devices",
    ),
    "shapes that do not fit": ({"key": (2, 16, 3, 5)}, r"N = 8 must be a multiple of .* K = 3"),
    "a shape of three axes": (
        {"value": (2, 16, 5)},
        r"value must be a shape of four.*\(2, 16, 5\)",
    ),
    "no query": ({"query": (2, 0, 8, 5)}, r"query must be a shape of four positive sizes"),
    "a mask that is True": ({"mask": True}, r"mask must be a jax_seqpar.Mask, got True"),
    "a strategy by name": ({"strategy": "ring"}, r"strategy must be Ulysses"),
    "a kernel that lacks what is asked": (
        {"strategy": AllGatherKV(), "kernel": lambda query, key, value: query},
        r"a function cannot be told that it has a part of the tokens",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(PROGRAM, **options).compile()


@pytest.mark.parametrize(
    ("name", "message"),
    (("v5e:2x4", "pip install libtpu"), ("h100:8", r"pip install jax-seqpar\[cuda\]")),
)
def test_a_missing_compiler(name, message, monkeypatch):
    monkeypatch.setattr(topology, "_libtpu", lambda: None)
    monkeypatch.setattr(topology, "_has_cuda", lambda: False)
    with pytest.raises(ImportError, match=rf"topology '{name}': .* is missing: {message}"):
        replace(PROGRAM, topology=name, kernel=Blockwise()).compile()


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_program_that_is_not_compiled():
    """A lowered program raises: its text has no collectives, so every budget would hold."""
    lowered: Any = jax.jit(lambda x: x + 1).lower(jnp.ones(2))
    for program in (lowered, lowered.as_text()):
        for ask in (collectives, all_to_all_bytes, kernel_calls, partial(received_bytes, degree=2)):
            with pytest.raises(ValueError, match=r"is not compiled.*Write lowered.compile\(\)"):
                ask(program)
    with pytest.raises(ValueError, match=r"not scheduled.*Write lowered.compile\(\)"):
        kernels_under_transfers(lowered.as_text(dialect="hlo"))
    with pytest.raises(ValueError, match="degree must be a positive integer, got 0"):
        received_bytes(lowered.compile(), 0)


@pytest.mark.parametrize("strategy", (Ulysses(), AllGatherKV()))
def test_traffic_of_tokens_that_the_devices_do_not_divide(strategy):
    shapes = [(1, 12, 4, 4), (1, 10, 4, 4), (1, 10, 4, 4)]
    with pytest.raises(ValueError, match=r"key has 10 tokens, which degree = 3 does not .*Give 12"):
        strategy.traffic(*shapes, degree=3, itemsize=4)


def test_a_ragged_exchange_is_another_collective():
    text = "HloModule a\n  %a = f32[4] ragged-all-to-all(%b)\n  %c = f32[4] all-to-all(%d)\n"
    assert collectives(text) == {"ragged-all-to-all": 1, "all-to-all": 1}
