"""The launch files: what can be checked of them without the engines that they are for."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from processes import PREEMPTED
from train_long_context import app

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOBSET = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
# What each engine tells a process, of two on this machine; JAX_COORDINATOR_PORT is for a free port.
ENGINES = {
    "SLURM": {
        "SLURM_JOB_ID": "{job}",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "{process}",
        "SLURM_LOCALID": "{process}",
    },
    "Open MPI 4": {
        "OMPI_MCA_orte_hnp_uri": "{job}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "{process}",
        "OMPI_COMM_WORLD_LOCAL_RANK": "{process}",
    },
}
MEETING = """
import sys
sys.path.insert(0, "examples")
import jax
from processes import start
jax.config.update("jax_num_cpu_devices", 2)
count = start(start_within=100, patience=100)
print(f"process {jax.process_index()} of {count}: {jax.device_count()} devices")
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(*command, **environment):
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: x.name)
def test_bash_can_read_it(script):
    run("bash", "-n", str(script))


def test_the_page_names_every_file():
    page = (LAUNCH / "README.md").read_text()
    files = sorted(x.name for x in LAUNCH.iterdir() if x.suffix in (".sh", ".py", ".yaml"))
    assert len(files) == 7
    assert [name for name in files if f"`examples/launch/{name}`" not in page] == []


def test_the_options_that_they_pass_are_those_of_the_example():
    known = {name for x in typer.main.get_command(app).params for name in x.opts}
    container = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    passed = {"gke_jobset.yaml": " ".join(container["args"])}
    for file in (*SCRIPTS, LAUNCH / "ray_hosts.py"):
        lines = re.sub(r"^\s*#.*", "", file.read_text(), flags=re.M)
        passed[file.name] = lines.split("examples/train_long_context.py", 1)[1]
    found = {name: re.findall(r"(?<![\w-])--[a-z][a-z-]*", text) for name, text in passed.items()}
    assert all(found.values()), found
    unknown = {name: set(options) - known for name, options in found.items()}
    assert {name: options for name, options in unknown.items() if options} == {}


def test_the_job_set_restarts_what_was_asked_to_leave_and_fits_its_topology():
    spec = JOBSET["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [PREEMPTED]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert (ROOT / container["command"][1]).is_file()
    chips = job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    options = dict(zip(container["args"], container["args"][1:], strict=False))
    assert job["parallelism"] == job["completions"]
    assert chips == int(rows) * int(columns) == int(options["--degree"]) * int(options["--data"])
    mounts = {x["mountPath"] for x in container["volumeMounts"]}
    assert str(Path(options["--folder"]).parent) in mounts


def test_slurm_starts_again_after_the_status_of_the_example():
    assert f'"$status" -eq {PREEMPTED} ]' in (LAUNCH / "slurm.sh").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_processes_meet_by_what_the_engine_tells_them(engine):
    port = str(free_port())
    started = []
    for process in range(2):
        told = {k: v.format(job=8192, process=process) for k, v in ENGINES[engine].items()}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", MEETING],
                cwd=ROOT,
                env=os.environ | told | {"JAX_COORDINATOR_PORT": port},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [child.communicate(timeout=200)[0] for child in started]
    finally:
        for child in started:
            child.kill()
            child.wait()
    for process, output in enumerate(outputs):
        assert f"process {process} of 2: 4 devices" in output


def test_torchrun_gives_the_reference_the_same_bits_on_any_number_of_ranks():
    def losses(ranks):
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        options = ("--nproc-per-node", str(ranks), "examples/launch/torch_ranks.py")
        output = run(*torchrun, *options, OMP_NUM_THREADS="1")
        return re.findall(r"step (\d): loss \S+, bits (\w{8})", output)

    one = losses(1)
    assert len(one) == len({bits for _, bits in one}) == 3
    assert losses(2) == one
