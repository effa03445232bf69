"""Attention classes of `transformers`: operands and outputs of their eager attention.

Each model is built small, with random weights, and called on a padded batch; its own eager
attention, with the mask and the options that the model hands to it, is given random queries, keys
and values.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from cases import ONE_AXIS
from questions import error

from jax_seqpar import dot_product_attention

BATCH, TOKENS, SHORTER = 2, 16, 11
OPERANDS: tuple[str, ...] = ("query", "key", "value")
LENGTHS = "key_value_seq_lengths"
WINDOW_SIZE = "local_window_size"
EPS = float(np.finfo(np.float32).eps)
# Grouped queries, where the class has them; its other classes take as many KV heads as heads.
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Of 24 features in 6 heads, which four devices do not divide.
SIX_HEADS = {"hidden_size": 24, "num_attention_heads": 6}
# The published slopes of 6 heads: those of 4, then every second one of 8.
SIX_SLOPES = 2.0 ** -np.array([2, 4, 6, 8, 1, 3], np.float32)
CAUSAL = {"is_causal": True}


def sliding(window: int) -> dict[str, Any]:
    """A causal window that counts the query's own token, as `sliding_window` does."""
    return {"is_causal": True, WINDOW_SIZE: (window - 1, 0)}


@dataclass(frozen=True)
class ModelClass:
    """An attention of a model.

    Attributes:
      model: its `model_type`.
      ours: what the class does, as keywords of `dot_product_attention`. True in place of an array:
        the model's own.
      config: what differs from `SMALL`.
      call: which attention of the model's forward pass.
      padding: the keyword that tells it, if any. With "key_value_seq_lengths" the tokens to the
        right are padding, else those to the left.
      chunk: tokens of a chunk, none of which attends to another chunk's; 0 without chunks.
    """

    model: str
    ours: dict[str, Any] = field(default_factory=lambda: CAUSAL)
    config: dict[str, Any] = field(default_factory=dict)
    call: int = 0
    padding: str | None = "segment_ids"
    chunk: int = 0


WINDOW = {"sliding_window": 5}
CLASSES = {
    "llama": ModelClass("llama"),
    "mistral": ModelClass("mistral", sliding(5), WINDOW),
    "mixtral": ModelClass("mixtral", sliding(5), WINDOW),
    "phi3": ModelClass("phi3", sliding(5), WINDOW | {"partial_rotary_factor": 0.5}),
    "starcoder2": ModelClass("starcoder2", sliding(5), WINDOW),
    "qwen2, window": ModelClass(
        "qwen2", sliding(5), WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, call=1
    ),
    "qwen2": ModelClass("qwen2", config=WINDOW),
    "qwen3": ModelClass("qwen3"),
    "olmo2": ModelClass("olmo2"),
    "smollm3": ModelClass("smollm3"),
    "stablelm": ModelClass("stablelm", config={"partial_rotary_factor": 0.5}),
    "gpt_neox": ModelClass("gpt_neox"),
    "gpt2, second layer": ModelClass(
        "gpt2", CAUSAL | {"scale": 0.25}, {"scale_attn_by_inverse_layer_idx": True}, call=1
    ),
    "opt": ModelClass("opt", CAUSAL | {"scale": 1.0}),
    "gemma": ModelClass("gemma"),
    "gemma2, window": ModelClass(
        "gemma2",
        sliding(5) | {"scale": 0.25, "logits_soft_cap": 2.0},
        WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma2": ModelClass(
        "gemma2",
        CAUSAL | {"scale": 0.25, "logits_soft_cap": 2.0},
        WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        call=1,
    ),
    "gemma3, window": ModelClass(
        "gemma3_text", sliding(5) | {"scale": 0.25}, WINDOW | {"query_pre_attn_scalar": 16}
    ),
    "cohere": ModelClass("cohere", config={"use_qk_norm": True}),
    "granite": ModelClass("granite", CAUSAL | {"scale": 0.3}, {"attention_multiplier": 0.3}),
    "gpt_oss, window": ModelClass("gpt_oss", sliding(5) | {"sinks": True}, WINDOW),
    "gpt_oss": ModelClass("gpt_oss", CAUSAL | {"sinks": True}, WINDOW, call=1),
    "llama4, chunks": ModelClass("llama4_text", config={"attention_chunk_size": 4}, chunk=4),
    # Values have another size than queries and keys.
    "deepseek_v3": ModelClass(
        "deepseek_v3",
        config={
            **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "head_dim": 2},
            **{"q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 8},
            **{"first_k_dense_replace": 2, "num_hidden_layers": 1},
        },
    ),
    "gpt_neo": ModelClass(
        "gpt_neo", CAUSAL | {"scale": 1.0}, {"attention_types": [[["global", "local"], 1]]}
    ),
    "gpt_neo, window": ModelClass(
        "gpt_neo",
        sliding(5) | {"scale": 1.0},
        {"attention_types": [[["global", "local"], 1]], "window_size": 5},
        call=1,
    ),
    "bloom": ModelClass("bloom", CAUSAL | {"alibi_slopes": SIX_SLOPES}, SIX_HEADS),
    "mpt": ModelClass("mpt", CAUSAL | {"alibi_slopes": SIX_SLOPES}, SIX_HEADS),
    "bert": ModelClass("bert", {}, padding="mask"),
    # Five tokens before and five after.
    "modernbert, window": ModelClass(
        "modernbert", {WINDOW_SIZE: 5}, {"local_attention": 10}, call=1
    ),
    "t5, encoder": ModelClass("t5", {"scale": 1.0, "bias": True}, padding=LENGTHS),
    "t5, decoder": ModelClass("t5", CAUSAL | {"scale": 1.0, "bias": True}, call=2, padding=None),
    "t5, cross attention": ModelClass("t5", {"scale": 1.0}, call=3, padding=LENGTHS),
}


