"""Attention whose bits do not depend on how it is computed.

Every sum is exact and every rounding is at a stated place, so the result is a mathematical function
of the inputs: tiling, FMA, thread count, device count, mesh and framework cannot change a bit of
it. `SPEC.md` beside this file is that function. `jax_seqpar.exact`, `torch_ref.exact` and the
integer oracle of the tests are written from it, not from one another.
"""

from .arithmetic import exact_dot as exact_dot
from .attention import Exact as Exact
from .attention import exact_attention as exact_attention
from .self_test import certify as certify
