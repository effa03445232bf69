"""`seqpar plan` and its process: answers for simulated devices, and a sentence where there is none.

`test_plan_machines.py` asks libtpu.
"""

import inspect
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from typer.testing import CliRunner

from jax_seqpar import MeshLayout, Ulysses, dot_product_attention
from jax_seqpar.cli import app, plan_command
from jax_seqpar.cli.plan_options import TARGETS
from jax_seqpar.plan import Decoder, Plan, plan
from jax_seqpar.plan.machine import Machine

SMALL = ("--heads", "8", "--kv-heads", "4", "--head-dim", "8", "--dtype", "f32")
DECODER = (
    *("--features", "32", "--hidden", "48", "--vocabulary", "64", "--tiles", "2"),
    *SMALL,
)

pytestmark = pytest.mark.usefixtures("less_optimised")


def seqpar(*options: str, columns: int = 500) -> Any:
    return CliRunner().invoke(app, ["plan", *options], env={"COLUMNS": str(columns)})


def test_a_decoder_whose_devices_hold_copies_of_a_kv_head():
    sizes = ("--heads", "8", "--kv-heads", "2", "--head-dim", "4", "--features", "32")
    options = ("--topology", "cpu:4", "--mesh", "tensor=4", "--tokens", "64", "--layers", "1")
    result = seqpar("decoder", *options, *sizes, "--hidden", "32", "--vocabulary", "64")
    assert result.exit_code == 0, result.output


def test_a_decoder_for_simulated_devices(tmp_path):
    """Two plans of a decoder are equal but for the seconds; JSON and program are written."""
    found = []
    for name in ("one", "two"):
        file = tmp_path / f"{name}.json"
        options = ("--topology", "cpu:8", "--mesh", "data=2,seq=4", "--tokens", "64", "--train")
        result = seqpar("decoder", *options, *DECODER, "--json", str(file), "--dump", str(tmp_path))
        assert result.exit_code == 0, result.output
        found.append(json.loads(file.read_text()) | {"seconds": {}})
    assert found[0] == found[1]
    made = Plan.from_json(json.dumps(found[0]))
    assert (made.tokens, made.mesh, made.failure) == (64, {"data": 2, "seq": 4}, None)
    assert made.memory is not None
    assert 0 < made.memory.donated < made.memory.arguments
    rows = {(x.kind, x.axes): x for x in made.collectives if x.written}
    assert (rows["all-to-all", ("seq",)].count, rows["all-to-all", ("seq",)].compiled) == (12, 12)
    assert any(not x.written for x in made.collectives)  # weights are gathered
    assert "HloModule" in (tmp_path / "compiled.txt").read_text()
    assert "stablehlo" in (tmp_path / "lowered.mlir").read_text()
    for word in ("12", "all-to-all", "layer/attention", "step", "choose_strategy", "GiB"):
        assert word in result.output
    assert made.strategy == repr(Ulysses())
    assert result.output.splitlines()[0].endswith(f"seq 4, {made.strategy}")


def test_in_80_columns_nothing_is_cut(tmp_path):
    """A terminal as it opens: names are folded, and every number is there."""
    options = ("--topology", "cpu:8", "--mesh", "data=2,seq=4", "--tokens", "64", "--train")
    result = seqpar("decoder", *options, *DECODER, "--offload", columns=80)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "nothing was moved to the host: the compiler keeps it in the memory of the CPUs" in said
    assert "\u2026" not in result.output
    rows = [line.split() for line in result.output.splitlines()]
    assert ["all-to-all", "seq", "program", "12", "0.000", "0.000", "12", "0", "0"] in rows


