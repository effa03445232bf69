"""Names the porting bug (transpose, head permutation, sign, ...) that maps one array to another."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Same = Callable[[np.ndarray, np.ndarray], bool]
Change = Callable[[np.ndarray], np.ndarray]


def wide(x: np.ndarray) -> np.ndarray:
    """The numbers in float64, or complex128."""
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def hint(
    a: np.ndarray, b: np.ndarray, differs: np.ndarray, same: Same, tolerance: float
) -> str | None:
    """The first explanation of `b` by `a` that holds.

    Args:
      a, b: of one shape, `[B, S, N, H]`, `[B, S, D]` or `[B, S]`.
      differs: of the same shape, True where the two differ.
      same: whether two arrays agree, in every element.
      tolerance: how far apart elements are at most that agree.

    Returns:
      a phrase, or None if none of these holds: the sign, the order of axes or of channels,
      permuted heads, permuted tokens, sequences that differ from different tokens on.
    """
    for text, change in _changes(a):
        # One sequence first: most changes are told apart by it.
        if same(change(a[:1]), b[:1]) and same(change(a), b):
            return text
    for noun, axis in (("heads", 2), ("tokens", 1)):
        if axis < a.ndim - (noun == "heads") and (
            order := _permutation(a, b, axis, same, tolerance)
        ):
            return f"b has the {noun} of a {_described(order)}"
    return _runs(differs)


def _changes(a: np.ndarray) -> Iterator[tuple[str, Change]]:
    if a.dtype.kind not in "bu":
        yield "b is -a", np.negative
    if a.ndim == 4:
        yield from _layouts(a.shape)
    if a.ndim > 2:
        yield from _channels(a.shape[-1])


def _layouts(shape: tuple[int, ...]) -> Iterator[tuple[str, Change]]:
    """A tensor whose axes were swapped by a reshape, or reshaped where they had to be swapped."""
    S, N, H = shape[1:]
    yield (
        "b is a with [B, S, H, N] in memory, reshaped to [B, S, N, H] where a transpose is needed",
        lambda x: x.swapaxes(2, 3).reshape(x.shape),
    )
    yield (
        "b is a reshaped to [B, S, H, N] and transposed, where a has [B, S, N, H] already",
        lambda x: x.reshape(-1, S, H, N).swapaxes(2, 3),
    )
    yield (
        "b is a with [B, N, S, H] in memory, reshaped to [B, S, N, H] where a transpose is needed",
        lambda x: x.swapaxes(1, 2).reshape(x.shape),
    )
    yield (
        "b is a reshaped to [B, N, S, H] and transposed, where a has [B, S, N, H] already",
        lambda x: x.reshape(-1, N, S, H).swapaxes(1, 2),
    )


def _channels(size: int) -> Iterator[tuple[str, Change]]:
    """Channels `(n h)` read as `(h n)`; with n = 2, halves as interleaved pairs."""
    for n in range(2, size // 2 + 1):
        if size % n == 0:
            yield _channel_text(n, size // n), lambda x, n=n: _regrouped(x, n)


def _regrouped(x: np.ndarray, n: int) -> np.ndarray:
    return x.reshape(*x.shape[:-1], n, -1).swapaxes(-1, -2).reshape(x.shape)


def _channel_text(n: int, h: int) -> str:
    if n == 2:
        return f"b interleaves the halves of a's channels: channels i and i + {h} side by side"
    if h == 2:
        return f"b has a's even channels first, then the odd ones: pairs pulled {n} apart"
    return f"b has a's channels (n h) as (h n), n = {n}, h = {h}"


def _permutation(
    a: np.ndarray, b: np.ndarray, axis: int, same: Same, tolerance: float
) -> list[int] | None:
    """Permutation: for each slice of `b` along the axis the equal slice of `a`, each used once."""
    rows_a, rows_b = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b))
    if not rows_a.size:
        return None
    # Rows are looked up by the element that varies most over them.
    with np.errstate(all="ignore"):
        spread = np.nan_to_num(np.ptp(np.real(wide(rows_a)), axis=0), posinf=0.0)
    column = int(spread.argmax())
    keys, wanted = (np.real(wide(rows[:, column])) for rows in (rows_a, rows_b))
    ranked = np.argsort(keys, kind="stable")
    free = set(range(len(rows_a)))
    with np.errstate(over="ignore"):  # an infinite end of a range leaves no key out
        first = np.searchsorted(keys[ranked], wanted - tolerance, side="left")
        last = np.searchsorted(keys[ranked], wanted + tolerance, side="right")
    order = []
    for row, low, high in zip(range(len(rows_b)), first, last, strict=True):
        # The same index is tried first, so that equal rows, as of padding, stay where they are.
        # Then a few others: where many agree in that element, the search is not worth its time.
        near = itertools.islice((i for i in ranked[low:high].tolist() if i in free), 8)
        places = itertools.chain([row] if row in free else [], near)
        found = next((i for i in places if same(rows_a[i], rows_b[row])), None)
        if found is None:
            return None
        free.remove(found)
        order.append(found)
    return order


def _described(order: list[int]) -> str:
    n = len(order)
    if order == list(reversed(range(n))):
        return "in reverse"
    shift = (-order[0]) % n
    if order == [(i - shift) % n for i in range(n)]:
        return f"shifted by {shift if shift <= n // 2 else shift - n}, around the end"
    more = ", ..." if n > 16 else ""
    return f"in the order {', '.join(map(str, order[:16]))}{more}"


def _runs(differs: np.ndarray) -> str | None:
    """Sequences that differ up to, or from, a token that is another in each sequence."""
    differs = np.asarray(differs.any(axis=tuple(range(2, differs.ndim))))
    S, counts = differs.shape[1], differs.sum(axis=1).tolist()
    # One token, whole sequences, or as many tokens in each are told without a hint.
    if len(set(counts)) < 2 or not any(1 < n < S for n in counts):
        return None
    places = np.arange(S)
    if np.array_equal(differs, places >= S - differs.sum(axis=1, keepdims=True)):
        starts = _by_batch([S - n if n else None for n in counts])
        return (
            f"sequences differ from a token of their own to the end, as by padding, or an error "
            f"that a causal mask carries on: {starts}"
        )
    if np.array_equal(differs, places < differs.sum(axis=1, keepdims=True)):
        ends = _by_batch([n - 1 if n else None for n in counts])
        return f"sequences differ up to a token of their own, as by padding on the left: {ends}"
    return None


def _by_batch(tokens: list[Any]) -> str:
    more = ", ..." if len(tokens) > 8 else ""
    named = (
        f"batch {i} {'nowhere' if t is None else f'token {t}'}" for i, t in enumerate(tokens[:8])
    )
    return ", ".join(named) + more
