"""Fine-tunes a Llama of `transformers` in JAX and in PyTorch: every bit is the same.

    python examples/finetune_llama.py
    python examples/finetune_llama.py --steps 50 --model folder-of-a-tied-llama

The weights go from `transformers` by name into the decoder beside this file, which trains on eight
devices, into that of `jax_seqpar.exact` operations on one, and into that of `torch_ref.exact`, each
in exact arithmetic. Afterwards they go back, and `transformers` itself says what the model lost by
the training. Without --model the model is small, of random weights, and seen once. Needs the extras
"training", "parity" and "real". Exit status: 0 if all bits are equal, 1 if not.
"""

from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer
from decoder import Decoder
from flax import nnx
from ported_models import LLAMA, TIED
from rich.console import Console
from training_in_flax import MAPPING, config_of, train_in_flax
from transformers import LlamaConfig, LlamaForCausalLM

from jax_seqpar.bridge import from_torch, to_torch_state
from jax_seqpar.compare.numpy_conversion import numpy_to_torch, torch_to_numpy
from jax_seqpar.parity.training.jax_side import train_in_jax
from jax_seqpar.parity.training.run import TrainingResult
from jax_seqpar.parity.training.steps import Step, named
from jax_seqpar.parity.training.table import training_summary, training_table
from jax_seqpar.parity.training.task import Training
from jax_seqpar.parity.training.torch_side import Ranks, train_on_ranks

Tensors = dict[str, torch.Tensor]


def small_llama(training: Training) -> LlamaForCausalLM:
    """A model of the sizes of a training, with random weights."""
    torch.manual_seed(training.seed)
    config = LlamaConfig(
        vocab_size=training.vocabulary,
        hidden_size=training.features,
        intermediate_size=training.hidden,
        num_hidden_layers=training.layers,
        num_attention_heads=training.heads,
        num_key_value_heads=training.kv_heads,
        head_dim=training.head_dim,
        rms_norm_eps=training.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": training.theta},
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def training_of(config: Any, **options: Any) -> Training:
    """A training of the sizes of a model of `transformers`.

    Raises:
      ValueError: for a model whose embedding is not tied, or of other rotary embeddings.
    """
    if not config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings = False: the decoders here have one table of the vocabulary. "
            "Write a model whose embedding is tied."
        )
    rope = config.rope_parameters
    if rope["rope_type"] != "default" or config.hidden_act != "silu":
        raise ValueError(
            f"rope_type = {rope['rope_type']!r} and hidden_act = {config.hidden_act!r}: the "
            f"decoders here have rotary embeddings of a theta alone, and SwiGLU. Write a model "
            f"with 'default' and 'silu'."
        )
    return Training(
        vocabulary=config.vocab_size,
        features=config.hidden_size,
        hidden=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        theta=rope["rope_theta"],
        epsilon=config.rms_norm_eps,
        **options,
    )


def start_of(model: LlamaForCausalLM, training: Training) -> Step:
    """The model's weights before the first step, by the names of `torch_ref.exact.decoder`."""
    state = {name: x.detach().float() for name, x in model.state_dict().items()}
    weights = _renamed(state, [*LLAMA, TIED], MAPPING, training)
    arrays = {name: torch_to_numpy(x) for name, x in weights.items()}
    zeros = {name: np.zeros_like(x) for name, x in arrays.items()}
    return Step(0, np.float32(np.nan), named(arrays, zeros, zeros))


def state_of(step: Step, training: Training) -> Tensors:
    """The weights after a step, by the names of `transformers`."""
    weights = {name: numpy_to_torch(x) for name, x in step.of_kind("weight").items()}
    return _renamed(weights, MAPPING, [*LLAMA, TIED], training)


def _renamed(tensors: Tensors, source: Any, target: Any, training: Training) -> Tensors:
    """Tensors of one naming under another, by way of the Flax decoder's."""
    like = nnx.eval_shape(lambda: nnx.state(Decoder(config_of(training), rngs=nnx.Rngs(0))))
    sizes = {"N": training.heads, "K": training.kv_heads}
    tree = from_torch(tensors, source, sizes=sizes, like=like)
    return to_torch_state(tree, target, sizes=sizes)


def finetune(training: Training, start: Step) -> TrainingResult:
    """The steps of JAX on one device and on eight, and of PyTorch in one process."""
    runs = {"JAX 1": train_in_jax(training, 1, 1, start=start)}
    runs["JAX 2x4"] = train_in_flax(training, 2, 4, start=start)
    runs["PyTorch 1"] = train_on_ranks(training, Ranks(1, 1), start=start)
    return TrainingResult(runs)


def loss_by_transformers(model: LlamaForCausalLM, tokens: np.ndarray) -> float:
    """The loss of `transformers` in float64."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        return model.double()(input_ids=ids, labels=ids, use_cache=False).loss.item()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 10,
    model: Annotated[str | None, typer.Option(help="A folder of a Llama, its table tied.")] = None,
) -> None:
    """Fine-tunes on all sides, and compares every bit."""
    jax.config.update("jax_num_cpu_devices", 8)
    llama: Any = small_llama(Training())
    if model is not None:
        llama = LlamaForCausalLM.from_pretrained(model, local_files_only=True)
    training = training_of(llama.config, steps=steps)
    result = finetune(training, start_of(llama, training))
    tokens, console = next(training.batches()), Console()
    before = loss_by_transformers(llama, tokens)
    llama.load_state_dict(state_of(result.steps[-1][0], training))
    console.print(training_table(result))
    for line in training_summary(result):
        console.print(line, highlight=False)
    after = loss_by_transformers(llama, tokens)
    console.print(f"first batch, by transformers in float64: {before:.6f}, then {after:.6f}")
    if not result.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
