"""Dropout of attention weights: a function of a key and of the place of the weight alone.

The bits are those of the specification, `jax_seqpar/exact/SPEC.md`, on every device, block and
rank. Words of 32 bits are int64 here, for PyTorch adds and shifts few unsigned integers.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
PARITY = 0x1BD11BDA
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

Words = tuple[Tensor, Tensor]


def keep(rng: Tensor, rate: float, B: int, N: int, T: int, S: int) -> Tensor:
    """True where a weight is kept.

    Args:
      rng: the key of the whole attention or those of its heads, see `head_keys`.
      rate: the share that is dropped, see `limit`.
      B, N, T, S: batch, query heads, queries, keys.

    Returns:
      Boolean, `[B, N, T, S]`.
    """
    t = torch.arange(T, device=rng.device)[:, None]
    s = torch.arange(S, device=rng.device)
    return is_kept(head_keys(rng, B, N)[:, :, None, None], rate, t, s)


def is_kept(keys: Tensor, rate: float, t: Tensor, s: Tensor) -> Tensor:
    """True where the weight of query t and key s is kept, under keys of heads `[..., 2]`."""
    word, _ = threefry2x32((keys[..., 0], keys[..., 1]), (t, s))
    return word >= limit(rate)


def head_keys(rng: Tensor, B: int, N: int) -> Tensor:
    """The key of every head, which may be sliced like any other tensor of heads.

    Args:
      rng: `(2,)`, the two words of a threefry key, uint32 or other integers from 0 to 2^32 - 1;
        or keys `[B, N, 2]` as they are returned here.
      B, N: batch and query heads.

    Returns:
      int64, `[B, N, 2]`.

    Raises:
      ValueError: another shape, or numbers that are not words of 32 bits.
    """
    if rng.shape not in ((2,), (B, N, 2)):
        raise ValueError(
            f"dropout_rng must be the two words of a key, (2,), or keys of heads [B, N, 2] = "
            f"{(B, N, 2)}. Got {tuple(rng.shape)}. Write torch.tensor([0, seed])."
        )
    if rng.is_floating_point() or rng.is_complex() or rng.dtype == torch.bool:
        raise ValueError(f"dropout_rng must be integers, got {rng.dtype}. Write rng.long().")
    key = rng.long()
    if ((key < 0) | (key > WORD)).any():
        raise ValueError(
            f"dropout_rng must be from 0 to 2^32 - 1, got {key.min()} to {key.max()}. Of int32, "
            f"write rng.view(torch.uint32)."
        )
    if key.ndim == 3:
        return key
    b = torch.arange(B, device=key.device)[:, None]
    n = torch.arange(N, device=key.device)
    return torch.stack(threefry2x32((key[0], key[1]), (b, n)), dim=-1)


def given_keys(
    rate: float, rng: Tensor | None, B: int, N: int, device: torch.device
) -> Tensor | None:
    """The keys of the heads, `[B, N, 2]`, on a device; None where nothing is dropped.

    Raises:
      ValueError: as `limit` and `head_keys`, or no key for a rate above 0.
    """
    limit(rate)
    if rate == 0:
        return None
    if rng is None:
        raise ValueError(
            f"dropout_rate = {rate!r} needs a key. Write dropout_rng=torch.tensor([0, seed])."
        )
    return head_keys(rng, B, N).to(device)


def limit(rate: float) -> int:
    """A weight is dropped where its word is below this.

    Raises:
      ValueError: a rate below 0, or none that leaves a word of 2^32: 1 - 2^-32 or more.
    """
    if not 0 <= rate < 1 - 2.0**-32:
        raise ValueError(
            f"dropout_rate must be at least 0 and below 1 - 2^-32, got {rate!r}. It is the share "
            "that is dropped, not the one that is kept: write 0.1 to drop a tenth."
        )
    # Half to even, as rint.
    return round(rate * 2.0**32)


def gain(rate: float) -> float:
    """`c`, by which the weights that are kept grow."""
    return 2**32 / (2**32 - limit(rate))


def threefry2x32(key: Words, counter: Words) -> Words:
    """Threefry of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
      key, counter: two int64 words of 32 bits each; all four broadcast.

    Returns:
      Two int64 words of 32 bits.
    """
    schedule = (*key, key[0] ^ key[1] ^ PARITY)
    x, y = (c + k & WORD for c, k in zip(counter, key, strict=True))
    for group in range(1, 6):
        for turn in ROTATIONS[(group - 1) % 2]:
            x = x + y & WORD
            y = (y << turn | y >> 32 - turn) & WORD ^ x
        x = x + schedule[group % 3] & WORD
        y = y + schedule[(group + 1) % 3] + group & WORD
    return x, y
