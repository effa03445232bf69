"""How the devices share one attention: the communication, for use inside `jax.shard_map`."""

from .reshard import heads_to_sequence as heads_to_sequence
from .reshard import sequence_to_heads as sequence_to_heads
from .ulysses import ulysses_attention as ulysses_attention
