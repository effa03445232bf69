"""Ray: python examples/launch/ray_hosts.py 2 --degree 16 --folder run, on a host of the cluster.

One process on each host, with all of its GPUs: GPUS_PER_HOST, by default 8, 0 without GPUs. The
repository lies at the same path on every host, from where Ray was started.
"""

import os
import socket
import subprocess
import sys

import ray  # pyright: ignore[reportMissingImports]
from ray.util.placement_group import placement_group  # pyright: ignore[reportMissingImports]
from ray.util.scheduling_strategies import (  # pyright: ignore[reportMissingImports]
    PlacementGroupSchedulingStrategy,
)


class Host:
    """One host of the training."""

    def address(self) -> str:
        """HOST:PORT, free here, for the coordinator."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def train(self, coordinator: str, processes: int, process: int, options: list[str]) -> int:
        """The exit status of the training's process here."""
        several = ["--coordinator", coordinator, "--processes", str(processes)]
        command = [sys.executable, "examples/train_long_context.py", *several]
        return subprocess.run([*command, "--process", str(process), *options]).returncode


def main(hosts: int, gpus: int, options: list[str]) -> int:
    """The highest exit status of the hosts: 0, or 75 where they saved and left."""
    ray.init(address="auto")
    # Strictly spread: a bundle on each host. A process that has no GPU takes a CPU.
    bundle = {"GPU": gpus} if gpus else {"CPU": 1}
    group = placement_group([bundle] * hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    started = [
        ray.remote(Host)
        .options(
            num_gpus=gpus,
            num_cpus=0 if gpus else 1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, i),
        )
        .remote()
        for i in range(hosts)
    ]
    coordinator = ray.get(started[0].address.remote())
    waiting = [host.train.remote(coordinator, hosts, i, options) for i, host in enumerate(started)]
    return max(ray.get(waiting))


if __name__ == "__main__":
    gpus = int(os.environ.get("GPUS_PER_HOST", "8"))
    sys.exit(main(int(sys.argv[1]), gpus, sys.argv[2:]))
