"""Checks of batches, losses and tiles."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from ..layout import MeshLayout

Shape = tuple[int, ...]


def check_count(name: str, n: Any) -> None:
    """Raises ValueError unless the number is a positive integer."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name} must be a positive integer, got {n!r}. Write {name}=1 or more.")


def check_has_devices(mesh: Any) -> None:
    """Raises ValueError unless the mesh has devices, as an abstract one has not."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"mesh must be a jax.sharding.Mesh, whose devices hold the batch, got {mesh!r}. "
            f"Write jax.make_mesh((2, 4), ('data', 'seq'))."
        )


def check_document(index: int, document: np.ndarray) -> None:
    """Raises ValueError unless the document is a row of token ids."""
    if document.ndim != 1 or (document.size and document.dtype.kind not in "iu"):
        raise ValueError(
            f"document {index} must be a row of integer token ids, got "
            f"{document.dtype}{list(document.shape)}. Tokenise it first."
        )


def check_batch(tokens: np.ndarray, parts: int, layout: MeshLayout) -> None:
    """Raises ValueError unless tokens are a batch `[B, S]` that the mesh divides."""
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens must be integers [B, S], got {tokens.dtype}{list(tokens.shape)}. For one "
            f"sequence write tokens[None]."
        )
    if 0 in tokens.shape:
        raise ValueError(
            f"tokens [B, S] must not be empty, got {list(tokens.shape)}. Give at least one token."
        )
    if tokens.shape[0] % parts:
        raise ValueError(
            f"batch B = {tokens.shape[0]} is not divisible by the {parts} devices of mesh axis "
            f"{layout.batch!r}. Give {-(-tokens.shape[0] // parts) * parts} sequences (rows of "
            f"segment 0 count for nothing), or MeshLayout(batch=None)."
        )


def check_segments(segments: np.ndarray, shape: Shape, lengths: Any) -> None:
    """Raises ValueError unless every segment is one run of tokens."""
    if lengths is not None:
        raise ValueError("give segment_ids or lengths, not both: segment 0 is padding.")
    if segments.shape != shape or segments.dtype.kind not in "iu":
        raise ValueError(
            f"segment_ids must be integers [B, S] = {list(shape)} like tokens, got "
            f"{segments.dtype}{list(segments.shape)}. Give those of the whole batch."
        )
    if (segments < 0).any():
        raise ValueError(
            f"segment_ids must not be negative, got {segments.min()}. Padding is segment 0: "
            f"number documents from 1."
        )
    starts = np.ones(shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    for b, (row, start) in enumerate(zip(segments, starts, strict=True)):
        runs = row[start & (row != 0)]
        if len(runs) != len(np.unique(runs)):
            again = next(i for i in runs if (runs == i).sum() > 1)
            raise ValueError(
                f"segment {again} of row {b} is not one run of tokens: it would be attended as one "
                f"document and counted as two. Give each document a number of its own in its row."
            )


def check_not_masked(name: str, x: Any) -> None:
    """Raises ValueError for a masked array, whose mask would be lost."""
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError(
            f"{name} is a masked array, and its mask would be lost. Write {name}.filled(0), and "
            f"give what is masked as segment 0."
        )


def check_no_token_is(ignore: int, tokens: np.ndarray, segments: np.ndarray) -> None:
    """Raises ValueError for a token that would be taken for the label that nobody predicts."""
    hits = np.argwhere((tokens == ignore) & (segments != 0))
    if hits.size:
        b, s = hits[0]
        raise ValueError(
            f"the token at [{b}, {s}] is {ignore}, which as a label means that nobody has to "
            f"predict it. Give tokens from 0 to V - 1, padding as segment 0."
        )


def check_lengths(lengths: np.ndarray, shape: Shape) -> None:
    """Raises ValueError unless lengths fit the rows."""
    fits = lengths.shape == shape[:1] and lengths.dtype.kind in "iu"
    if not fits or (lengths < 0).any() or (lengths > shape[1]).any():
        raise ValueError(
            f"lengths must be {shape[0]} integers from 0 to S = {shape[1]}, one for each row of "
            f"tokens, got {lengths.dtype}{list(lengths.shape)} {lengths.tolist()}. Give how many "
            f"tokens of each row are before its padding."
        )


def check_targets(targets: np.ndarray, shape: Shape, labels: Any) -> None:
    """Raises ValueError unless targets are integers like tokens, given without labels."""
    if labels is not None:
        raise ValueError("give labels (not shifted) or targets (shifted), not both.")
    if targets.shape != shape or targets.dtype.kind not in "iu":
        raise ValueError(
            f"targets must be integers [B, S] = {list(shape)} like tokens, got "
            f"{targets.dtype}{list(targets.shape)}. Give what each token is to predict, or leave "
            f"targets out for the token that follows."
        )


def check_labels(labels: np.ndarray, tokens: np.ndarray, ignore: int) -> None:
    """Raises ValueError unless labels are the tokens, not shifted, or the label to ignore."""
    if labels.shape != tokens.shape or labels.dtype.kind not in "iu":
        shifted = labels.shape == (tokens.shape[0], tokens.shape[1] - 1)
        raise ValueError(
            f"labels must be integers [B, S] = {list(tokens.shape)} like tokens, got "
            f"{labels.dtype}{list(labels.shape)}. "
            + (
                "They look shifted already: give labels=tokens, or leave labels out."
                if shifted
                else f"Use {ignore} for tokens that nobody has to predict."
            )
        )
    own = (labels == ignore) | (labels == tokens)
    if own.all():
        return
    b, s = np.argwhere(~own)[0]
    following = (labels[:, :-1] == ignore) | (labels[:, :-1] == tokens[:, 1:])
    if following.size and following.all():
        raise ValueError(
            f"labels are shifted already: each is the token that follows. Got {labels[b, s]} at "
            f"[{b}, {s}], where the token is {tokens[b, s]}. They are shifted here, before the "
            f"tokens are sharded. Give labels=tokens, or what you have as targets=."
        )
    raise ValueError(
        f"labels must be the tokens themselves, or {ignore} for those that nobody has to predict; "
        f"at [{b}, {s}] the label is {labels[b, s]} and the token {tokens[b, s]}. Give what each "
        f"token is to predict as targets=."
    )


def check_of_batch(shape: Shape, padded: Shape) -> None:
    """Raises ValueError unless the array has the batch's tokens."""
    if tuple(shape[:2]) != tuple(padded):
        raise ValueError(
            f"x must be [B, S, ...] of the batch's {list(padded)} tokens, padding included, got "
            f"shape {list(shape)}. Give what the model made of this batch."
        )


