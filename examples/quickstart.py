"""Attention over a sequence that is sharded over four devices, and its gradient.

    python examples/quickstart.py

Runs on simulated CPU devices; on a GPU or TPU machine drop the first line of `main`.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jax_seqpar import MeshLayout, dot_product_attention


def main() -> None:
    """Prints the shardings of an attention, of its gradient, and the all-to-alls between."""
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((2, 4), ("data", "seq"))
    layout = MeshLayout(batch="data", tokens="seq")
    sharding = NamedSharding(mesh, layout.partition_spec)

    query = jax.random.normal(jax.random.key(0), (2, 1024, 8, 64))
    key, value = jax.random.normal(jax.random.key(1), (2, 2, 1024, 4, 64))
    query, key, value = jax.device_put((query, key, value), sharding)
    print("query      ", jax.typeof(query))

    @jax.jit
    def loss(query, key, value):
        out = dot_product_attention(query, key, value, is_causal=True, layout=layout.on(mesh))
        return jnp.mean(out**2)

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    mean, (dq, dk, _) = value_and_grad(query, key, value)
    print("loss       ", float(mean))
    print("d loss/dq  ", jax.typeof(dq))
    print("d loss/dk  ", jax.typeof(dk))

    text = value_and_grad.lower(query, key, value).compile().as_text() or ""
    print("all-to-alls", text.count(" all-to-all("), "in the compiled program")


if __name__ == "__main__":
    main()