def test_a_sweep_of_degrees_with_its_chart(tmp_path):
    """Tokens in more parts take less memory; the last chart has them all."""
    png, file = tmp_path / "a.png", tmp_path / "a.json"
    options = ("--topology", "cpu:4", "--tokens", "256", "--sweep", "degree", "--batch", "4")
    result = seqpar("layer", *options, *SMALL, "--png", str(png), "--json", str(file))
    assert result.exit_code == 0, result.output
    plans = [Plan.from_json(json.dumps(x)) for x in json.loads(file.read_text())]
    assert [x.mesh for x in plans] == [{"data": 4 // d, "seq": d} for d in (1, 2, 4)]
    assert png.stat().st_size > 1000


def step(x: Any) -> Any:
    return x * 2.0, x.sum()


@pytest.mark.parametrize("timeout", (None, 100.0))
def test_a_plan_of_a_function(timeout):
    """A function is planned in this process or another; donated arguments are counted once."""
    mesh = AbstractMesh((4,), ("seq",))
    x = jax.ShapeDtypeStruct(
        (64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("seq"))
    )
    whole = plan(step, x, topology="cpu:4", timeout=timeout)
    assert whole.memory is not None
    assert (whole.memory.arguments, whole.memory.donated) == (64 * 64 * 4 // 4, 0)
    (row,) = whole.collectives
    assert (row.kind, row.axes, row.written) == ("all-reduce", ("seq",), False)
    if timeout is None:
        donated = plan(jax.jit(step, donate_argnums=0), x, topology="cpu:4", timeout=None)
        assert donated.memory is not None
        assert donated.memory.donated == donated.memory.arguments
        assert donated.memory.peak < whole.memory.peak


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_function_that_cannot_travel():
    with pytest.raises(ValueError, match=r"<lambda> cannot travel .*Write it at the top of a mod"):
        plan(lambda x: x, topology="cpu:8")


REFUSED = {
    "a topology that cannot be": (("--topology", "v5e:2x2x2"), "3 dimensions"),
    "an unknown topology": (("--topology", "v5e"), "is unknown. Write the chips"),
    "an unknown chip": (("--topology", "v9:2x2"), "lacks. Write v4"),
    "a length of CPUs": (
        ("--topology", "cpu:8", "--largest"),
        "the memory of a device of cpu:8 is not known, so nothing says what fits. Write the topol",
    ),
    "a length by counting": (
        ("--topology", "v5e:2x4", "--largest", "--no-compile"),
        "--largest and --no-compile contradict each other: the compiler says what fits. Write only",
    ),
    "a size": (("--topology", "v5e:2x4", "--tokens", "12T"), "is no size. Write"),
    "a mesh": (("--topology", "v5e:2x4", "--mesh", "seq=4"), "does not have the 8 devices"),
    "two questions": (
        ("--topology", "v5e:2x4", "--largest", "--sweep", "tokens"),
        "--largest and --sweep tokens are two questions. Write only one of them",
    ),
    "a step of nothing": (
        ("--topology", "v5e:2x4", "--step", "1K"),
        "--step 1K needs --largest. Write --largest, too, or leave --step out",
    ),
    "points of nothing": (
        ("--topology", "v5e:2x4", "--sweep", "degree", "--points", "3"),
        "--points 3 needs --sweep tokens. Write --sweep tokens in place of --sweep degree",
    ),
    "a mesh for every degree": (
        ("--topology", "v5e:2x4", "--sweep", "degree", "--mesh", "seq=8"),
        "--mesh seq=8 and --sweep degree both set the mesh. Write only one of them",
    ),
    "a folder for several programs": (
        ("--topology", "cpu:8", "--sweep", "tokens", "--dump", "x"),
        "--dump x and --sweep tokens would write several programs to the same files. Write only",
    ),
    "a folder for none": (
        ("--topology", "cpu:8", "--no-compile", "--dump", "x"),
        "--dump x and --no-compile contradict each other: the compiler's program is written. Write",
    ),
    "options of no compiler": (
        ("--topology", "v5e:2x4", "--no-compile", "--overlap"),
        "--overlap and --no-compile contradict each other: the first is for the compiler. Write",
    ),
    "options that CPUs lack": (
        ("--topology", "cpu:8", "--overlap"),
        "--overlap would change nothing of cpu:8, whose compiler has no such options. Write the",
    ),
    "a strategy without its axis": (
        ("--topology", "cpu:8", "--mesh", "data=8", "--strategy", "ring"),
        "--strategy ring would change nothing: no axis of the mesh data=8 shares the tokens",
    ),
    "an axis twice": (
        ("--topology", "cpu:4", "--mesh", "data=4,data=4"),
        "'data=4,data=4' names an axis twice. Write each once, as data=2,seq=8",
    ),
    "tokens that do not divide": (
        ("--topology", "cpu:8", "--tokens", "100"),
        "--tokens 100 is not divisible by the 8 devices that share it in the mesh seq=8. "
        "Write --tokens 104",
    ),
    "tokens of one degree": (
        ("--topology", "cpu:8", "--tokens", "4", "--sweep", "degree", "--batch", "8"),
        "--tokens 4 is not divisible by the 8 devices that share it",
    ),
    "a batch that does not divide": (
        ("--topology", "cpu:8", "--mesh", "data=2,seq=4", "--batch", "3"),
        "--batch 3 is not divisible by the 2 devices that share it in the mesh "
        "data=2,seq=4. Write --batch 4",
    ),
    "heads that do not divide": (
        ("--topology", "cpu:6", "--mesh", "tensor=3,seq=2", "--tokens", "1K"),
        "--heads 32 is not divisible by the 3 devices of mesh axis tensor in the "
        "mesh tensor=3,seq=2. Write tensor= one of 1, 2, 4, 8, and another axis larger",
    ),
    "KV heads that do not divide": (
        ("--topology", "cpu:8", "--mesh", "tensor=8", "--kv-heads", "4"),
        "--kv-heads 4 is not divisible by the 8 devices of mesh axis tensor in the mesh tensor=8. "
        "Write tensor= one of 1, 2, 4, and another axis larger",
    ),
    "a step that does not divide": (
        ("--topology", "v5e:2x4", "--largest", "--step", "1001"),
        "--step 1001 is not divisible by the 8 devices that share it",
    ),
    "a GPU without a file": (
        ("--topology", "nowhere.json:8"),
        "there is no file 'nowhere.json'. Write a JSON object with the keys name",
    ),
    "a folder for a file": (
        ("--topology", "v5e:2x4", "--json", "."),
        "--json . is a folder. Write the name of a file",
    ),
    "a file for a folder": (
        ("--topology", "cpu:8", "--dump", f"{__file__}/x"),
        "is a file, not a folder. Write the name of a folder",
    ),
    "a format of charts": (
        ("--topology", "v5e:2x4", "--sweep", "tokens", "--png", "x.abc"),
        "--png x.abc: Matplotlib does not write .abc. Write a name that ends in .png",
    ),
    "a file in no folder": (
        ("--topology", "v5e:2x4", "--json", "nowhere/a.json"),
        "--json nowhere/a.json: there is no folder nowhere. Make it, or write another",
    ),
    "a hybrid of one axis": (
        ("--topology", "v5e:2x4", "--strategy", "hybrid-ring"),
        "works on two mesh axes of the tokens, and the mesh seq=8 has 1. Write them",
    ),
    "other GPUs": (("--topology", "h200:8"), '"a100.json:8" for other GPUs, which a file'),
    "a strategy": (("--topology", "v5e:2x4", "--strategy", "x"), "--strategy 'x' is unknown"),
    "a sweep": (("--topology", "v5e:2x4", "--sweep", "x"), "Write tokens, degree"),
    "a chart of one": (("--topology", "v5e:2x4", "--png", "x.png"), "Write --sweep tokens, too"),
    "a time": (("--topology", "v5e:2x4", "--timeout", "0"), "Write --timeout 600"),
    "slices": (("--topology", "v5e:2x4", "--slices", "0"), "slices must be a positive integer"),
}


OPTIONS = {
    "--batch": "2",
    "--heads": "8",
    "--kv-heads": "4",
    "--head-dim": "8",
    "--dtype": "f32",
    "--strategy": "ring",
    "--train": None,
    "--no-train": None,
    "--layers": "1",
    "--features": "32",
    "--hidden": "48",
    "--vocabulary": "64",
    "--tiles": "2",
    "--offload": None,
    "--no-offload": None,
}
OF_AN_ATTENTION = tuple(OPTIONS)[:8]


OF_A_FILE = "examples/plan_decoder.py:train_step"


@pytest.mark.parametrize(
    ("target", "option"),
    [(OF_A_FILE, x) for x in OPTIONS] + [("layer", x) for x in OPTIONS if x not in OF_AN_ATTENTION],
)
def test_an_option_of_another_target(target, option):
    """Options are refused by targets that would ignore them, at their default values, too."""
    written = [option] if OPTIONS[option] is None else [option, OPTIONS[option]]
    result = seqpar(target, "--topology", "cpu:8", *written)
    refused(result, f"{' '.join(written)} would change nothing of {target}, ")
    instead = "layer or decoder" if option in OF_AN_ATTENTION else "decoder"
    assert f"Leave it out, or write {instead} in place of {target}." in result.output


def test_several_options_of_another_target():
    result = seqpar("layer", "--topology", "cpu:8", "--heads", "8", "--layers", "3", "--tiles", "4")
    refused(result, "--layers 3, --tiles 4 would change nothing of layer, which has no such part")
    assert "Leave them out, or write decoder in place of layer." in result.output


def test_every_option_belongs_to_a_target():
    """Parameters of the command are options of all targets, or in the table of those of some."""
    parameters = set(inspect.signature(plan_command.plan).parameters)
    machine = {"what", "topology", "slices", "mesh", "tokens", "timeout", "compiled", "overlap"}
    asked = {"find_largest", "step", "sweep", "points", "json_file", "png", "dump"}
    assert parameters == machine | asked | set(TARGETS["decoder"])
    given = {x.lstrip("-").replace("-", "_") for x in OPTIONS if not x.startswith("--no-")}
    assert given == set(TARGETS["decoder"])


def test_an_offload_without_gradients():
    result = seqpar("decoder", "--topology", "v5e:2x4", "--offload")
    refused(result, "--offload needs --train. Write --train, too, or leave --offload out")


def test_an_unknown_target():
    refused(seqpar("x", "--topology", "cpu:8"), "'x' is no target. Write layer, decoder or FILE.py")


@pytest.mark.parametrize("option", ("--heads", "--kv-heads", "--head-dim", "--tiles", "--points"))
def test_a_number_that_is_not_positive(option):
    result = seqpar("decoder", "--topology", "cpu:8", option, "0")
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_refused_at_once(options, message):
    refused(seqpar("layer", *options), message)


def refused(result: Any, message: str) -> None:
    """Asserts that a call ends with one sentence and exit status 2."""
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    (
        ("aborts", "the process of the compiler ended with SIGABRT: the compiler's last words"),
        ("exits", "ended with exit status 3"),
        ("raises", "tokens 7 are odd"),
        ("wrong", "returns int where a function"),
        ("half", "returns a function and int where a function and the shapes"),
        ("key", "KeyError: 'x' (mine.py, line 14)"),
        ("traced", "NameError: name 'y' is not defined (mine.py, line 16)"),
        ("silent", "AssertionError (mine.py, line 18)"),
        ("alone", "(too many positional arguments), got 7. Write def alone("),
    ),
)
def test_what_goes_wrong_in_the_process(function, message, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("""
import os
def aborts(tokens):
    os.write(2, b"the compiler's last words\\n")
    os.abort()
def exits(tokens):
    os._exit(3)
def raises(tokens):
    raise ValueError(f"tokens {tokens} are odd.\\nmore")
def wrong(tokens):
    return tokens
def half(tokens):
    return half, 3
def key(tokens): return {}["x"]
def traced(tokens):
    return lambda: y, ()
def silent(tokens):
    assert tokens == 8
def alone():
    return lambda: 1.0, ()
""")
    result = seqpar(f"{file}:{function}", "--topology", "cpu:8", "--tokens", "7")
    refused(result, message)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (("--features", "38"), "features D = 38 is not divisible by the 4 devices of mesh axes "
         "('seq',), which share each weight. Write features = 40"),
        (("--head-dim", "7"), "head_dim H = 7 is odd, .* Write head_dim = 8"),
    ),
)  # fmt: skip
@pytest.mark.usefixtures("unchecked_shapes")
def test_sizes_that_a_decoder_cannot_have(options, message):
    mesh = Machine("cpu:4", 1, {"seq": 4}).without_devices
    named: Any = {x.removeprefix("--").replace("-", "_"): int(n) for x, n in [options]}
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")),
    ):
        Decoder(64, **{"features": 32, "head_dim": 8} | named).build()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    (
        ("none.txt", "", "none.txt' is not a file of Python. Write FILE.py:function"),
        ("syntax.py", "def f(:", "SyntaxError: invalid syntax (syntax.py, line 1)"),
        ("imports.py", "import nowhere", "No module named 'nowhere' (imports.py, line 1)"),
        ("other.py", "", "has no function 'f'. Write the name of one of its functions"),
        ("sized.py", "f = lambda tokens: 1", "argument: 'tokens'). Write --tokens 128K"),
        ("named.py", "f = lambda *, x: 1", "argument: 'x'). Write --tokens 128K"),
        ("all.py", "f = lambda **options: 1", "all.py:f returns int where a function"),
    ),
)
def test_a_file_that_cannot_be_read(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    refused(seqpar(f"{tmp_path / name}:f", "--topology", "cpu:2"), message)


def test_a_function_of_a_file_without_tokens(tmp_path):
    """A plan names no tokens unless the call does; a parameter with a default needs none."""
    file = tmp_path / "mine.py"
    file.write_text("def one(scale=2.0): return lambda: scale, ()")
    result = seqpar(f"{file}:one", "--topology", "cpu:2", "--json", str(tmp_path / "plan.json"))
    assert result.exit_code == 0, result.output
    assert Plan.from_json((tmp_path / "plan.json").read_text()).tokens is None
    assert "mine.py:one on cpu:2" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ('{"name": ', "JSONDecodeError"),
        ("[1]", "TypeError"),
        ("{}", "KeyError: 'compute_capability'"),
        ('{"name": 5, "compute_capability": [8, 0], "target_config": ""}', "name is 5 in "),
        ('{"name": "A", "compute_capability": [8, 0], "target_config": 1}', "target_config is 1 "),
        ('{"name": "A", "compute_capability": [8, 0], "target_config": ""}', "a chip 'A' that the"),
    ),
)
def test_the_broken_description_of_a_gpu(text, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(text)
    refused(seqpar("layer", "--topology", f"{file}:8"), message)


def test_nothing_is_left_running_after_its_time(tmp_path):
    """The process and its children end at the timeout."""
    file, pids = tmp_path / "slow.py", tmp_path / "pids"
    file.write_text(f"""
import os, subprocess, time
def waits(tokens):
    child = subprocess.Popen(["sleep", "600"])
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(600)
""")
    began = time.monotonic()
    result = seqpar(f"{file}:waits", "--topology", "cpu:8", "--tokens", "8", "--timeout", "15")
    refused(result, "was not compiled in 15 s: give it a longer timeout")
    assert time.monotonic() - began < 60
    for pid in map(int, pids.read_text().split()):
        assert not alive(pid)


def test_the_process_ends_with_its_parent(tmp_path):
    """A command that is killed leaves no process behind."""
    file, pids = tmp_path / "slow.py", tmp_path / "pid"
    file.write_text(f"""
import os, time
def waits(tokens):
    open({str(pids)!r}, "w").write(str(os.getpid()))
    time.sleep(600)
""")
    command = [sys.executable, "-m", "jax_seqpar", "plan", f"{file}:waits"]
    command += ["--topology", "cpu:8", "--tokens", "8"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: pids.exists() and pids.read_text() != "")
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not alive(int(pids.read_text())))


