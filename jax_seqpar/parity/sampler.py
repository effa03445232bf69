"""The sampler of `seqpar parity --decode` beside the trainers, and its verdict.

A decoder writes on from prompts of two lengths, with a cache of keys and values on four devices.
The log-probability that it keeps of each token is compared with that of the training forward, in
JAX on other numbers of devices and in PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from ..attention import dot_product_attention
from ..compare import compare_bits
from ..decoding import KeyValueCache, SlotBlocks, attend_to_cache
from ..exact.attention import Exact
from ..exact.loss import log_probabilities
from ..kernels import Kernel, blockwise_attention
from ..mesh_layout import MeshLayout
from .training.jax_decoder import Weights, logits
from .training.jax_side import mesh_of
from .training.task import Training

DEGREE, TRAINERS = 4, (1, 2, 8)
PROMPTS = np.array([16, 11])


@dataclass(frozen=True)
class Sample:
    """Tokens that a sampler has drawn, with their log-probabilities.

    Attributes:
      tokens: `[B, S]`, the prompts with what was drawn, without gaps; the rows' ends differ.
      drawn: `[B, n]`, the numbers of the tokens that were drawn.
      found: `[B, n]`, the log-probability of each as it was drawn.
    """

    tokens: np.ndarray
    drawn: np.ndarray
    found: np.ndarray

    def of(self, found: np.ndarray) -> np.ndarray:
        """Log-probabilities of the drawn tokens, `[B, n]`, from those of all next tokens."""
        return np.take_along_axis(found, self.drawn - 1, axis=1)


@dataclass(frozen=True)
class SamplerResult:
    """A sample, and what trainers find for its tokens.

    Attributes:
      trainers: by name, `[B, n]`.
      ordinary: a sampler and a trainer on one device, of which only the attention is as XLA
        computes it in float32.
    """

    sample: Sample
    trainers: dict[str, np.ndarray]
    ordinary: tuple[np.ndarray, np.ndarray]

    @property
    def different(self) -> dict[str, int]:
        """Number of log-probabilities by trainer whose bits are not the sampler's."""
        return {name: _different(self.sample.found, x) for name, x in self.trainers.items()}

    @property
    def ordinary_different(self) -> int:
        return _different(*self.ordinary)

    @property
    def passed(self) -> bool:
        return not any(self.different.values())

    def to_json(self) -> dict[str, Any]:
        bits = {name: _bits(x) for name, x in self.trainers.items()}
        return {
            "tokens": self.sample.tokens.tolist(),
            "drawn": self.sample.drawn.tolist(),
            "log_probability_bits": {"sampler": _bits(self.sample.found), **bits},
            "different": self.different,
            "ordinary_different": self.ordinary_different,
        }


def run_sampler(
    training: Training = Training(),
    *,
    new: int = 16,
    on_step: Callable[[], Any] = lambda: None,
) -> SamplerResult:
    """Samples with a cache on four devices, and asks the trainers.

    Args:
      training: the sizes of the decoder, and its first weights.
      new: tokens that each row is given, the most probable ones.
      on_step: called after each, for a progress display.

    Raises:
      ValueError: fewer than eight JAX devices.
    """
    sample = sampled(training, DEGREE, new, Exact(), on_step)
    found = {f"JAX {n}": sample.of(_trained(training, n, sample, Exact())) for n in TRAINERS}
    found["PyTorch"] = sample.of(_trained_in_torch(training, sample))
    other = sampled(training, DEGREE, new, SlotBlocks(), on_step)
    trained = other.of(_trained(training, 1, other, blockwise_attention))
    return SamplerResult(sample, found, (other.found, trained))


