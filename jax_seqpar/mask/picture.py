"""A mask as a picture in a terminal: which queries attend to which keys, and which blocks exist."""

import math

import numpy as np

from .block_ranges import keys_of
from .mask import Mask, check_mask_arrays
from .token_numbers import Tokens

NOTHING, SOME, ALL = "\u00b7", "\u2592", "\u2588"


def blocks(mask: Mask, queries: int, keys: int, *, size: int = 512) -> np.ndarray:
    """Blocks that a kernel has to compute if it skips the blocks that the mask rules out.

    Args:
      queries, keys: T and S of the whole sequence.
      size: tokens of a block, of queries and of keys.

    Returns:
      boolean `[ceil(T / size), ceil(S / size)]`: in each row of blocks, True from the first to the
      last key that some query may attend to by causality, window, positions, segments and lengths.
      A mask array is not read: its blocks all exist.
    """
    found = np.zeros((math.ceil(queries / size), math.ceil(keys / size)), bool)
    for i in range(len(found)):
        block = Tokens(i * size, min(size, queries - i * size))
        low, high = map(int, keys_of(mask, block, Tokens(0, keys)))
        found[i, low // size : math.ceil(high / size)] = low < high
    return found


def draw(
    mask: Mask, queries: int, keys: int, *, columns: int = 64, batch: int = 0, head: int = 0
) -> str:
    """The mask of one sequence and head as lines of text, queries from top to bottom.

    A character stands for `ceil(S / columns)` keys and twice as many queries: \u2588 where all
    pairs attend, \u2592 where some do, \u00b7 where none does.

    Args:
      queries, keys: T and S of the whole sequence. All pairs are in memory: of a longer sequence
        than some ten thousand tokens draw a shorter one with a narrower window.
      columns: the most characters of a line.
      batch, head: of arrays that have more than one.

    Raises:
      ValueError: for arrays that no attention takes, and a batch or head that they do not have.

    Example:
      print(draw(Mask(is_causal=True, local_window_size=(255, 0)), 1024, 1024))
    """
    check_mask_arrays(mask)
    allowed = mask.attends(Tokens(0, queries), Tokens(0, keys))
    pairs = np.ones((queries, keys), bool)
    if allowed is not None:
        x = np.asarray(allowed)
        for name, n, size in (("batch", batch, x.shape[0]), ("head", head, x.shape[1])):
            if not 0 <= n < size and size > 1:
                raise ValueError(f"{name} = {n} of {mask}. Give one from 0 to {size - 1}.")
        x = x[min(batch, x.shape[0] - 1), min(head, x.shape[1] - 1)]
        pairs = np.broadcast_to(x, (queries, keys))
    wide = max(math.ceil(keys / columns), 1)
    high = min(2 * wide, max(queries, 1))
    lines = []
    for top in range(0, queries, high):
        row = [pairs[top : top + high, left : left + wide] for left in range(0, keys, wide)]
        lines.append("".join(ALL if x.all() else SOME if x.any() else NOTHING for x in row))
    return "\n".join(lines)
