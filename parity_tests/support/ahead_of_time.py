"""Programs for TPUs and GPUs that tests compile without one, and the memory that they may take.

`compiled` loads the compilers in a process of its own, by running this file with their environment.
"""

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import jax.numpy as jnp

from jax_seqpar import Fused, Mask, Triton
from jax_seqpar.plan import (
    Program,
    compiler_environment,
    kernels_under_transfers,
    platform_of,
    temporaries,
)

HEAD_DIM = 128
DEVICES = {"v5e:2x4": 8, "v5p:2x2x1": 4, "h100:8": 8}


def program(
    topology: str,
    tokens: int,
    heads: int = 16,
    kv_heads: int = 8,
    head_dim: int = HEAD_DIM,
    **options: Any,
) -> Program:
    """Causal attention of one sequence in bfloat16, its tokens over all devices."""
    asked = {"mask": Mask(is_causal=True), "kernel": Fused(platform_of(topology))} | options
    query, key = ((1, tokens, n, head_dim) for n in (heads, kv_heads))
    return Program(topology, query=query, key=key, **asked)


def most_bytes(program: Program) -> int:
    """Bound on the bytes of temporaries on a device: everything gathered once.

    Query, key, value and output, with their gradients if there are any, have all the tokens and
    a device's part of the heads. The kernels leave the log of the sum of exp of each head and
    read positions, in float32; a TPU's over the 128 lanes of a register. Blockwise attention
    also has, of one head, transposes of eight arrays and three blocks of logits; Triton also
    leaves the output in float32, and five numbers of each row.
    """
    devices, tokens = DEVICES[program.topology], program.query[1]
    heads, kv_heads = program.query[2] // devices, program.key[2] // devices
    head_dim, itemsize = program.query[3], jnp.dtype(program.dtype).itemsize
    gathered = 2 * (heads + kv_heads) * head_dim * itemsize
    row = 4 * (128 if platform_of(program.topology) == "tpu" else 1) * (heads + 1)
    passes = 2 if program.gradients else 1
    most = tokens * (passes * gathered + row)
    if isinstance(program.kernel, Triton):
        return most + tokens * heads * (head_dim + 5) * 4
    fused = isinstance(program.kernel, Fused)
    return most if fused else most + tokens * 8 * head_dim * 4 + 3 * 4 * 512**2


def compiled(*programs: Program) -> list[dict[str, Any]]:
    """Compiled programs: "text", optimised, and bytes on a device: "temporaries" and "held".

    "held" is the peak without the arguments.
    """
    done = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps(programs),
        env=os.environ | compiler_environment(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def hiding(text: str) -> set[str]:
    """The kernels that some transfer is under, each once."""
    return {kernel for kernels in kernels_under_transfers(text).values() for kernel in kernels}


def main() -> None:
    results = []
    for program in pickle.load(sys.stdin.buffer):
        found = program.compile()
        sizes: Any = found.memory_analysis()
        held = sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes
        sizes = {"temporaries": temporaries(found), "held": held}
        results.append({"text": found.as_text(), **sizes})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
