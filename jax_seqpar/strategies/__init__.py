"""Strategies that share one attention over devices: communication inside `jax.shard_map`."""

from ..chips import Chip as Chip
from .all_gather import AllGatherKV as AllGatherKV
from .choice import StrategyChoice as StrategyChoice
from .choice import choose_strategy as choose_strategy
from .hybrid import Hybrid as Hybrid
from .reshard import heads_to_sequence as heads_to_sequence
from .reshard import sequence_to_heads as sequence_to_heads
from .ring import Ring as Ring
from .strategy import Strategy as Strategy
from .ulysses import Ulysses as Ulysses
