"""Decoding: a cache of keys and values sharded along the tokens, and the attention to it."""

from .attention import attend_to_cache as attend_to_cache
from .cache import KeyValueCache as KeyValueCache
from .slot_blocks import SlotBlocks as SlotBlocks
from .split_kv import SplitKV as SplitKV
