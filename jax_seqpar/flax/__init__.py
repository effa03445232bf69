"""Attention for Flax models: one argument of Flax's own layers, or a layer for decoders."""

from .attention import Attention as Attention
from .attention_fn import SequenceParallel as SequenceParallel
from .projection import Projection as Projection
from .projection import gather as gather
from .projection import parameter as parameter
from .rotary import Rotary as Rotary
