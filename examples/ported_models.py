"""Two models, each in PyTorch and in Flax: how to run them, and which parameter is which.

A decoder with grouped queries, Llama with random weights, and a pretrained encoder on real text
with padding. PyTorch's models are those of `transformers`; Flax's are sequence-parallel.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import capture_activations
import decoder
import encoder
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import jax_seqpar.training
from jax_seqpar import MeshLayout
from jax_seqpar.bridge import Ignored, Map, Tied
from jax_seqpar.flax import Attention, SequenceParallel
from jax_seqpar.training import IGNORE

Arrays = Mapping[str, np.ndarray]
Line = Map | Tied | Ignored


class Bug(StrEnum):
    """Bugs of ports: heads read as channels, another rotary convention, a missing mask."""

    HEAD_LAYOUT = "head-layout"
    ROTARY = "rotary"
    MASK = "mask"


@dataclass(frozen=True)
class Port:
    """One model in both frameworks.

    Attributes:
      torch_model: `torch_loss(model, **batch)` runs it.
      flax_model: makes the model; `flax_loss(model, record, **batch)` runs it.
      mapping, sizes: as for `jax_seqpar.bridge.from_torch`.
      hooks: modules of PyTorch's model, and names for their results.
      batch: arrays `[B, S]`, which both are given.
      attends: keywords of the mask, as for `jax_seqpar.dot_product_attention`.
      layout: of the tokens on the mesh.
    """

    torch_model: Any
    torch_loss: Callable[..., torch.Tensor]
    flax_model: Callable[[], nnx.Module]
    flax_loss: Callable[..., Any]
    mapping: Sequence[Line]
    sizes: Mapping[str, int]
    hooks: Mapping[str, str]
    batch: Arrays
    attends: Mapping[str, Any]
    layout: MeshLayout


FROM, TO = "model.layers.{i}", "blocks.{i}"
LLAMA = (
    Map("model.embed_tokens.weight", "embedding"),
    Map(f"{FROM}.input_layernorm.weight", f"{TO}.attention_norm.scale"),
    Map(f"{FROM}.self_attn.q_proj.weight", f"{TO}.attention.query.kernel", "(N H) D -> D N H"),
    Map(f"{FROM}.self_attn.k_proj.weight", f"{TO}.attention.key.kernel", "(K H) D -> D K H"),
    Map(f"{FROM}.self_attn.v_proj.weight", f"{TO}.attention.value.kernel", "(K H) D -> D K H"),
    Map(f"{FROM}.self_attn.o_proj.weight", f"{TO}.attention.out.kernel", "D (N H) -> N H D"),
    Map(f"{FROM}.post_attention_layernorm.weight", f"{TO}.mlp_norm.scale"),
    Map(f"{FROM}.mlp.gate_proj.weight", f"{TO}.mlp.gate.kernel", "F D -> D F"),
    Map(f"{FROM}.mlp.up_proj.weight", f"{TO}.mlp.up.kernel", "F D -> D F"),
    Map(f"{FROM}.mlp.down_proj.weight", f"{TO}.mlp.down.kernel", "D F -> F D"),
    Map("model.norm.weight", "norm.scale"),
)
UNTIED, TIED = (
    Map("lm_head.weight", "unembedding"),
    Tied("lm_head.weight", "model.embed_tokens.weight"),
)
LLAMA_HOOKS = {
    "model.embed_tokens": "embedding",
    "model.layers.{i}.input_layernorm": "layers.{i}/attention_norm",
    "model.layers.{i}.self_attn": "layers.{i}/attention",
    "model.layers.{i}.mlp": "layers.{i}/mlp",
    "model.layers.{i}": "layers.{i}/output",
    "model.norm": "norm",
    "lm_head": "logits",
}
ENCODER_HOOKS = {
    "embeddings": "embedding",
    "encoder.layer.{i}.attention.output.dense": "layers.{i}/attention",
    "encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}/attention_norm",
    "encoder.layer.{i}.output.dense": "layers.{i}/mlp",
    "encoder.layer.{i}": "layers.{i}/output",
}


def llama(
    layers: int = 4,
    tokens: int = 64,
    layout: MeshLayout = MeshLayout(),
    tied: bool = False,
    **placement: Any,
) -> Port:
    """A decoder with random weights; no two of its sizes are equal, so that no swap is hidden."""
    config = decoder.Config(
        vocabulary=160,
        features=96,
        hidden=208,
        layers=layers,
        heads=8,
        kv_heads=2,
        head_dim=12,
        tied=tied,
    )
    numbers = np.random.default_rng(0).integers(0, config.vocabulary, (2, tokens), np.int32)
    following = np.pad(numbers[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)

    def torch_loss(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        logits = logits.flatten(0, 1).float()
        return cross_entropy(logits, labels.flatten().long(), ignore_index=IGNORE)

    def flax_loss(model: Any, record: decoder.Record, tokens: Any, labels: Any) -> Any:
        return jax_seqpar.training.cross_entropy(model(tokens, record=record), labels)

    place = decoder.Placement(layout=layout, **placement)
    return Port(
        torch_model=_torch_llama(config),
        torch_loss=torch_loss,
        flax_model=lambda: decoder.Decoder(config, place, rngs=nnx.Rngs(0)),
        flax_loss=flax_loss,
        mapping=[*LLAMA, TIED if tied else UNTIED],
        sizes={"N": config.heads, "K": config.kv_heads},
        hooks=LLAMA_HOOKS,
        batch={"tokens": numbers, "labels": following},
        attends={"is_causal": True},
        layout=layout,
    )


def _torch_llama(config: decoder.Config) -> LlamaForCausalLM:
    """The decoder of `transformers` with random weights."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.features,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.theta},
            initializer_range=0.1,
            tie_word_embeddings=config.tied,
        )
    )
    # Norms start as 1 everywhere, which would hide that they are forgotten or swapped.
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def pretrained_encoder(
    layers: int = 6, tokens: int = 48, layout: MeshLayout = MeshLayout()
) -> Port:
    """all-MiniLM-L6-v2 on two texts, one of them padded; the loss is their similarity."""
    logging.disable_progress_bar()
    folder = capture_activations.model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, num_hidden_layers=layers)
    inputs = tokenizer(
        capture_activations.TEXTS,
        padding="max_length",
        truncation=True,
        max_length=tokens,
        return_tensors="np",
    )
    mask = inputs["attention_mask"].astype(bool)

    def torch_loss(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return _similarity(hidden, mask.to(hidden.dtype))

    def flax_loss(model: Any, record: encoder.Record, tokens: Any, mask: Any) -> Any:
        hidden = model(tokens, mask, record=record)
        return _similarity(hidden, mask.astype(hidden.dtype))

    config, attend = encoder.Config(layers=layers), SequenceParallel(layout=layout)
    return Port(
        torch_model=model,
        torch_loss=torch_loss,
        flax_model=lambda: encoder.Encoder(config, attend, rngs=nnx.Rngs(0)),
        flax_loss=flax_loss,
        mapping=encoder.MAPPING,
        sizes={"N": config.heads},
        hooks=ENCODER_HOOKS,
        batch={"tokens": inputs["input_ids"].astype(np.int32), "mask": mask},
        attends={"mask": jnp.asarray(mask[:, None, None, :])},
        layout=layout,
    )


def with_bug(port: Port, bug: Bug) -> Port:
    """The same port with a bug in every layer of its Flax model, or of its mapping.

    Raises:
      ValueError: for a model without a place for the bug.
    """
    if bug is Bug.HEAD_LAYOUT:
        return replace(port, mapping=[_misread(line) for line in port.mapping])
    if bug is Bug.ROTARY and "is_causal" not in port.attends:
        raise ValueError("The encoder has no rotary embedding. Write --bug head-layout or mask.")

    def flax_model() -> nnx.Module:
        model = port.flax_model()
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Attention) and module.rotary and bug is Bug.ROTARY:
                module.rotary = replace(module.rotary, interleaved=True)
            elif isinstance(module, Attention):
                module.mask = replace(module.mask, is_causal=False)
            elif isinstance(module, nnx.MultiHeadAttention):
                module.attention_fn = partial(_without_mask, module.attention_fn)
        return model

    return replace(port, flax_model=flax_model)


def _misread(line: Line) -> Line:
    """Maps `[N, H]` of query, key and value as if it were `[H, N]`."""
    if not isinstance(line, Map) or line.pattern is None:
        return line
    return replace(line, pattern=re.sub(r"^\(([NK]) H\)", r"(H \1)", line.pattern))


def _without_mask(attend: Callable[..., Any], *args: Any, mask: Any, **options: Any) -> Any:
    return attend(*args, **options)


def _similarity(hidden: Any, mask: Any) -> Any:
    """The cosine of the means of two texts' tokens, in either framework."""
    a, b = (hidden * mask[:, :, None]).sum(1)
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5