def check_loss(logits: Any, labels: Any, z_loss: float, label_smoothing: float) -> None:
    """Raises ValueError unless logits, labels and options fit together."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers, got {labels.dtype}: not probabilities. Give the id of one "
            f"token for each."
        )
    if logits is not None and logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits must be [*tokens, V] of labels [*tokens], got {logits.shape} and "
            f"{labels.shape}. Shift labels, do not cut logits: TokenLayout.shard does."
        )
    if z_loss < 0 or not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"z_loss must be at least 0 and label_smoothing from 0 to 1, got {z_loss} and "
            f"{label_smoothing}. Write 0 for none."
        )


def check_normaliser(normaliser: Any) -> None:
    """Raises ValueError unless the normaliser is one integer, not negative."""
    if normaliser is None:
        return
    is_integer = type(normaliser) is int or (
        hasattr(normaliser, "dtype")
        and normaliser.shape == ()
        and jnp.issubdtype(normaliser.dtype, jnp.integer)
    )
    if not is_integer or (not isinstance(normaliser, Tracer) and int(normaliser) < 0):
        raise ValueError(
            f"normaliser must be one integer, how many labels count, got {normaliser!r}. Weigh the "
            f"loss after it is returned."
        )


def check_ignore_index(index: Any) -> None:
    """Raises ValueError unless the label that does not count is an integer of 32 bits."""
    if isinstance(index, bool) or not isinstance(index, int | np.integer) or abs(index) >= 1 << 31:
        raise ValueError(
            f"ignore_index must be a Python integer of 32 bits, got {index!r}. Write -100, which "
            f"no token is."
        )


def check_int32(name: str, x: np.ndarray) -> None:
    """Raises ValueError unless every number fits into 32 bits."""
    if x.size and (x.max() > 2**31 - 1 or x.min() < -(2**31)):
        raise ValueError(
            f"{name} must be integers of 32 bits, got {x.min()} to {x.max()}. Number them "
            f"anew, for example by np.unique(..., return_inverse=True)."
        )


def check_projection(hidden: Any, kernel: Any, labels: Any) -> None:
    """Raises ValueError unless hidden states, kernel and labels fit together."""
    fits = len(hidden.shape) == 3 and len(kernel.shape) == 2
    if not fits or hidden.shape[2] != kernel.shape[0] or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden must be [B, S, D], kernel [D, V] and labels [B, S], got {hidden.shape}, "
            f"{kernel.shape} and {labels.shape}. Of a tied embedding [V, D] give embedding.T."
        )


def check_token_arrays(arrays: Sequence[Any]) -> None:
    """Raises ValueError unless the arrays have the same tokens."""
    shapes = [tuple(x.shape) for x in arrays]
    if not shapes or any(len(s) < 2 for s in shapes) or len({s[:2] for s in shapes}) > 1:
        raise ValueError(
            f"map_tiles takes arrays [B, S, ...] of the same tokens, got {shapes}. Pass what has "
            f"no tokens in params."
        )


def check_division(shape: Shape, data: int, degree: int, layout: MeshLayout) -> None:
    """Raises ValueError unless the mesh divides the tokens."""
    for name, n, parts, axes in (
        ("batch B", shape[0], data, layout.batch),
        ("tokens S", shape[1], degree, layout.tokens),
    ):
        if n % parts:
            raise ValueError(
                f"{name} = {n} is not divisible by the {parts} devices of mesh axis {axes!r}. "
                f"Use TokenLayout(mesh, layout).shard, which pads the tokens of a batch."
            )
