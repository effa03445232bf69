"""Attention and training whose bits do not depend on how they are computed: the reference in
PyTorch.

The attention is written from `jax_seqpar/exact/SPEC.md`, not from the JAX version of it. A module
for each operation of a transformer, each with its own derivative: `linear`, `norm`, `rotary`,
`activation`, `embedding`, `residual`, `dropout`, `loss`; of a step, `clip` and `optimizer`. They
are made of `rounding`, `elementary`, `normal`, `sums` and `matmul`. `decoder` and `training_step`
put them together, `encoder` is another model, `ranks` says which rank has which tokens.
"""

from .attention import exact_attention as exact_attention
