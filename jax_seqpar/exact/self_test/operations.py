"""The operations of one implementation, which the questions are put to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Operations:
    """One implementation, from and to NumPy arrays.

    Attributes:
      exp: of float32.
      dot: `[M, H] x [N, H] -> [M, N]`, float64, as `exact_dot`.
      weighted_sum: `[M, S] x [S, V] -> [M, V]`, as `arithmetic.weighted_sum`.
      gradient_sum: `[M, S] x [S, H]` and anchors `[M, 1]`, int32, to `[M, H]`, as in `arithmetic`.
      matmul: `[M, H] x [H, N]`, of float64, or of int8 to int32.
      flush, round32, out: as in `arithmetic`.
      widened: `round32`, and at once float64 again.
      narrowed: of float64, through `out` to bfloat16 and to float16.
      reciprocal: of float64.
      soft_cap: float64 logits to the capped ones, at `SOFT_CAP`, and the slope.
      dropout: the words of a key to the mask of kept weights, of `DROPOUT_SHAPE` and at
        `DROPOUT_RATE`.
      attention: `(query, key, value, grad) -> (out, dq, dk, dv)`, causal.
      rounded: R of a training, of float64 to float32.
      chained: `(a (*) b) (+) c` of float32.
      log, reciprocal_root: of float32, as in `elementary` and `norm`.
      normal: of float32, to the distribution function and the density of `normal`.
      sines: `[N]` angles below 2^24, int64, to sine and cosine of so many 2^-24 turns.
      sums: `[M, K]` int64 to `[M]`.
      products: `[M, K] x [K, N]` of float32, as `matmul.matmul`, by each engine there is.
    """

    exp: Callable[..., np.ndarray]
    dot: Callable[..., np.ndarray]
    weighted_sum: Callable[..., np.ndarray]
    gradient_sum: Callable[..., np.ndarray]
    matmul: Callable[..., np.ndarray]
    flush: Callable[..., np.ndarray]
    round32: Callable[..., np.ndarray]
    widened: Callable[..., np.ndarray]
    out: Callable[..., np.ndarray]
    narrowed: Callable[..., tuple[np.ndarray, np.ndarray]]
    reciprocal: Callable[..., np.ndarray]
    soft_cap: Callable[..., tuple[np.ndarray, np.ndarray]]
    dropout: Callable[..., np.ndarray]
    attention: Callable[..., tuple[np.ndarray, ...]]
    rounded: Callable[..., np.ndarray]
    chained: Callable[..., np.ndarray]
    log: Callable[..., np.ndarray]
    reciprocal_root: Callable[..., np.ndarray]
    normal: Callable[..., tuple[np.ndarray, np.ndarray]]
    sines: Callable[..., tuple[np.ndarray, np.ndarray]]
    sums: Callable[..., np.ndarray]
    products: Callable[..., tuple[np.ndarray, ...]]
