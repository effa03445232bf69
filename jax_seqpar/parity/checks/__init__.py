"""Checks of the parity run: each is one computation, done by JAX and by PyTorch ranks.

`run_jax` gives global arrays, `run_torch` what one rank holds, `joined` puts the ranks' parts
together, `truth` is the answer where it is known without computing: a reshard leaves the global
array as it is. Inputs are global NumPy arrays, so a check travels to a rank as it is.
"""

from .pipeline import PipelineCheck as PipelineCheck
from .pipeline import history_checks as history_checks
from .reshard import ReshardCheck as ReshardCheck
from .reshard import reshard_checks as reshard_checks

Check = ReshardCheck | PipelineCheck