def sampled(
    training: Training, degree: int, new: int, kernel: Kernel, on_step: Callable[[], Any]
) -> Sample:
    """The most probable tokens after two prompts, drawn one by one."""
    mesh, weights = mesh_of(1, degree), _weights(training)
    layout, B = MeshLayout(mesh=mesh), len(PROMPTS)
    size = int(-(-PROMPTS.max() // degree) * degree)
    rows, tokens = np.arange(B), np.zeros((B, -(-(size + new) // 8) * 8), np.int32)
    # Prompts from the text of the training; tokens after a shorter prompt are written over.
    tokens[:, :size] = next(training.batches())[:B, :size]
    empty = [
        KeyValueCache.empty(B, size + new, training.kv_heads, training.head_dim, layout=layout)
        for _ in range(training.layers)
    ]

    @jax.jit
    def prefill(weights: Weights, tokens: Array) -> Any:
        caches = list(empty)

        def attend(i: int, *qkv: Array) -> Array:
            caches[i] = caches[i].fill(*qkv[1:], lengths=PROMPTS)
            options: Any = {"layout": layout, "kernel": _of_training(kernel)}
            return dot_product_attention(*qkv, is_causal=True, **options)

        found = logits(training, weights, tokens, _positions(tokens), attend)
        is_last = np.arange(size)[None] == PROMPTS[:, None] - 1
        return _drawn(jnp.where(is_last[..., None], found, 0).sum(1)), caches

    @partial(jax.jit, donate_argnums=1)
    def step(weights: Weights, caches: Any, token: Array, positions: Array) -> Any:
        caches = list(caches)

        def attend(i: int, query: Array, key: Array, value: Array) -> Array:
            caches[i] = caches[i].append(key, value, positions)
            return attend_to_cache(query, caches[i], positions=positions, kernel=kernel)

        found = logits(training, weights, token[:, None], positions, attend)
        return _drawn(found[:, 0]), caches

    with jax.set_mesh(mesh):
        whole = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
        prompt = jax.device_put(tokens[:, :size], NamedSharding(mesh, layout.token_spec))
        (token, probability), caches = prefill(whole, prompt)
        found = []
        for i in range(new):
            tokens[rows, PROMPTS + i] = np.asarray(token)
            found.append(np.asarray(probability))
            on_step()
            if i + 1 < new:
                positions = (PROMPTS + i)[:, None].astype(np.int32)
                (token, probability), caches = step(whole, caches, token, positions)
    drawn = PROMPTS[:, None] + np.arange(new)[None]
    return Sample(tokens, drawn, np.stack(found, axis=1))


def _drawn(logits: Array) -> tuple[Array, Array]:
    """The most probable token of each row `[B, V]`, and its log-probability."""
    token = logits.argmax(-1).astype(jnp.int32)
    return token, log_probabilities(logits[:, None], token[:, None])[:, 0]


def _trained(training: Training, degree: int, sample: Sample, kernel: Kernel) -> np.ndarray:
    """`[B, S]`, the log-probability of the token after each, by a training forward in JAX."""
    mesh = mesh_of(1, degree)
    layout = MeshLayout(mesh=mesh)

    def attend(i: int, *qkv: Array) -> Array:
        return dot_product_attention(*qkv, is_causal=True, kernel=kernel, layout=layout)

    @jax.jit
    def forward(weights: Weights, tokens: Array, labels: Array) -> Array:
        found = logits(training, weights, tokens, _positions(tokens), attend)
        return log_probabilities(found, labels)

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, layout.token_spec)
        arrays = [jax.device_put(x, sharding) for x in _with_labels(sample)]
        weights = jax.device_put(_weights(training), NamedSharding(mesh, PartitionSpec()))
        return np.asarray(forward(weights, *arrays))


def _trained_in_torch(training: Training, sample: Sample) -> np.ndarray:
    """The same in PyTorch, in one process."""
    import torch

    from torch_ref.exact.decoder import logits as torch_logits
    from torch_ref.exact.loss import log_probabilities as torch_log_probabilities

    from .training.torch_side import decoder_of

    weights = {name: torch.from_numpy(x) for name, x in _weights(training).items()}
    tokens, labels = (torch.from_numpy(x).long() for x in _with_labels(sample))
    found = torch_logits(decoder_of(training), weights, tokens)
    return torch_log_probabilities(found, labels).numpy()


def _with_labels(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    return sample.tokens, np.roll(sample.tokens, -1, axis=1)


def _of_training(kernel: Kernel) -> Kernel:
    return kernel if isinstance(kernel, Exact) else blockwise_attention


def _positions(tokens: Array) -> Array:
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]


def _weights(training: Training) -> dict[str, np.ndarray]:
    arrays = training.start().arrays
    return {n.removeprefix("weight "): x for n, x in arrays.items() if n.startswith("weight ")}


def _different(a: np.ndarray, b: np.ndarray) -> int:
    (leaf,) = compare_bits(a, b).leaves
    return leaf.differing


def _bits(x: np.ndarray) -> list[list[str]]:
    return [[f"{n:08x}" for n in row.view(np.uint32).tolist()] for row in x]
