"""Sequence-parallel attention for JAX.

The alphabet, used everywhere: B batch, S key tokens, T query tokens (where their number differs),
N query heads, K KV heads, H head dimension, P devices of the sequence-parallel axis.
`[B, S@seq, N, H]` is an array whose token axis is sharded over mesh axis "seq", as `jax.typeof`
prints it.
"""

import types as _types

from .attention import dot_product_attention as dot_product_attention
from .compiler_options import compiler_options as compiler_options
from .exact import Exact as Exact
from .exact import exact_attention as exact_attention
from .kernels import Blockwise as Blockwise
from .kernels import Dense as Dense
from .kernels import FunctionKernel as FunctionKernel
from .kernels import Fused as Fused
from .kernels import KernelChoice as KernelChoice
from .kernels import Triton as Triton
from .kernels import blockwise_attention as blockwise_attention
from .kernels import choose_kernel as choose_kernel
from .kernels import dense_attention as dense_attention
from .kernels import fused_attention as fused_attention
from .mask import Dropout as Dropout
from .mask import Logits as Logits
from .mask import Mask as Mask
from .mask import head_keys as head_keys
from .mask.sequence_padding import Padded as Padded
from .mask.sequence_padding import pad_to_degree as pad_to_degree
from .mesh_layout import MeshLayout as MeshLayout
from .order import Contiguous as Contiguous
from .order import Striped as Striped
from .order import TokenOrder as TokenOrder
from .order import Zigzag as Zigzag
from .strategies import AllGatherKV as AllGatherKV
from .strategies import Chip as Chip
from .strategies import Hybrid as Hybrid
from .strategies import Ring as Ring
from .strategies import StrategyChoice as StrategyChoice
from .strategies import Ulysses as Ulysses
from .strategies import choose_strategy as choose_strategy
from .strategies import heads_to_sequence as heads_to_sequence
from .strategies import sequence_to_heads as sequence_to_heads

# The one place of the number: pyproject.toml reads it here, as does the command.
__version__ = "0.1.0"


def __dir__() -> list[str]:
    """The public names; packages such as `jax_seqpar.training` are imported by their own."""
    names = [name for name, x in globals().items() if not isinstance(x, _types.ModuleType)]
    return ["__version__", *(name for name in names if not name.startswith("_"))]
