"""The table "Coming from ..." of the page of masks: each of its lines is run on four devices.

What to write here is read from the page, each keyword between backticks, and gives the output and
the gradients of the library that the line names, mostly of the eager attention of a model class of
`transformers`. Each keyword of the last column runs, too, and is shown to give something else.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import ONE_AXIS
from features import as_torch, one_program, run_rules
from flat_names import keywords_of
from model_classes import (
    BATCH,
    CAUSAL,
    CLASSES,
    LENGTHS,
    OPERANDS,
    SIX_SLOPES,
    SMALL,
    TOKENS,
    WINDOW,
    Call,
    ModelClass,
    assert_alike,
    attention_mask,
    called,
    described,
    recording,
    roundings,
    sliding,
    theirs,
)
from questions import QUICK, error

from jax_seqpar import Dense, Dropout, Logits, Mask, MeshLayout, dot_product_attention, head_keys
from jax_seqpar.mask import Tokens
from jax_seqpar.mask.keywords import from_keywords, to_flat
from torch_ref import dropout as torch_dropout
from torch_ref import rank_layout as torch_layout
from torch_ref.dense import dense_attention as torch_dense_attention

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

pytest.importorskip("transformers")

PAGE = Path(__file__).parent.parent / "jax_seqpar" / "mask" / "README.md"
MESH = ONE_AXIS[4].mesh()
PUBLIC = {
    **{"jnp": jnp, "head_keys": head_keys, "MeshLayout": MeshLayout},
    **{"Mask": Mask, "Logits": Logits, "Dropout": Dropout},
}
# A wrong reading is off by more than this part of the largest entry, a unit of bfloat16.
WRONG = 2**-7


@dataclass(frozen=True)
class Line:
    """A line of the table: what another library writes, what to write here, what goes wrong."""

    there: str
    here: str
    otherwise: str

    @property
    def right(self) -> list[str]:
        """Keywords that are right, as the page has them."""
        return keywords_in(self.here)

    @property
    def wrong(self) -> list[str]:
        """Keywords that run and compute something else."""
        return keywords_in(self.otherwise)


def keywords_in(cell: str) -> list[str]:
    """Code between backticks that begins with a keyword of the attention."""
    names = "scale|bias|mask|is_causal|local_window_size|logits|dropout|return_residual|layout"
    begins = rf"({names}|query_seq_lengths|key_value_seq_lengths)="
    return [code for code in re.findall(r"`([^`]*)`", cell) if re.match(begins, code)]


def lines() -> dict[str, Line]:
    """The lines of the table, by their first cell."""
    _, table = PAGE.read_text().split("## Coming from ...\n")
    table = table.split("\n## ")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines() if row.startswith("| ")]
    assert rows[0] == ["there", "here", "otherwise"]
    assert all(len(row) == 3 for row in rows)
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: Line(*row) for row in rows[1:]}


LINES = lines()


@dataclass
class Problem:
    """An attention of another library.

    Attributes:
      leaves: arrays that are differentiated, by flat names.
      results: output and gradients by name, of the gradient of each output.
      shapes: of the outputs, "out" and perhaps "lse".
      names: what the names in the line of the page stand for.
      rest: options by flat names that the line does not speak of.
      valid: `[B, T]`, queries whose output is compared; None for all.
    """

    leaves: dict[str, np.ndarray]
    results: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    valid: np.ndarray | None = None

    def options(self, code: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options by flat names that the keywords describe, and those that are no part of a Spec.

        Evaluated as a user has JAX, without the strictness of these tests.
        """
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            given = eval(f"dict({code})", PUBLIC | self.names)
        own = {n: given.pop(n) for n in ("return_residual", "layout") if n in given}
        return self.rest | jax.tree.map(to_numpy, to_flat(from_keywords(**given))), own


def to_numpy(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, jax.Array | np.ndarray) else x


def of_call(call: Call, **more: Any) -> Problem:
    """The Problem of a call of eager attention."""
    leaves = {n: x.detach().numpy() for n, x in call.leaves.items()}
    shapes = {"out": tuple(call.out.shape)}
    return Problem(leaves, lambda grads: theirs(call, grads["out"]), shapes, **more)


