"""Scopes of a program: the `jax.named_scope` in which an instruction was written."""

import re

# Names that JAX gives; what is between them is the user's.
OF_JAX = {
    *("jit", "pjit", "jvp", "transpose", "vmap", "shard_map", "checkpoint", "closed_call", "while"),
    *("rematted_computation", "cond", "body", "scan", "remat", "custom_vjp", "custom_jvp"),
}
# And those of the kernels of JAX.
OF_KERNELS = re.compile(
    r"branch_\d+|(static|dynamic)_sparsity_splash|splash_|dot_product_attention"
)
DEPTH = 2


def part_of(scope: str) -> str:
    """The outermost two scopes, "layer/mlp" of `jvp(layer)/mlp/...`; "" outside of any."""
    names = []
    for name in re.split(r"[/()]+", re.sub(r"\b(?:jit|pjit)\([^()]*\)", "", scope)):
        if "->" in name:  # an einsum's
            break
        if name and name not in OF_JAX and not OF_KERNELS.match(name):
            names.append(name)
    return "/".join(names[:DEPTH])
