"""Prints, in a process of its own, what exact attention hashes to: `python exact_hash.py`.

On one device and on four, so that a flag of the process meets the collectives, too; with a grouped
query head on several devices, inputs of every magnitude, and everything that adds three numbers or
multiplies three, which fast-math flags may order anew: a soft cap, a bias, slopes, dropout.
"""

import hashlib

import jax
import numpy as np
from flat_names import keywords_of

from jax_seqpar import Exact, MeshLayout, dot_product_attention, exact_attention
from jax_seqpar.parity.inputs import Case, adversarial

CASE = Case(batch=2, tokens=40, heads=8, kv_heads=2, head_dim=24)
OPTIONS = {
    "is_causal": True,
    "logits_soft_cap": 20.0,
    "bias": np.random.default_rng(7).standard_normal((1, 8, 40, 40)).astype(np.float32),
    "alibi_slopes": (0.5 ** np.arange(1, 9)).astype(np.float32),
    "dropout_rate": 0.3,
    "dropout_rng": np.array([7, 11], np.uint32),
}


def inputs() -> list[np.ndarray]:
    """Query, key, value and grad."""
    return list(adversarial(CASE.inputs()).values())


def sha256(arrays: list) -> str:
    """SHA-256 of the bits of arrays, one after the other."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def main() -> None:
    """Prints the hash for one device, and the hash for four, a line each."""
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,))

    def alone(*operands):
        return Exact(query_chunk=16, key_chunk=24)(*operands, **keywords_of(**OPTIONS))

    def sharded(*operands):
        return dot_product_attention(
            *operands,
            kernel=exact_attention,
            layout=MeshLayout(mesh=mesh),
            **keywords_of(**OPTIONS),
        )

    for attend in (alone, sharded):

        def run(query, key, value, grad, attend=attend):
            out, pull = jax.vjp(attend, query, key, value)
            return [out, *pull(grad)]

        print(sha256(jax.jit(run)(*inputs())))


if __name__ == "__main__":
    main()
