"""The planner with the compiler for TPUs: memory, what it adds, machines, the largest sequence."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from jax_seqpar import MeshLayout, compiler_options
from jax_seqpar.chips import CHIPS
from jax_seqpar.cli import app
from jax_seqpar.plan import Decoder, Plan, compiler_environment, missing_compiler
from jax_seqpar.plan.answer import Request
from jax_seqpar.plan.machine import Machine
from jax_seqpar.plan.targets import AttentionLayer, DecoderStep, FromFile
from jax_seqpar.plan.worker import ask
from jax_seqpar.strategies import Hybrid, Ring

MISSING = missing_compiler("v5e:2x4")

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
TOKENS = 1 << 16
EIGHT = Machine("v5e:2x4", 1, {"seq": 8})


@pytest.fixture(scope="module")
def layer() -> Plan:
    """One attention with gradients on eight devices: one compilation for many questions."""
    asked = Request(AttentionLayer(TOKENS, train=True), EIGHT, compiler_options("tpu"))
    made = ask(asked)
    assert made.failure is None
    return made


def test_memory_is_the_peak(layer):
    """Peak memory holds arguments and results: 8192 tokens, 32 and 8 heads a device, bfloat16."""
    assert layer.fits is True
    memory = layer.memory
    head = TOKENS // 8 * 128 * 2
    assert memory.arguments == (2 * 32 + 2 * 8) * head
    assert memory.arguments + memory.results <= memory.peak < 16 << 30
    assert memory.donated == 0


def test_its_collectives_and_kernels(layer):
    (row,) = layer.collectives
    head = TOKENS // 8 * 128 * 2
    assert (row.kind, row.axes, row.count, row.compiled) == ("all-to-all", ("seq",), 8, 8)
    assert row.inside == 2 * (2 * 32 + 2 * 8) * head * 7 / 8
    assert row.asynchronous == 8
    assert row.hidden < 8  # one slice of the heads has little to hide them under
    assert sum(layer.kernels.values()) == 3
    assert all(name.startswith("splash") for name in layer.kernels)


def test_layout_copies_have_a_share(layer):
    assert 0 < layer.copies.cycles < layer.copies.all_cycles
    assert layer.step.bound == "compute"
    assert layer.at_least == layer.step.compute + layer.exposed


def test_the_choice_knows_that_a_slice_has_no_slow_links(layer):
    assert "crosses" not in layer.choice.reason


# What libtpu says that it has, of a program that is too large: in a process of its own.
ASK = """
import json, re, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax_seqpar.plan import devices
found = {}
for name, topology in {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4",
                       "tpu7x": "tpu7x:2x2x1"}.items():
    device, *_ = all_devices = devices(topology)
    x = jax.ShapeDtypeStruct((1 << 36,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x * 2 + 1).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        has = re.search(r"available HBM \\(([\\d.]+)G\\)", str(error))[1]
        found[name] = [float(has), device.device_kind, len(all_devices)]
print(json.dumps(found))
"""


def test_the_memory_of_the_table_is_what_libtpu_has():
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | compiler_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    chips = {chip.name: (chip, kind) for kind, chip in reversed(CHIPS.items())}
    for name, (gib, kind, count) in said.items():
        chip, beginning = chips[name]
        assert chip.memory / 2**30 == pytest.approx(gib, abs=0.005)
        assert kind.startswith(beginning)
        assert count == (8 if name in ("v5e", "v6e") else 4) * chip.devices


MESHES = """
import json, jax
from jax.experimental import topologies
from jax.sharding import AxisType
from jax_seqpar.plan.machine import Machine
found = []
for topology, sizes in (("v5e:4x4", {"seq": 16}), ("v5e:4x4", {"data": 4, "seq": 4}),
                        ("v4:2x2x2", {"seq": 8}), ("tpu7x:2x2x2", {"data": 2, "seq": 8})):
    if topology != "v4:2x2x2":  # whose devices need an option, as in topology.py
        devices = topologies.get_topology_desc(topology, "tpu").devices
        theirs = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
        found.append([x.id for x in theirs.devices.flat])
    else:
        found.append(list(range(8)))
    ours = Machine(topology, 1, sizes).devices()
    ids = [x.id for x in ours.devices.flat]
    found.append(ids if topology != "v4:2x2x2" else sorted(ids))
two = Machine("v5e:2x4", 2, {"data": 2, "seq": 8})
mesh, links = two.devices(), two.links
found.append([x.slice_index for x in mesh.devices.flat])
found.append([x.slice_index for x in links.devices.flat])
print(json.dumps(found))
"""


def test_the_mesh_is_that_of_make_mesh():
    done = subprocess.run(
        [sys.executable, "-c", MESHES],
        env=os.environ | compiler_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found[0::2] == found[1::2]
    assert found[0] != sorted(found[0])  # along the torus, not as they are numbered
    assert found[-1] == [0] * 8 + [1] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--topology", "v5e:3x3", "--tokens", "9K"), "topology 'v5e:3x3' is unknown to libtpu"),
        (("--topology", "v5e:2x4", "--tokens", "1M", "--mesh", "data=8,seq=1", "--batch", "64"),
         "out of memory: a device needs"),
    ),
)  # fmt: skip
def test_a_sentence_where_there_is_no_answer(options, message):
    result = CliRunner().invoke(app, ["plan", "layer", *options])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


# 28 layers in a scan, whose inputs have 4 GiB on a device: libtpu aborts on a copy of that size.
OFFLOADED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax_seqpar import MeshLayout
from jax_seqpar.training import offload_policy, offloaded

def step(tokens):
    def layer(x, weight):
        return jnp.tanh(jnp.einsum("BSD,DE->BSE", offloaded(x), weight)), None

    def loss(weights, x):
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=offload_policy), x, weights)
        return (x.astype(jnp.float32) ** 2).sum()

    def shaped(shape, spec):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    weights = shaped((28, 256, 256), PartitionSpec())
    return jax.grad(loss), (weights, shaped((1, tokens, 256), MeshLayout().token_spec))
"""


def test_what_is_offloaded_lies_on_the_host(tmp_path):
    """Offloaded layer inputs of 112 GiB, more than a chip has, are host memory of the program."""
    machine = Machine("v5p:2x2x1", 1, {"seq": 4})
    file, tokens = tmp_path / "mine.py", 1 << 25
    file.write_text(OFFLOADED)
    made = ask(Request(FromFile(str(file), "step", tokens), machine, dump=str(tmp_path)))
    assert made.failure is None
    assert made.memory is not None
    block = tokens // 4 * 256 * 2
    assert made.memory.host == 28 * block == 112 << 30
    assert made.memory.arguments + block <= made.memory.peak <= 7 * block
    assert made.fits is True
    assert (made.to_host, made.from_host) == (28 * block, 28 * block)
    assert not any("nothing was moved" in note for note in made.notes)
    kept = re.findall(
        r"bf16\[28,1,8388608,(\d+)\]\S*S\(5\)\S* custom-call\(\)",
        (tmp_path / "compiled.txt").read_text(),
    )
    assert sum(map(int, kept)) == 256


EXAMPLE = """
import jax, jax.numpy as jnp
from decoder import Config, Decoder, Placement
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax_seqpar.training import Batch

def step(tokens):
    def cheap(query, key, value, *, is_causal=False):
        return query + value  # in place of an attention, whose compilation takes longer

    options = {"sharding": {}, "tiles": 4, "remat": True, "offload": OFFLOAD}
    place = Placement(kernel=cheap, dtype=jnp.bfloat16, **options)
    config = Config(256, 256, 256, layers=16, heads=4, kv_heads=4)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, place, rngs=nnx.Rngs(0))))

    def shaped(shape, dtype, spec=PartitionSpec()):
        mesh = jax.sharding.get_abstract_mesh()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = jax.tree.map(lambda x: shaped(x.shape, x.dtype), state)
    row = shaped((1, tokens), jnp.int32, place.layout.token_spec)
    batch = Batch(row, row, row, None, shaped((), jnp.int32), (1, tokens))
    return jax.grad(lambda p, b: nnx.merge(graph, p).loss(b)), (weights, batch)
"""


@pytest.mark.slow
def test_the_decoder_of_the_examples_offloads(tmp_path, monkeypatch):
    """Inputs of 16 blocks leave the device, which then holds less than they take together."""
    monkeypatch.setenv("PYTHONPATH", os.path.abspath("examples"))
    monkeypatch.syspath_prepend(os.path.abspath("examples"))
    tokens, machine = 1 << 18, Machine("v5e:2x2", 1, {"seq": 4})
    temporaries, inputs = [], 16 * tokens // 4 * 256 * 2
    for offload in (False, True):
        file = tmp_path / f"mine_{offload}.py"
        file.write_text(EXAMPLE.replace("OFFLOAD", str(offload)))
        made = ask(Request(FromFile(str(file), "step", tokens), machine))
        assert made.failure is None
        assert made.memory is not None
        moved = (made.to_host, made.from_host, made.memory.host)
        assert moved == ((inputs,) * 3 if offload else (0,) * 3)
        temporaries.append(made.memory.temporaries)
    kept, left = temporaries
    assert left < inputs < kept
    assert kept - left > inputs // 2


@pytest.mark.slow
def test_ulysses_and_a_hybrid_across_slices():
    """Four exchanges that are sent between slices; a hybrid sends keys and values alone."""
    tokens = 1 << 15
    machine = Machine("v5e:2x4", 2, {"ring": 2, "seq": 8})
    layout = MeshLayout(tokens=("ring", "seq"))
    whole = ask(Request(AttentionLayer(tokens, layout=layout), machine))
    (row,) = whole.collectives
    assert (row.count, row.compiled, row.link) == (4, 4, "between")
    assert any("4 all-to-all" in note for note in whole.notes)
    both = ask(Request(AttentionLayer(tokens, layout=layout, strategy=Hybrid(Ring())), machine))
    rows = {x.kind: x for x in both.collectives}
    assert rows["all-to-all"].link == "inside"
    assert rows["collective-permute"].between == 2 * 8 * tokens // 16 * 128 * 2


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.parametrize("own", (True, False), ids=("the planner's", "the example's"))
def test_a_train_step_has_splash_kernels(own, tmp_path):
    """One layer, 128K tokens on 16 devices: 12 all-to-alls, and gathers that the compiler adds."""
    machine, tokens = Machine("v5e:4x4", 1, {"seq": 16}), 1 << 17
    target: Any = FromFile(os.path.abspath("examples/plan_decoder.py"), "train_step", tokens)
    if own:
        target = DecoderStep(Decoder(tokens))
    made = ask(Request(target, machine, dump=str(tmp_path)), timeout=1800)
    assert made.failure is None
    assert made.fits is True
    rows = {(x.kind, x.written): x for x in made.collectives}
    assert (rows["all-to-all", True].count, rows["all-to-all", True].compiled) == (12, 12)
    assert not rows["all-gather", False].written
    text = (tmp_path / "compiled.txt").read_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4
    assert made.memory is not None
    assert made.memory.arguments + made.memory.temporaries > made.memory.peak


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_largest_sequence_compiles_and_the_next_does_not(tmp_path):
    file, png = tmp_path / "a.json", tmp_path / "a.png"
    options = ("--topology", "v5e:2x2", "--tokens", "2M", "--step", "512K", "--largest")
    result = CliRunner().invoke(
        app, ["plan", "layer", *options, "--json", str(file), "--png", str(png)]
    )
    assert result.exit_code == 0, result.output
    plans = [Plan.from_json(json.dumps(x)) for x in json.loads(file.read_text())]
    fit = [x.tokens or 0 for x in plans if x.fits]
    fail = [x.tokens or 0 for x in plans if x.fits is False]
    assert min(fail) - max(fit) == 1 << 19
    assert png.read_bytes().startswith(b"\x89PNG")