# Classes that `CLASSES` has otherwise, or not at all.
OTHERS = {
    "qwen3, window": ModelClass(
        "qwen3", sliding(5), WINDOW | {"use_sliding_window": True, "max_window_layers": 1}, call=1
    ),
    "bert, padding on the right": ModelClass("bert", {}, padding=LENGTHS),
}


@cache
def call_of(name: str) -> Call:
    """The call of a model class, the same for every line."""
    return called((CLASSES | OTHERS)[name])


def mask_of(name: str) -> np.ndarray:
    """The mask that a model adds to the logits."""
    mask = call_of(name).mask
    assert mask is not None
    return mask.numpy()


def of_class(name: str, *named: str, **names: Any) -> Problem:
    """The Problem of a model class.

    Args:
      name: of the class.
      named: its options, by flat names, that the line of the page speaks of.
      names: what the names in the line stand for.
    """
    case = (CLASSES | OTHERS)[name]
    tokens = attention_mask(case)
    rest = {n: x for n, x in described(case).items() if n not in named}
    names = {"attention_mask": tokens, "S": TOKENS, "B": BATCH} | names
    return of_call(call_of(name), names=names, rest=rest, valid=tokens)


def random_leaves(
    batch: int = BATCH, queries: int = TOKENS, keys: int = TOKENS, heads: int = 8, kv_heads: int = 2
) -> dict[str, torch.Tensor]:
    """Queries, keys and values of 4 features."""
    torch.manual_seed(0)
    shapes = {
        "query": (batch, queries, heads, 4),
        "key": (batch, keys, kv_heads, 4),
        "value": (batch, keys, kv_heads, 4),
    }
    return {n: torch.randn(shape, requires_grad=True) for n, shape in shapes.items()}


def eager(leaves: dict[str, torch.Tensor], allowed: torch.Tensor) -> Call:
    """The eager attention of Llama with a boolean mask that broadcasts to `[B, N, T, S]`."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    query, key, value = (leaves[n].transpose(1, 2) for n in ("query", "key", "value"))
    least = torch.finfo(torch.float32).min
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, least)
    groups = query.shape[1] // key.shape[1]
    module: Any = SimpleNamespace(num_key_value_groups=groups, training=False)
    out, _ = eager_attention_forward(
        module, query, key, value, mask, scaling=query.shape[-1] ** -0.5
    )
    return Call(leaves, out, mask)


def sliding_window() -> Problem:
    """Mistral's; of the other classes, the masks that they make."""
    tokens = attention_mask(CLASSES["mistral"]) == 1
    window = Mask(local_window_size=(4, 0), array=jnp.asarray(tokens[:, None, None]))
    every = Tokens(0, TOKENS)
    allowed = np.asarray(window.attends(every, every))
    for model in ("qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss"):
        seen = mask_of(f"{model}, window") == 0
        np.testing.assert_array_equal(seen[:, 0][tokens], allowed[:, 0][tokens], err_msg=model)
    return of_class("mistral", "is_causal", "local_window_size", W=5)


def modernbert() -> Problem:
    return of_class("modernbert, window", "local_window_size", L=10)


def t5() -> Problem:
    """The encoder of T5; of GPT-Neo, the output in float64."""
    case, call = CLASSES["gpt_neo"], call_of("gpt_neo")
    truth = torch_dense_attention(**call.leaves, **as_torch(described(case)))
    seen = attention_mask(case)[..., None, None]
    assert described(case)["scale"] == 1.0
    assert error(call.out.detach().numpy() * seen, truth.detach().numpy() * seen) < 1e-5
    problem = of_class("t5, encoder", "scale", "bias")
    problem.names["position_bias"] = problem.leaves["bias"]
    return problem


