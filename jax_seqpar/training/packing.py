"""Documents in rows of one length, without losing a token."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .._checks import as_numbers, check_count, check_int32


def pack_documents(
    documents: Iterable[Sequence[int] | np.ndarray], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Puts documents one after another into rows.

    A document that does not fit is continued in the next row, as a separate document there.

    Args:
      documents: of token ids; empty ones are left out.
      tokens: S, of each row.

    Returns:
      tokens and segment ids, int32 `[B, S]`: documents are numbered from 1 in each row, the end of
      the last row is padding, token and segment 0. B is 0 where there are no documents.

    Raises:
      ValueError: if a document is not one row of integers.

    Example:
      tokens, segment_ids = pack_documents([[5, 6, 7], [8, 9]], tokens=4)
      # [[5, 6, 7, 8], [9, 0, 0, 0]] and [[1, 1, 1, 2], [1, 0, 0, 0]]
    """
    check_count("tokens", tokens)
    arrays: list[Any] = [as_numbers(f"document {i}", x) for i, x in enumerate(documents)]
    for i, document in enumerate(arrays):
        check_document(i, document)
        check_int32(f"document {i}", document)
    arrays = [x for x in arrays if x.size]
    stream = np.concatenate([np.zeros(0, np.int32), *arrays]).astype(np.int32)
    number = np.repeat(np.arange(1, len(arrays) + 1), [len(x) for x in arrays])
    rows = -(-len(stream) // tokens)
    more = rows * tokens - len(stream)
    stream, number = (np.pad(x, (0, more)).reshape(rows, tokens) for x in (stream, number))
    # Numbered from 1 in each row.
    first = number[:, :1]
    return stream, np.where(number > 0, number - first + 1, 0).astype(np.int32)


def check_document(index: int, document: np.ndarray) -> None:
    """Raises ValueError unless the document is a row of token ids."""
    if document.ndim != 1 or (document.size and document.dtype.kind not in "iu"):
        raise ValueError(
            f"document {index} must be a row of integer token ids, got "
            f"{document.dtype}{list(document.shape)}. Tokenise it first."
        )
