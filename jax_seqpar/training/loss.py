"""Cross entropy: the mean over the labels of the whole mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer

from .._checks import check_is_array, check_loss_options
from ..mask.logits import check_soft_cap
from ..mesh_layout import MeshAxes, MeshLayout, names
from ..varying_axes import varying_axes
from .tiles import map_tiles

IGNORE = -100


def cross_entropy(
    logits: Float[Array, "*tokens V"],
    labels: Integer[Array, "*tokens"],
    *,
    normaliser: Integer[Array | np.ndarray, ""] | np.integer | int | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE,
    axis_name: MeshAxes = None,
) -> Float[Array, ""]:
    """`sum(losses of the labels that count) / normaliser`, in float32.

    `loss = (1 - e) (lse - logits[label]) + e (lse - mean(logits)) + z lse^2`, where `lse` is
    `log(sum(exp(logits)))`, e the label smoothing and z the z-loss.

    Args:
      logits: global arrays, sharded in any way, or those of a device, with axis_name.
      labels: already shifted: the token that each is to predict.
      normaliser: labels that count; those given here if None. With gradient accumulation give
        that of all the steps together, with axis_name that of the whole mesh.
      z_loss: z, which keeps `lse` near 0, from 0 to 2^126 (PaLM,
        https://arxiv.org/abs/2204.02311).
      label_smoothing: e, from 0 to 1 (https://arxiv.org/abs/1512.00567).
      ignore_index: the label that does not count. Another label outside of 0 to V - 1 gives NaN.
      axis_name: inside a `jax.shard_map`, the mesh axes whose devices have different tokens. With
        `check_vma=False` differentiate outside of the `jax.shard_map`: inside, JAX takes the
        derivative of a sum over devices for such a sum, and the gradient is larger by their number.

    Returns:
      the loss; 0, with gradient 0, if no label counts.

    Raises:
      ValueError: for shapes, dtypes or numbers that make no loss.
    """
    check_loss(logits, labels, z_loss, label_smoothing)
    check_normaliser(normaliser)
    check_ignore_index(ignore_index)
    labels = _int32(labels, ignore_index)
    losses = _token_losses(logits, labels, z_loss, label_smoothing, ignore_index)
    return _mean(losses, labels, normaliser, ignore_index, names(axis_name))


def tiled_cross_entropy(
    hidden: Float[Array, "B S D"],
    kernel: Float[Array, "D V"],
    labels: Integer[Array, "B S"],
    *,
    tiles: int,
    layout: MeshLayout = MeshLayout(),
    normaliser: Integer[Array | np.ndarray, ""] | np.integer | int | None = None,
    logits_soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE,
) -> Float[Array, ""]:
    """`cross_entropy(hidden @ kernel, labels)`, never with all the logits in memory.

    Each device projects a tile of its tokens after another, and once more for the gradient: of the
    logits it holds `[B, S / (P tiles), V]`, in float32.

    Args:
      hidden: the last hidden states, sharded as the layout says.
      kernel: of the projection to the vocabulary, whole on each device while it is used; `.T` of
        a tied embedding. Rounded to the dtype of hidden. Its gradient is added up over the tiles in
        its dtype, and over the mesh once.
      tiles: how many; need not divide the tokens.
      layout: as for `dot_product_attention`.
      logits_soft_cap: logits become `cap * tanh(logits / cap)`.
      normaliser, z_loss, label_smoothing, ignore_index: as for `cross_entropy`.

    Raises:
      ValueError: for shapes, dtypes or numbers that make no loss.
    """
    check_projection(hidden, kernel, labels)
    check_loss(None, labels, z_loss, label_smoothing)
    check_normaliser(normaliser)
    check_ignore_index(ignore_index)
    check_soft_cap("logits_soft_cap", logits_soft_cap)
    labels = _int32(labels, ignore_index)

    def losses(kernel: Array, hidden: Array, labels: Array) -> Array:
        kernel = kernel.astype(hidden.dtype)
        logits = jnp.einsum("bsd,dv->bsv", hidden, kernel, preferred_element_type=jnp.float32)
        if logits_soft_cap is not None:
            logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
        return _token_losses(logits, labels, z_loss, label_smoothing, ignore_index)

    each = map_tiles(
        losses,
        kernel,
        hidden,
        labels,
        tiles=tiles,
        layout=layout,
    )
    return _mean(each, labels, normaliser, ignore_index, ())


def _int32(labels: Array, ignore_index: int) -> Array:
    """Labels as int32, which holds -100 and V; wider labels out of range become an invalid one."""
    largest = jnp.iinfo(jnp.int32).max
    beyond = largest - (ignore_index == largest)  # neither a token nor ignored
    if jnp.iinfo(labels.dtype).max > largest:
        fits = (labels <= largest) & (labels >= max(jnp.iinfo(labels.dtype).min, -largest))
        labels = jnp.where(fits, labels, jnp.full_like(labels, beyond))
    return labels.astype(jnp.int32)


def _token_losses(
    logits: Array, labels: Array, z_loss: float, label_smoothing: float, ignore_index: int
) -> Float[Array, "..."]:
    counts = labels != ignore_index
    # Logits of labels that do not count may be anything, NaN included, and get no gradient.
    z = jnp.where(counts[..., None], logits.astype(jnp.float32), 0)
    lse = jax.nn.logsumexp(z, axis=-1)
    V = logits.shape[-1]
    # A sum and no lookup: the vocabulary may be sharded, and its gradient scatters nothing.
    token = jax.lax.broadcasted_iota(labels.dtype, (1,) * labels.ndim + (V,), labels.ndim)
    of_label = jnp.where(token == labels[..., None], z, 0).sum(-1)
    loss = (1 - label_smoothing) * (lse - of_label)
    if label_smoothing:
        loss = loss + label_smoothing * (lse - z.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse**2
    # A factor, so that the gradient is NaN, too.
    valid = ~counts | ((labels >= 0) & (labels < V))
    loss = loss * jnp.where(valid, jnp.float32(1), jnp.float32(jnp.nan))
    return jnp.where(counts, loss, 0)


def _mean(
    losses: Array, labels: Array, normaliser: Any, ignore_index: int, axes: tuple[str, ...]
) -> Float[Array, ""]:
    total, count = losses.sum(), (labels != ignore_index).sum()
    if axes:
        check_varies(losses, axes)
        total, count = jax.lax.psum((total, count), axes)
    if isinstance(normaliser, int | np.integer | np.ndarray):
        # A count of a whole run may be no number of 32 bits.
        return total / np.float32(max(int(normaliser), 1))
    number = count if normaliser is None else normaliser
    return total / jnp.maximum(number, 1).astype(jnp.float32)


def check_loss(logits: Any, labels: Any, z_loss: float, label_smoothing: float) -> None:
    """Raises ValueError unless logits, labels and options fit together."""
    check_is_array("labels", labels)
    if logits is not None:
        check_is_array("logits", logits)
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
    check_loss_options(label_smoothing, z_loss)


def check_varies(losses: Any, axes: tuple[str, ...]) -> None:
    """Raises ValueError for mesh axes whose devices have the same tokens, as far as types say.

    Those would be counted once for each device. With `check_vma=False` no type says so.
    """
    varying = varying_axes(losses)
    same = [axis for axis in axes if axis not in varying]
    # Where types say nothing, they do not say of an axis's own index either that it varies.
    if same and varying_axes(jax.lax.axis_index(same[0])):
        over = f"vary over {sorted(varying)}" if varying else "vary over no axis"
        raise ValueError(
            f"axis_name has {same[0]!r}, but the tokens of its devices are the same: they {over}. "
            f"Name the axes that they vary over, or none."
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


def check_projection(hidden: Any, kernel: Any, labels: Any) -> None:
    """Raises ValueError unless hidden states, kernel and labels fit together."""
    fits = len(hidden.shape) == 3 and len(kernel.shape) == 2
    if not fits or hidden.shape[2] != kernel.shape[0] or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden must be [B, S, D], kernel [D, V] and labels [B, S], got {hidden.shape}, "
            f"{kernel.shape} and {labels.shape}. Of a tied embedding [V, D] give embedding.T."
        )
