"""Training task: the sizes of a decoder, its first weights, the text, and the optimizer."""

from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np

from ...exact.self_test.integer_answers import integers
from ..inputs import Arrays
from .steps import Step

# Bits of a first weight: 2^-22 times an integer, so that no library draws it.
WEIGHT_BITS = 22


@dataclass(frozen=True)
class Training:
    """A training. Its every loss, weight and moment is a function of these numbers.

    Attributes:
      vocabulary, features, hidden, layers, heads, kv_heads, head_dim, theta, epsilon: of a decoder
        of RMSNorm, rotary embeddings, grouped queries and SwiGLU, whose embedding is tied.
      batch, tokens: sequences of a step, and tokens of each.
      learning_rate, weight_decay: of AdamW.
      largest_norm: above which the gradients are scaled down.
      seed: of weights and text.
    """

    vocabulary: int = 256
    features: int = 64
    hidden: int = 176
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    theta: float = 10_000.0
    epsilon: float = 1e-5
    batch: int = 4
    tokens: int = 64
    steps: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    largest_norm: float = 1.0
    seed: int = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights, `[in, out]`, by the names of `torch_ref.exact.decoder`."""
        D, F = self.features, self.hidden
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = {
            **{"attention_norm": (D,), "mlp_norm": (D,)},
            **{"q": (D, query), "k": (D, kv), "v": (D, kv), "o": (query, D)},
            **{"gate": (D, F), "up": (D, F), "down": (F, D)},
        }
        shapes = {"embedding": (self.vocabulary, D), "final_norm": (D,)}
        for i in range(self.layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return dict(sorted(shapes.items()))

    def start(self) -> Step:
        """The state before the first step, the same on every machine, without a loss.

        Scales are 1; matrices are uniform, of standard deviation `in^-0.5`, or `D^-0.5` for the
        embedding. Moments are 0.
        """
        arrays: Arrays = {}
        for number, (name, shape) in enumerate(self.shapes().items()):
            weight = np.ones(shape, np.float32)
            if len(shape) > 1:
                summed = shape[1] if name == "embedding" else shape[0]
                whole = integers(shape, WEIGHT_BITS, self.seed * 1000 + number)
                weight = (whole * ((3 / summed) ** 0.5 * 2.0**-WEIGHT_BITS)).astype(np.float32)
            arrays |= {f"weight {name}": weight, **_moments(name, shape)}
        return Step(0, np.float32(np.nan), arrays)

    def batches(self, after: int = 0) -> Iterator[np.ndarray]:
        """Tokens `[B, S]`, int32, of each step after so many; each row counts on by a stride."""
        for step in range(after, self.steps):
            words = np.abs(integers((2, self.batch, 1), 30, self.seed * 1_000_000 + step + 1))
            first, stride = words[0] % self.vocabulary, 1 + words[1] % 7
            rows = (first + stride * np.arange(self.tokens)) % self.vocabulary
            yield rows.astype(np.int32)

    def inputs(self) -> Arrays:
        """Inputs that the bits of the last step depend on, for a hash."""
        numbers = np.array(astuple(self), np.float64)
        text = np.stack([*self.batches()])
        return {**self.start().arrays, "tokens": text, "numbers": numbers}


def labels_of(tokens: np.ndarray) -> np.ndarray:
    """Label of each token: the next token, and -100, which does not count, for the last."""
    labels = np.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    return labels


def _moments(name: str, shape: tuple[int, ...]) -> Arrays:
    return {f"{moment} {name}": np.zeros(shape, np.float32) for moment in "mv"}
