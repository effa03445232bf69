"""The bridge: the one place that sees both JAX and PyTorch, each only when it is used."""

from .bits import compare_bits as compare_bits
from .bits_report import BitsReport as BitsReport
from .bits_report import LeafReport as LeafReport
from .convert import to_jax as to_jax
from .convert import to_torch as to_torch
from .divergence import Divergence as Divergence
from .divergence import divergence_table as divergence_table
from .divergence import first_divergence as first_divergence
from .kernels import as_torch_attention as as_torch_attention
from .kernels import staged_attention as staged_attention
from .mapping import Fused as Fused
from .mapping import Ignored as Ignored
from .mapping import Map as Map
from .mapping import Tied as Tied
from .ranks import RankError as RankError
from .ranks import run_ranks as run_ranks
from .tensor_files import load_safetensors as load_safetensors
from .weights import from_torch as from_torch
from .weights import to_torch_state as to_torch_state
