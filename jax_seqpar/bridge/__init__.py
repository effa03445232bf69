"""The bridge: the one place that sees both JAX and PyTorch, each only when it is used."""

from .bits import compare_bits as compare_bits
from .bits_report import BitsReport as BitsReport
from .bits_report import LeafReport as LeafReport
from .convert import to_jax as to_jax
from .convert import to_torch as to_torch
from .kernels import as_torch_attention as as_torch_attention
from .kernels import staged_attention as staged_attention
from .ranks import RankError as RankError
from .ranks import run_ranks as run_ranks