@dataclass
class Call:
    """One call of a model's attention; everything in PyTorch.

    Attributes:
      leaves: by our names, `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]`, and what else has a
        gradient.
      out: `[B, T, N, V]`.
      mask: as the model adds it to the logits, or None if it does not hand one over.
      rules_in_mask: whether the mask tells causality and window, too.
    """

    leaves: dict[str, torch.Tensor]
    out: torch.Tensor
    mask: torch.Tensor | None
    rules_in_mask: bool = True


def with_random_operands(original: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    """The eager attention `original(module, query, key, value, mask, ...)`, which is recorded."""
    is_method = original.__name__ == "_attn"

    def attend(module: Any, *given: Any, **options: Any) -> Any:
        *operands, mask = given
        drawn = [torch.randn_like(x.transpose(1, 2), requires_grad=True) for x in operands]
        leaves = dict(zip(OPERANDS, drawn, strict=True))
        if hasattr(module, "sinks"):
            leaves["sinks"] = torch.nn.init.normal_(module.sinks)
        if options.get("position_bias") is not None:
            leaves["bias"] = options["position_bias"].detach().requires_grad_()
            options["position_bias"] = leaves["bias"]
        results = original(module, *(x.transpose(1, 2) for x in drawn), mask, **options)
        out = results[0].transpose(1, 2) if is_method else results[0]
        calls.append(Call(leaves, out, mask, rules_in_mask=not is_method))
        return results

    return attend


def record_fused(
    projection: torch.nn.Module,
    after: torch.nn.Module,
    sizes: tuple[int, ...],
    calls: list[Call],
) -> None:
    """Records an attention between two layers of one module, without a function of its own.

    Args:
      projection: gives queries, keys and values, `sizes` of each token, where 3 is all of them.
      after: is given the output.
    """

    def project(module: Any, inputs: Any, projected: torch.Tensor) -> torch.Tensor:
        axis = 2 + sizes.index(3)
        parts = torch.randn((*projected.shape[:2], *sizes)).unbind(axis)
        leaves = {n: x.requires_grad_() for n, x in zip(OPERANDS, parts, strict=True)}
        calls.append(Call(leaves, projected, None))
        return torch.stack(parts, axis).flatten(2)

    def finish(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        calls[-1].out = inputs[0].view(calls[-1].leaves["query"].shape)

    projection.register_forward_hook(project)
    after.register_forward_pre_hook(finish)


def attention_mask(case: ModelClass) -> np.ndarray:
    """`[B, S]`, 1 for tokens and 0 for padding."""
    mask = np.ones((BATCH, TOKENS), np.int64)
    padding = slice(SHORTER, None) if case.padding == LENGTHS else slice(TOKENS - SHORTER)
    mask[-1, padding] = 0
    return mask


def called(case: ModelClass) -> Call:
    """The call of the model's attention that the case asks for."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model, **(SMALL | case.config))
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, config.vocab_size, (BATCH, TOKENS))
    batch = {"input_ids": tokens, "attention_mask": torch.from_numpy(attention_mask(case))}
    if case.model == "t5":
        batch["decoder_input_ids"] = tokens
    calls: list[Call] = []
    if case.model == "bloom":
        layer = model.h[0].self_attention
        record_fused(layer.query_key_value, layer.dense, (6, 3, 4), calls)
    elif case.model == "mpt":
        layer = model.blocks[0].attn
        record_fused(layer.Wqkv, layer.out_proj, (3, 6, 4), calls)
    with recording(model, calls):
        model(**batch)
    call = calls[case.call]
    if "bias" not in case.ours:
        call.leaves.pop("bias", None)
    return call


@contextmanager
def recording(model: torch.nn.Module, calls: list[Call]) -> Iterator[None]:
    """Context in which a model's eager attention gets random operands, and records each call."""
    module = importlib.import_module(type(model).__module__)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (module, "eager_attention_forward"),
            (getattr(module, "GPTNeoSelfAttention", None), "_attn"),
        ):
            if hasattr(owner, name):
                patch.setattr(owner, name, with_random_operands(getattr(owner, name), calls))
        yield


def described(case: ModelClass) -> dict[str, Any]:
    """Keywords of the class's attention; arrays with a gradient are left out."""
    keywords = {n: x for n, x in case.ours.items() if x is not True or n == "is_causal"}
    tokens = attention_mask(case)
    if case.padding == LENGTHS:
        keywords[LENGTHS] = tokens.sum(1).astype(np.int32)
    elif case.padding == "mask":
        keywords["mask"] = tokens[:, None, None].astype(bool)
    elif case.padding is not None:
        # Chunks count from the first token; 0 is the padding.
        chunks = (tokens.cumsum(1) - 1) // case.chunk if case.chunk else 0
        keywords["segment_ids"] = (tokens * (1 + chunks)).astype(np.int32)
    return keywords


@cache
def on_four_devices() -> Any:
    return partial(dot_product_attention, layout=ONE_AXIS[4].on())


def theirs(call: Call, grad: np.ndarray) -> dict[str, np.ndarray]:
    gradients = torch.autograd.grad(
        call.out, list(call.leaves.values()), torch.from_numpy(grad), retain_graph=True
    )
    results = {"out": call.out} | dict(zip(call.leaves, gradients, strict=True))
    return {n: x.detach().numpy() for n, x in results.items()}


def roundings(leaves: dict[str, np.ndarray], scale: float | None = None) -> float:
    """Units in the last place of the largest entry by which two float32 computations may differ.

    A logit is wrong by H + 4 units of the largest sum of |q| |k| scale, and twice that is the
    relative error of a weight, with one for each of the S weights of its sum. An output or dq sums
    S products more, dk and dv one for every query of every head of a group.
    """
    query, key = leaves["query"], leaves["key"]
    (_, T, N, H), (S, K) = query.shape, key.shape[1:3]
    scale = H**-0.5 if scale is None else scale
    largest = np.einsum("btnh,bsnh->bnts", abs(query), abs(key.repeat(N // K, axis=2))).max()
    return 2 * (H + 4) * largest * scale + 2 * S + T * N // K


def assert_alike(got: Any, expected: Any, units: float, seen: np.ndarray | None = None) -> None:
    """Every result within so many units of its own largest entry; of the output what is seen."""
    for name, x in got.items():
        truth, x = expected[name], np.asarray(x)
        if name == "out" and seen is not None:
            truth, x = truth * seen, x * seen
        bound = units * EPS * np.max(np.abs(truth))
        assert error(x, truth) <= bound, f"{name}: {error(x, truth):.3g} > {bound:.3g}"
