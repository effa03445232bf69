#!/usr/bin/env bash
# Cloud TPU: bash examples/launch/tpu_vm.sh NAME ZONE, from a machine with gcloud. The same command
# starts on every worker, which finds the others by the metadata of the TPU. The repository and its
# .venv, with the extra "tpu", lie in the home of each; the folder has to be one that every worker sees.
set -euo pipefail
name=$1
zone=$2
gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
    cd jax-seqpar && exec .venv/bin/python examples/train_long_context.py \
        --distributed --start-within 300 --degree 4 --data 4 --tokens 131072 --folder /mnt/shared/run"
