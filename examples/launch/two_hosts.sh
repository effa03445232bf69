#!/usr/bin/env bash
# Two processes of this machine, with two simulated devices each, stand for two hosts:
#     bash examples/launch/two_hosts.sh --tokens 1024 --steps 10 --folder run
# Options are those of examples/train_long_context.py, the interpreter $PYTHON or that of .venv.
# SIGTERM saves, and the exit status is then 75.
set -uo pipefail
python=${PYTHON:-.venv/bin/python}
port=$($python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

started=()
trap 'kill -TERM "${started[@]}"' TERM INT
for process in 0 1; do
    JAX_PLATFORMS=cpu $python examples/train_long_context.py --degree 4 \
        --coordinator "localhost:$port" --processes 2 --process "$process" "$@" &
    started+=($!)
done

status=0
for process in "${started[@]}"; do
    wait "$process" || status=$?
    # A signal interrupts the wait and not the process.
    while kill -0 "$process" 2>/dev/null; do
        wait "$process"
        status=$?
    done
done
exit "$status"
