"""Real processes: two with two devices each give the bits of one with four."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from jax_seqpar.compare import compare_bits

SCRIPT = Path(__file__).parent / "support" / "two_processes.py"


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def run(processes, folder):
    """Arrays that each device held, by file name."""
    folder.mkdir()
    address = free_address()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(p), str(processes), "4", address, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for p in range(processes)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    return {file.name: np.load(file) for file in sorted(folder.iterdir())}


def test_two_processes_with_two_devices_each(tmp_path):
    one, two = run(1, tmp_path / "one"), run(2, tmp_path / "two")
    assert len(one) == 2 * 4 * 4, "a kernel on each kind of mesh, outputs, devices"
    assert all(np.unique(x).size > x.size // 2 for x in one.values())
    report = compare_bits(two, one)
    assert report.equal, str(report)
