"""Bridge between JAX and PyTorch: the one package that imports both, each when it is used."""

from .convert import to_jax as to_jax
from .convert import to_torch as to_torch
from .shared_kernels import as_torch_attention as as_torch_attention
from .shared_kernels import staged_attention as staged_attention
from .tensor_files import load_safetensors as load_safetensors
from .torch_ranks import RankError as RankError
from .torch_ranks import run_ranks as run_ranks
from .weights import Fused as Fused
from .weights import Ignored as Ignored
from .weights import Map as Map
from .weights import Tied as Tied
from .weights import from_torch as from_torch
from .weights import to_torch_state as to_torch_state