def wait_for(condition: Any) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.2)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("topology", "install"), (("v5e:4x4", "pip install libtpu"), ("h100:8", "[cuda]"))
)
def test_without_the_compiler_it_counts(topology, install, monkeypatch, tmp_path):
    """The plan counts without a compiler, and says which numbers were not checked."""
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "nowhere.so"))
    file = tmp_path / "plan.json"
    result = seqpar("layer", "--topology", topology, "--train", "--json", str(file))
    if topology == "h100:8" and Plan.from_json(file.read_text()).memory is not None:
        pytest.skip("the compiler for GPUs is here")
    assert result.exit_code == 0, result.output
    assert "note: not checked: memory" in result.output
    assert install in result.output
    made = Plan.from_json(file.read_text())
    assert (made.fits, made.memory, made.flops > 1e13) == (None, None, True)
    assert sum(x.count for x in made.collectives) == 8
    result = seqpar("layer", "--topology", topology, "--largest")
    refused(result, "of 131072 tokens: not checked: memory")
    result = seqpar("layer", "--topology", topology, "--dump", str(tmp_path))
    refused(result, f"--dump {tmp_path} is for a compiler, and the compiler for")


def exported(platform: str) -> Any:
    """The public function with a named kernel, exported for four devices."""
    from jax import export

    from jax_seqpar import Blockwise

    layout = MeshLayout()
    mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct(
        (1, 64, 8, 16), jnp.float32, sharding=NamedSharding(mesh, layout.partition_spec)
    )
    attend = jax.jit(
        lambda q, k, v: dot_product_attention(
            q, k, v, is_causal=True, kernel=Blockwise(), layout=layout.on(mesh)
        )
    )
    return export.export(attend, platforms=(platform,))(x, x, x)


def test_an_exported_program_runs_again():
    """Export needs a named kernel: the default is chosen for the machine that exports."""
    pytest.importorskip("flatbuffers")
    from jax import export

    made = exported("cpu")
    again = export.deserialize(made.serialize())
    assert (again.nr_devices, again.platforms) == (4, ("cpu",))
    assert exported("tpu").platforms == ("tpu",)
    mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, MeshLayout().partition_spec)
    alone = jax.random.normal(jax.random.key(0), (1, 64, 8, 16))
    expected = jax.nn.dot_product_attention(alone, alone, alone, is_causal=True)
    x = jax.device_put(alone, sharding)
    found = np.asarray(jax.jit(again.call)(x, x, x))
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)