def whisper() -> Problem:
    """The encoder of Whisper; of OPT, that the query is scaled before the call."""
    from transformers import AutoConfig, AutoModel

    # Their configurations have other names for the numbers of heads and KV heads.
    common = {n: SMALL[n] for n in SMALL if n not in ("num_key_value_heads", "head_dim")}

    def build(kind: str, **config: Any) -> Any:
        torch.manual_seed(0)
        made = AutoConfig.for_model(kind, **(common | config))
        return AutoModel.from_config(made, attn_implementation="eager").eval()

    opt = build("opt", word_embed_proj_dim=32, ffn_dim=16)
    model = build(
        "whisper",
        **{"encoder_layers": 1, "encoder_ffn_dim": 16, "max_source_positions": TOKENS},
        **{"decoder_layers": 1, "decoder_ffn_dim": 16, "max_target_positions": TOKENS},
        **{"decoder_attention_heads": 8, "num_mel_bins": 3, "decoder_start_token_id": 1},
    )
    tokens = torch.randint(3, SMALL["vocab_size"], (BATCH, TOKENS))
    features = torch.randn(BATCH, 3, 2 * TOKENS)
    for m, layer, batch in (
        (opt, opt.decoder.layers[0].self_attn, {"input_ids": tokens}),
        (
            model,
            model.encoder.layers[0].self_attn,
            {"input_features": features, "decoder_input_ids": tokens},
        ),
    ):
        assert_scales_the_query(m, layer, batch)
    calls: list[Call] = []
    with recording(model, calls):
        model(input_features=features, decoder_input_ids=tokens)
    return of_call(calls[0])


