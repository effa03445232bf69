"""Weights of PyTorch as a Flax tree and back, by a mapping that is data."""

from .convert import from_torch as from_torch
from .convert import to_torch_state as to_torch_state
from .mapping import Fused as Fused
from .mapping import Ignored as Ignored
from .mapping import Map as Map
from .mapping import Tied as Tied
