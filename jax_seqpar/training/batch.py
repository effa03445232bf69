"""Batches of tokens sharded over a mesh, with labels, positions and segments."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Integer

from .._checks import Shape, as_numbers, check_int32
from ..device_order import warn_of_slow_order
from ..mesh_layout import MeshLayout, axes_size, check_is_layout, check_mesh, names
from .loss import IGNORE


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "labels", "positions", "segment_ids", "normaliser"],
    meta_fields=["size"],
)
@dataclass(frozen=True)
class Batch:
    """A batch on the mesh, its tokens padded to the degree, in the order of the layout.

    A pytree, so its leaves may be anything that JAX puts there.

    Attributes:
      tokens: int32 `[B, S2]`.
      labels: `[B, S2]`, the token that each is to predict; `IGNORE` at the end of a document, in
        padding, and where the caller said so.
      positions: `[B, S2]`, counted from 0 in each document.
      segment_ids: `[B, S2]`, of the documents, padding 0; None where a row is one document without
        padding.
      normaliser: `[]`, the number of labels of the whole batch that are not `IGNORE`; with another
        `ignore_index` of the loss count the labels yourself.
      size: B and S before padding.
    """

    tokens: Any
    labels: Any
    positions: Any
    segment_ids: Any
    normaliser: Any
    size: tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """Says how tokens lie on a mesh; shards batches accordingly, and brings results back.

    Args:
      layout: the mesh, whose devices may be of several processes, which of its axes share the
        batch and the tokens, and in which order: with another than the contiguous one all arrays
        of a batch lie in it, after labels were shifted, and `unshard` brings results back.

    Warns where another order of the devices would keep a sequence within slices or hosts.

    Raises:
      ValueError: for a layout without a mesh of devices, or with axes that the mesh lacks.

    Example:
      place = TokenLayout(MeshLayout(batch="data", tokens="seq", mesh=mesh))
      batch = place.shard(tokens, segment_ids=documents)
      logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
      loss = cross_entropy(logits, batch.labels, normaliser=batch.normaliser)
      place.unshard(logits, batch)  # NumPy, [B, S, V]
    """

    layout: MeshLayout

    def __post_init__(self) -> None:
        check_is_layout(self.layout)
        check_has_devices(self.layout.mesh)
        check_mesh(self.layout, self.mesh.shape, ())
        warn_of_slow_order(self.layout, self.mesh)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the layout."""
        assert isinstance(self.layout.mesh, Mesh)
        return self.layout.mesh

    @property
    def degree(self) -> int:
        """P, the devices that share the tokens of a sequence."""
        return axes_size(self.layout.tokens, self.mesh.shape)

    @property
    def sharding(self) -> NamedSharding:
        """NamedSharding of tokens `[B, S]`."""
        return NamedSharding(self.mesh, self.layout.token_spec)

    def shard(
        self,
        tokens: Integer[Any, "B S"],
        *,
        segment_ids: Integer[Any, "B S"] | None = None,
        lengths: Integer[Any, "B"] | None = None,
        labels: Integer[Any, "B S"] | None = None,
        targets: Integer[Any, "B S"] | None = None,
    ) -> Batch:
        """A batch on the mesh; labels are shifted before anything is sharded.

        On several processes each gives the whole batch, and keeps its part.

        Args:
          tokens: of NumPy or JAX, on the host.
          segment_ids: of packed documents, each a run of one number; 0 is padding.
          lengths: of each row, the rest is padding; instead of segment_ids.
          labels: the tokens themselves, or `IGNORE` for those that nobody has to predict (a
            prompt); not shifted: they are here. All tokens if None.
          targets: instead of labels, the token that each is to predict, shifted or otherwise made
            by the caller; in padding they do not count.

        Raises:
          ValueError: for arrays that do not fit together, labels that are shifted already, and a
            batch that the mesh does not divide.
        """
        tokens = as_numbers("tokens", tokens)
        check_batch(tokens, axes_size(self.layout.batch, self.mesh.shape), self.layout)
        segments = _segments(tokens, segment_ids, lengths)
        for name, x in (("tokens", tokens), ("segment_ids", segments)):
            check_int32(name, x)
        goal = _targets(tokens, segments, labels, targets)
        B, S = tokens.shape
        more = -S % self.layout.order.multiple(self.degree)
        order = self.layout.order.permutation(S + more, self.degree)
        known = segment_ids is not None or lengths is not None or more > 0

        def on_mesh(x: np.ndarray, padding: int = 0) -> Array:
            x = np.pad(x, ((0, 0), (0, more)), constant_values=padding).astype(np.int32)[:, order]
            return jax.make_array_from_callback(x.shape, self.sharding, lambda index: x[index])

        count = np.asarray((goal != IGNORE).sum(), np.int32)
        whole = NamedSharding(self.mesh, PartitionSpec())
        return Batch(
            tokens=on_mesh(tokens),
            labels=on_mesh(goal, IGNORE),
            positions=on_mesh(_positions(segments)),
            segment_ids=on_mesh(segments) if known else None,
            normaliser=jax.make_array_from_callback((), whole, lambda _: count),
            size=(B, S),
        )

    def unshard(self, x: Array, batch: Batch) -> np.ndarray:
        """`[B, S2, ...]` as NumPy `[B, S, ...]`, without the padding, on every process.

        Raises:
          ValueError: if x is not of the batch's padded tokens.
        """
        check_of_batch(x.shape, batch.tokens.shape)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        place = self.layout.order.inverse(x.shape[1], self.degree)
        return np.asarray(x)[:, place[: batch.size[1]]]

    def device_positions(self, tokens: int) -> Int[Array, "s"]:
        """Positions of this device's tokens in the sequence, inside `jax.shard_map`.

        Args:
          tokens: of the device, S / P.
        """
        axes = names(self.layout.tokens)
        index = jax.lax.axis_index(axes) if axes else 0
        numbers = self.layout.order.numbers(tokens, index, self.degree)
        return jnp.asarray(numbers, jnp.int32)


