#!/usr/bin/env bash
# SLURM: sbatch examples/launch/slurm.sh, from the root of the repository, on a file system that every
# node sees. One process for each GPU: jax.distributed.initialize gives each the GPU of its SLURM_LOCALID.
#SBATCH --job-name=long-context
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
# To every process, three minutes before the time is over: each saves and leaves with status 75.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

srun --kill-on-bad-exit=1 .venv/bin/python examples/train_long_context.py \
    --distributed --start-within 300 --degree 8 --data 2 --tokens 131072 --folder run
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
