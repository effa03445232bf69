"""Ulysses attention in PyTorch: the corrected reference, its oracles, and the versions it corrects.

`dense` is attention in float64, `layout` which rank holds what, with the rank as a visible axis,
`ulysses` its two reshards over `torch.distributed`, `ring` ring attention, `exact` attention whose
bits do not depend on how it is computed, `masks` who attends to whom, `dropout` which weights are
dropped, `history` the wrong published versions.
"""
