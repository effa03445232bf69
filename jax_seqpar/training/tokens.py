"""How the tokens of a batch lie on a mesh, and all that follows from it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Integer

from ..layout import MeshLayout, axes_size, check_mesh, names
from . import refusals
from .loss import IGNORE


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "labels", "positions", "segment_ids", "normaliser"],
    meta_fields=["size"],
)
@dataclass(frozen=True)
class Batch:
    """A batch on the mesh, its tokens padded to the degree.

    A pytree, so its leaves may be anything that JAX puts there.

    Attributes:
      tokens: int32 `[B, S2]`.
      labels: `[B, S2]`, the token that each is to predict, `IGNORE` where there is none: at the end
        of a document, in padding, and where the caller said so.
      positions: `[B, S2]`, counted from 0 in each document.
      segment_ids: `[B, S2]`, of the documents, padding 0; None where a row is one document without
        padding.
      normaliser: `[]`, how many labels count, in the whole batch.
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
      mesh: of devices, of one process or several.
      layout: which of its axes share the batch and the tokens.

    Raises:
      ValueError: for a layout that names what the mesh does not have.

    Example:
      place = TokenLayout(mesh, MeshLayout(batch="data", tokens="seq"))
      batch = place.shard(tokens, segment_ids=documents)
      logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
      loss = cross_entropy(logits, batch.labels, normaliser=batch.normaliser)
      place.unshard(logits, batch)  # NumPy, [B, S, V]
    """

    mesh: Mesh
    layout: MeshLayout = MeshLayout()

    def __post_init__(self) -> None:
        refusals.check_has_devices(self.mesh)
        check_mesh(self.layout, self.mesh.shape, ())

    @property
    def degree(self) -> int:
        """P, the devices that share the tokens of a sequence."""
        return axes_size(self.layout.tokens, self.mesh.shape)

    @property
    def sharding(self) -> NamedSharding:
        """Of `[B, S]`."""
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
          targets: instead of labels, what each token is to predict, shifted already or something
            else entirely; in padding they do not count.

        Raises:
          ValueError: for what does not fit together, labels that are shifted already, and a batch
            that the mesh does not divide.
        """
        for name, x in (
            ("tokens", tokens),
            ("segment_ids", segment_ids),
            ("lengths", lengths),
            ("labels", labels),
            ("targets", targets),
        ):
            refusals.check_not_masked(name, x)
        tokens = np.asarray(tokens)
        refusals.check_batch(tokens, axes_size(self.layout.batch, self.mesh.shape), self.layout)
        segments = _segments(tokens, segment_ids, lengths)
        for name, x in (("tokens", tokens), ("segment_ids", segments)):
            refusals.check_int32(name, x)
        goal = _targets(tokens, segments, labels, targets)
        B, S = tokens.shape
        more = -S % self.degree
        known = segment_ids is not None or lengths is not None or more > 0

        def on_mesh(x: np.ndarray, padding: int = 0) -> Array:
            x = np.pad(x, ((0, 0), (0, more)), constant_values=padding).astype(np.int32)
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
        refusals.check_of_batch(x.shape, batch.tokens.shape)
        if jax.process_count() > 1:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)[:, : batch.size[1]]

    def device_positions(self, tokens: int) -> Int[Array, "s"]:
        """Inside `jax.shard_map`: where in the sequence this device's tokens are.

        Args:
          tokens: of the device, S / P.
        """
        axes = names(self.layout.tokens)
        first = jax.lax.axis_index(axes) * tokens if axes else 0
        return first + jnp.arange(tokens, dtype=jnp.int32)


def _segments(tokens: np.ndarray, segment_ids: Any, lengths: Any) -> np.ndarray:
    B, S = tokens.shape
    if segment_ids is not None:
        segments = np.asarray(segment_ids)
        refusals.check_segments(segments, tokens.shape, lengths)
        return segments
    if lengths is not None:
        lengths = np.asarray(lengths)
        refusals.check_lengths(lengths, tokens.shape)
        return (np.arange(S)[None] < lengths[:, None]).astype(np.int32)
    return np.ones((B, S), np.int32)


def _targets(tokens: np.ndarray, segments: np.ndarray, labels: Any, targets: Any) -> np.ndarray:
    if targets is not None:
        targets = np.asarray(targets)
        refusals.check_targets(targets, tokens.shape, labels)
        refusals.check_int32("targets", targets)
        # IGNORE is no number of an unsigned dtype: bytes would make it 156.
        return np.where(segments != 0, targets.astype(np.int64), IGNORE)
    if labels is None:
        refusals.check_no_token_is(IGNORE, tokens, segments)
        labels = tokens
    labels = np.asarray(labels)
    refusals.check_labels(labels, tokens, IGNORE)
    refusals.check_int32("labels", labels)
    following = np.full(tokens.shape, IGNORE, np.int64)
    # A document's last token, and padding, have nothing to predict.
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    following[:, :-1] = np.where(same, labels.astype(np.int64)[:, 1:], IGNORE)
    return following


def _positions(segments: np.ndarray) -> np.ndarray:
    """Counted from 0 in each run of one number."""
    index = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    starts = np.ones(segments.shape, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