def _segments(tokens: np.ndarray, segment_ids: Any, lengths: Any) -> np.ndarray:
    B, S = tokens.shape
    if segment_ids is not None:
        segments = as_numbers("segment_ids", segment_ids)
        check_segments(segments, tokens.shape, lengths)
        return segments
    if lengths is not None:
        lengths = as_numbers("lengths", lengths)
        check_lengths(lengths, tokens.shape)
        return (np.arange(S)[None] < lengths[:, None]).astype(np.int32)
    return np.ones((B, S), np.int32)


def _targets(tokens: np.ndarray, segments: np.ndarray, labels: Any, targets: Any) -> np.ndarray:
    if targets is not None:
        targets = as_numbers("targets", targets)
        check_targets(targets, tokens.shape, labels)
        check_int32("targets", targets)
        # IGNORE is no number of an unsigned dtype: bytes would make it 156.
        return np.where(segments != 0, targets.astype(np.int64), IGNORE)
    if labels is None:
        check_no_token_is(IGNORE, tokens, segments)
        labels = tokens
    labels = as_numbers("labels", labels)
    check_labels(labels, tokens, IGNORE)
    check_int32("labels", labels)
    following = np.full(tokens.shape, IGNORE, np.int64)
    # A document's last token, and padding, have nothing to predict.
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    following[:, :-1] = np.where(same, labels.astype(np.int64)[:, 1:], IGNORE)
    return following


def _positions(segments: np.ndarray) -> np.ndarray:
    """Positions counted from 0 in each run of one segment id."""
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


def check_has_devices(mesh: Any) -> None:
    """Raises ValueError unless the mesh has devices, as an abstract one has not."""
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"TokenLayout needs a jax.sharding.Mesh, whose devices hold the batch, got mesh = "
            f"{mesh!r}. Write TokenLayout(MeshLayout(..., mesh=jax.make_mesh((8,), ('seq',))))."
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
