"""Attention whose bits do not depend on how it is computed: the reference in PyTorch.

Written from `jax_seqpar/exact/SPEC.md`, not from the JAX version of it.
"""

from .attention import exact_attention as exact_attention
