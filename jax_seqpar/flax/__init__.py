"""Attention for Flax models: one argument of Flax's own layers, or a layer for decoders."""

from importlib.util import find_spec

if find_spec("flax") is None:
    raise ImportError(
        "jax_seqpar.flax needs Flax 0.12 or later, which is not installed. Write "
        "pip install 'jax-seqpar[flax]'."
    )

from .arithmetic import Arithmetic as Arithmetic
from .attention import Attention as Attention
from .attention_fn import SequenceParallel as SequenceParallel
from .exact_arithmetic import ExactArithmetic as ExactArithmetic
from .projection import ParameterOptions as ParameterOptions
from .projection import Projection as Projection
from .projection import gather as gather
from .projection import parameter as parameter
from .rotary import Rotary as Rotary
