#!/usr/bin/env bash
# Open MPI: bash examples/launch/open_mpi.sh HOSTFILE, on the first host of the file. With
# PROCESSES_PER_HOST=1 for hosts without GPUs, else one process for each GPU.
set -euo pipefail
hosts=$1
shift
per_host=${PROCESSES_PER_HOST:-8}
python=${PYTHON:-.venv/bin/python}
port=$((20000 + RANDOM % 20000))

# JAX finds Open MPI by a variable that its release 5 does not set: the coordinator and the numbers
# are given, which works with every release.
# shellcheck disable=SC2016  # each process is to expand them
mpirun --hostfile "$hosts" --map-by "ppr:$per_host:node" bash -c '
    export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
    exec "$@" --processes "$OMPI_COMM_WORLD_SIZE" --process "$OMPI_COMM_WORLD_RANK"
' each "$python" examples/train_long_context.py --coordinator "${COORDINATOR:-$(hostname)}:$port" \
    --start-within 300 "$@"