def assert_scales_the_query(model: Any, layer: Any, batch: dict[str, Any]) -> None:
    """The query that the first attention is given is scaled already, and its scale is 1."""
    module = importlib.import_module(type(model).__module__)
    original, seen = module.eager_attention_forward, []

    def attend(given: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append((given, query, options["scaling"]))
        return original(given, query, *rest, **options)

    projected = []
    hook = layer.q_proj.register_forward_hook(lambda *parts: projected.append(parts[-1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", attend)
        model(**batch)
    hook.remove()
    query, scaling = next((q, s) for given, q, s in seen if given is layer)
    assert scaling == 1.0
    expected = projected[0] * query.shape[-1] ** -0.5
    np.testing.assert_array_equal(
        query.transpose(1, 2).flatten(2).detach().numpy(), expected.detach().numpy()
    )


def llama4() -> Problem:
    problem = of_class("llama4, chunks", "is_causal", "segment_ids", C=4)
    # Padding stays hidden where chunks are told otherwise.
    problem.rest["mask"] = problem.names["attention_mask"][:, None, None] == 1
    return problem


def bloom() -> Problem:
    """BLOOM's, with the tensor that its model makes: the slopes times positions of keys."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    tokens = attention_mask(CLASSES["bloom"])
    alibi = build_alibi_tensor(torch.from_numpy(tokens), 6, torch.float32)
    alibi = alibi.numpy().reshape(BATCH, 6, 1, TOKENS)
    positions = (tokens.cumsum(1) - 1) * tokens
    expected = SIX_SLOPES[:, None, None] * positions[:, None, None].astype(np.float32)
    np.testing.assert_array_equal(alibi, expected)
    return of_class("bloom", "is_causal", "alibi_slopes", slopes=SIX_SLOPES, alibi=alibi, N=6)


def padding_on_the_left() -> Problem:
    return of_class("llama", "is_causal", "segment_ids")


def padding_on_the_right() -> Problem:
    return of_class("bert, padding on the right", LENGTHS)


def kv_cache() -> Problem:
    """Llama's, of 8 tokens after 8 that are in its cache; the same mask as PyTorch's."""
    from torch.nn.attention.bias import causal_lower_right
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SMALL)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    tokens = torch.randint(3, config.vocab_size, (BATCH, TOKENS))
    first = model(input_ids=tokens[:, :8], use_cache=True)
    # By the name that this version of `transformers` has for it.
    (cache,) = ({n: x} for n, x in first.items() if n != "last_hidden_state")
    calls: list[Call] = []
    with recording(model, calls):
        model(input_ids=tokens[:, 8:], **cache)
    call = calls[0]
    T, S = 8, TOKENS
    assert call.mask is not None
    lower_right = causal_lower_right(T, S)._materialize()
    np.testing.assert_array_equal((call.mask[0, 0] == 0).numpy(), lower_right.numpy())
    return of_call(call, names={"S": S, "T": T})


def cache_of_lengths() -> Problem:
    """PyTorch's, of each sequence alone, without the keys behind its length."""
    from torch.nn.attention.bias import causal_lower_right

    T, lengths = 8, np.array([16, 11], np.int32)
    leaves = random_leaves(queries=T, kv_heads=8)
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for b, length in enumerate(lengths):
        q, k, v = (leaves[n][b : b + 1].transpose(1, 2) for n in ("query", "key", "value"))
        bias = causal_lower_right(T, int(length))
        rows.append(attend(q, k[:, :, :length], v[:, :, :length], attn_mask=bias))
    call = Call(leaves, torch.cat(rows).transpose(1, 2), None)
    return of_call(call, names={"lengths": lengths, "T": T, "S": TOKENS, "B": BATCH})


def open_window() -> Problem:
    t, s = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    return of_call(eager(random_leaves(), (s >= t - 3)[None, None]), names={"left": 3})


def residual() -> Problem:
    """PyTorch's flash attention of CPUs has such an lse; its gradient is that of a logsumexp."""
    T, N = 8, 8
    leaves = random_leaves(queries=T, kv_heads=8)
    q, k, v = (leaves[n].transpose(1, 2) for n in ("query", "key", "value"))
    _, flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    call = eager(leaves, torch.ones(1, 1, 1, 1, dtype=torch.bool))
    lse = torch.logsumexp(q @ k.transpose(2, 3) * 4**-0.5, -1)
    assert flash.shape == (BATCH, N, T)
    np.testing.assert_allclose(flash.detach().numpy(), lse.detach().numpy(), rtol=1e-5)
    # Where T = N no shape tells them apart.
    off = error(lse.transpose(1, 2).detach().numpy(), lse.detach().numpy())
    assert off > WRONG * float(lse.detach().abs().max())

    def results(grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = {"out": call.out, "lse": lse.transpose(1, 2)}
        pulled = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.values()),
            [torch.from_numpy(grads[n]) for n in outputs],
        )
        found = outputs | dict(zip(leaves, pulled, strict=True))
        return {n: x.detach().numpy() for n, x in found.items()}

    operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in leaves.values()]
    attend = attention_on(MeshLayout().on(MESH), True)
    _, of_bfloat16 = jax.eval_shape(attend, *operands)
    assert (of_bfloat16.shape, of_bfloat16.dtype) == ((BATCH, T, N), jnp.float32)
    arrays = {n: x.detach().numpy() for n, x in leaves.items()}
    return Problem(arrays, results, {"out": (BATCH, T, N, 4), "lse": (BATCH, T, N)})


def soft_cap() -> Problem:
    """Gemma 2's, with its additive mask as a bias: after the cap, or it would hide nothing."""
    name = "gemma2, window"
    config = CLASSES[name].config
    problem = of_class(name, cap=config["attn_logit_softcapping"], **config)
    problem.rest = {"bias": mask_of(name)}
    return problem


def sinks() -> Problem:
    problem = of_class("gpt_oss, window", "sinks")
    problem.names["sinks"] = problem.leaves["sinks"]
    return problem


def float_mask() -> Problem:
    """BERT's, with padding on the left."""
    return of_class("bert", "mask", attention_mask=mask_of("bert"))


def rows_without_a_key() -> Problem:
    """Llama's, whose rows of padding on the left have no key: the mean of the values there."""
    from flax import nnx

    call, mask = call_of("llama"), mask_of("llama")
    empty = ~(mask == 0).any(-1)[:, 0]
    assert empty.sum() == 5
    problem = of_call(call, names={"attention_mask": mask})
    query, key, value = (problem.leaves[n] for n in ("query", "key", "value"))
    mean = value.mean(1, keepdims=True).repeat(4, 2)
    key, repeated = key.repeat(4, 2), value.repeat(4, 2)
    attends = jnp.asarray(mask == 0)
    results = {"transformers": call.out.detach().numpy()}
    for library, function in (("jax.nn", jax.nn), ("Flax", nnx)):
        attend = jax.jit(function.dot_product_attention, compiler_options=QUICK)
        with jax.numpy_rank_promotion("allow"):
            results[library] = attend(query, key, repeated, mask=attends)
    for library, x in results.items():
        rows = np.asarray(x)[empty]
        np.testing.assert_allclose(
            rows, np.broadcast_to(mean, x.shape)[empty], atol=1e-6, err_msg=library
        )
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    operands = (torch.from_numpy(x).transpose(1, 2) for x in (query, key, repeated))
    by_torch = attend(*operands, attn_mask=torch.from_numpy(mask == 0)).transpose(1, 2)
    assert not by_torch.numpy()[empty].any()
    assert torch.full((3,), -torch.inf).softmax(0).isnan().all()
    return problem


def flax_dropout(broadcast: bool) -> Problem:
    """Flax's weights, of which this library's words of the key drop some.

    Flax drops other weights by the same key: in every sequence and head the same ones, if
    broadcast, and so does this library.
    """
    from flax.nnx.nn.attention import dot_product_attention_weights

    rate, words, S, N = 0.4, np.array([0, 7], np.uint32), TOKENS, 8
    leaves = random_leaves(kv_heads=N)
    query, key, value = leaves.values()
    weights = torch.einsum("btnh,bsnh->bnts", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
    rng = jax.random.wrap_key_data(jnp.asarray(words))
    options = {"dropout_rate": rate, "broadcast_dropout": broadcast}
    weigh = jax.jit(partial(dot_product_attention_weights, **options), compiler_options=QUICK)
    with jax.numpy_rank_promotion("allow"):
        of_flax = weigh(*(x.detach().numpy() for x in (query, key)), dropout_rng=rng)
    of_flax = np.asarray(of_flax)
    kept = of_flax > 0
    expected = kept * weights.detach().numpy() / np.float32(1 - rate)
    np.testing.assert_allclose(of_flax, expected, rtol=1e-5, atol=1e-7)

    heads = (1, 1) if broadcast else (BATCH, N)
    keep = torch_dropout.keep(torch.from_numpy(words.astype(np.int64)), rate, *heads, S, S)
    assert (kept == kept[:1, :1]).all() == broadcast
    assert 0.2 < np.mean(kept != keep.numpy()) < 0.8
    dropped = weights * keep * torch_dropout.gain(rate)
    out = torch.einsum("bnts,bsnh->btnh", dropped, value)
    names = {"rate": rate, "rng": jnp.asarray(words), "B": BATCH, "N": N}
    return of_call(Call(leaves, out, None), names=names)


def deepspeed() -> Problem:
    """Two all-to-alls of ranks, between them the eager attention of each rank's heads."""
    B = 4
    leaves = random_leaves(B, kv_heads=4)
    ranks = [torch_layout.split_tokens(x, 4) for x in leaves.values()]
    heads = [torch_layout.sequence_to_heads(x) for x in ranks]
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    attended = [
        eager(dict(zip(leaves, of_rank, strict=True)), causal).out
        for of_rank in zip(*heads, strict=True)
    ]
    out = torch_layout.join_tokens(torch_layout.heads_to_sequence(torch.stack(attended)))
    problem = of_call(Call(leaves, out, None), rest=CAUSAL)
    # Sequence first, as it is: it runs, for the degree divides B.
    swapped = {n: x.swapaxes(0, 1) for n, x in problem.leaves.items()}
    found = silently(swapped, CAUSAL).swapaxes(0, 1)
    expected = out.detach().numpy()
    assert error(found, expected) > WRONG * np.max(np.abs(expected))
    return problem


CASES: dict[str, Callable[[], Problem]] = {
    "Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, gpt-oss: `sliding_window=W`": sliding_window,
    "ModernBERT: `local_attention=L`": modernbert,
    "T5, GPT-Neo: no scale; T5 adds `position_bias`": t5,
    "Whisper, OPT: `q_proj(x) * head_dim**-0.5`, then `scaling=1.0`": whisper,
    "Llama 4: `attention_chunk_size=C`": llama4,
    "BLOOM, MPT: `alibi`": bloom,
    '`transformers`, `padding_side="left"`: `attention_mask`': padding_on_the_left,
    '`transformers`, `padding_side="right"`: `attention_mask`': padding_on_the_right,
    "FlashAttention, a KV cache: `causal=True`, with T < S": kv_cache,
    "FlashAttention: `flash_attn_with_kvcache(cache_seqlens=lengths)`": cache_of_lengths,
    "FlashAttention: `window_size=(left, -1)`": open_window,
    "FlashAttention: `softmax_lse`, `[B, N, T]`": residual,
    "Gemma 2, Grok: `attn_logit_softcapping=cap`, `query_pre_attn_scalar`": soft_cap,
    "gpt-oss: `sinks`": sinks,
    "BERT, `transformers`: a float `attention_mask` of 0 and `finfo.min`": float_mask,
    "`transformers`, `jax.nn`, Flax: a row without a key is the mean of the values": (
        rows_without_a_key
    ),
    "Flax: `dropout_rate=rate, dropout_rng=rng, broadcast_dropout=False`": partial(
        flax_dropout, False
    ),
    "Flax: the same with `broadcast_dropout=True`, its default": partial(flax_dropout, True),
    "DeepSpeed: `DistributedAttention(attention, group, scatter_idx=2, gather_idx=1)`": deepspeed,
}


@cache
def attention_on(layout: MeshLayout, return_residual: bool) -> Any:
    """The public attention, one object for all lines, on four devices.

    Its kernel is dense: with blockwise attention each program takes twice as long to compile, and
    `test_attention_features.py` asks every kernel for every pair of options.
    """
    options = {"layout": layout, "return_residual": return_residual}
    return partial(dot_product_attention, kernel=Dense(), **options)


def ours(problem: Problem, code: str, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Output and gradients of the keywords of the page, by name."""
    options, own = problem.options(code)
    for name in problem.leaves.keys() - set(OPERANDS):
        np.testing.assert_array_equal(options.pop(name), problem.leaves[name])
    layout = own.get("layout", MeshLayout()).on(MESH)
    attend = attention_on(layout, own.get("return_residual", False))
    if "lse" not in problem.shapes:
        return run_rules(attend, problem.leaves, options, grads["out"])
    assert options == {}
    leaves, both = jax.tree.map(jnp.asarray, (problem.leaves, (grads["out"], grads["lse"])))
    found = one_program(attend, (), leaves, {}, both)
    out, lse = found.pop("out")
    assert lse.dtype == jnp.float32
    return found | {"out": out, "lse": lse}


def silently(leaves: dict[str, np.ndarray], options: dict[str, Any]) -> np.ndarray:
    """The output in float64, by PyTorch, of what the attention on four devices accepts."""
    keywords = keywords_of(**jax.tree.map(jnp.asarray, leaves), **options)
    attend = attention_on(MeshLayout().on(MESH), False)
    rules = {n: x for n, x in keywords.items() if isinstance(x, bool | int | float | tuple)}
    arrays = {n: x for n, x in keywords.items() if n not in rules}
    shape = jax.eval_shape(partial(attend, **rules), **arrays).shape
    out = torch_dense_attention(**as_torch(leaves), **as_torch(options)).numpy()
    assert out.shape == shape
    return out


def test_every_line_has_a_case_and_every_case_a_line():
    assert list(LINES) == list(CASES)
    assert all(line.right for line in LINES.values())
    # Two whose case itself tells by how much a wrong reading is off, one without.
    without = {there.split(":")[0] for there, line in LINES.items() if not line.wrong}
    assert without == {"FlashAttention", "DeepSpeed", "Flax"}
    assert sum(not line.wrong for line in LINES.values()) == 3


@pytest.mark.parametrize("there", CASES)
def test_line(there):
    """Code that a line calls right has the output and the gradients of the library it names;
    code that a line calls wrong has another output, in float64 as well.
    """
    problem, line = CASES[there](), LINES[there]
    rng = np.random.default_rng(0)
    valid = np.ones(problem.shapes["out"][:2]) if problem.valid is None else problem.valid
    valid = valid[:, :, None, None].astype(np.float32)
    grads = {n: rng.standard_normal(s, np.float32) for n, s in problem.shapes.items()}
    grads["out"] = grads["out"] * valid
    expected = problem.results(grads)
    for code in line.right:
        options, _ = problem.options(code)
        units = roundings(problem.leaves, options.get("scale"))
        found = ours(problem, code, grads)
        assert found.keys() == expected.keys()
        assert_alike(found, expected, units, valid)
    for code in line.wrong:
        off = how_wrong(problem, code, expected["out"], valid)
        assert off > WRONG, f"{code} is off by {off:.3g} of the largest entry"


def how_wrong(problem: Problem, code: str, expected: np.ndarray, valid: np.ndarray) -> float:
    """The largest error of a wrong reading's output, in parts of its largest entry.

    Printed, too: `pytest -rP` shows it.
    """
    options, own = problem.options(code)
    assert own == {}
    operands = {n: problem.leaves[n] for n in OPERANDS}
    found = silently(operands, options) * valid
    off = error(found, expected * valid) / float(np.max(np.abs(expected * valid)))
    print(f"{code}: {off:.2g}")
    return off
