"""Weights from PyTorch to a tree and back: every bit, every name, and what is refused."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.torch import save_file
from test_bridge_convert import NARROW, WIDE, corners, every_byte
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3Model,
)

from jax_seqpar.bridge import (
    Fused,
    Ignored,
    Map,
    Tied,
    from_torch,
    load_safetensors,
    to_torch_state,
)
from jax_seqpar.bridge.weights.arrange import _fitting
from jax_seqpar.compare import compare_bits
from jax_seqpar.compare.numpy_conversion import numpy_to_torch

D, N, K, H, LAYERS = 24, 6, 2, 4, 3

LAYER = "model.layers.{i}."
LLAMA = [
    Map("model.embed_tokens.weight", "embed.embedding"),
    Map(f"{LAYER}self_attn.q_proj.weight", "layers.{i}.attention.query.kernel", "(N H) D -> D N H"),
    Map(f"{LAYER}self_attn.k_proj.weight", "layers.{i}.attention.key.kernel", "(K H) D -> D K H"),
    Map(f"{LAYER}self_attn.v_proj.weight", "layers.{i}.attention.value.kernel", "(K H) D -> D K H"),
    Map(f"{LAYER}self_attn.o_proj.weight", "layers.{i}.attention.out.kernel", "D (N H) -> N H D"),
    Map(f"{LAYER}mlp.gate_proj.weight", "layers.{i}.mlp.gate.kernel", "F D -> D F"),
    Map(f"{LAYER}mlp.up_proj.weight", "layers.{i}.mlp.up.kernel", "F D -> D F"),
    Map(f"{LAYER}mlp.down_proj.weight", "layers.{i}.mlp.down.kernel", "D F -> F D"),
    Map(f"{LAYER}input_layernorm.weight", "layers.{i}.attention_norm.scale"),
    Map(f"{LAYER}post_attention_layernorm.weight", "layers.{i}.mlp_norm.scale"),
    Map("model.norm.weight", "norm.scale"),
    Ignored("model.rotary_emb.{which}", "computed from the configuration"),
]
UNTIED = [*LLAMA, Map("lm_head.weight", "head.kernel", "V D -> D V")]
TIED = [*LLAMA, Tied("lm_head.weight", to="model.embed_tokens.weight")]
SIZES = {"N": N, "K": K}


def bert_mapping():
    layer, attention = "encoder.layer.{i}.", "encoder.layer.{i}.attention."

    def linear(torch, flax, pattern="F D -> D F", bias=None):
        return [
            Map(f"{torch}.weight", f"{flax}.kernel", pattern),
            Map(f"{torch}.bias", f"{flax}.bias", bias),
        ]

    def norm(torch, flax):
        return [Map(f"{torch}.weight", f"{flax}.scale"), Map(f"{torch}.bias", f"{flax}.bias")]

    heads = [
        line
        for name in ("query", "key", "value")
        for line in linear(
            f"{attention}self.{name}",
            f"layers.{{i}}.{name}",
            "(N H) D -> D N H",
            "(N H) -> N H",
        )
    ]
    return [
        *(
            Map(f"embeddings.{name}_embeddings.weight", f"embed.{name}.embedding")
            for name in ("word", "position", "token_type")
        ),
        *norm("embeddings.LayerNorm", "embed.norm"),
        *heads,
        *linear(f"{attention}output.dense", "layers.{i}.out", "D (N H) -> N H D"),
        *norm(f"{attention}output.LayerNorm", "layers.{i}.attention_norm"),
        *linear(f"{layer}intermediate.dense", "layers.{i}.up"),
        *linear(f"{layer}output.dense", "layers.{i}.down"),
        *norm(f"{layer}output.LayerNorm", "layers.{i}.mlp_norm"),
        *linear("pooler.dense", "pooler"),
        Ignored("embeddings.position_ids", "0, 1, 2 ..."),
    ]


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=N,
        num_key_value_heads=K,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def bert():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=32,
            hidden_size=D,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=N,
            max_position_embeddings=16,
        )
    )


MODELS = {
    "untied llama": (lambda: llama(False), UNTIED, SIZES),
    "tied llama": (lambda: llama(True), TIED, SIZES),
    "bert": (bert, bert_mapping(), {"N": N}),
}


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def case(request):
    model, mapping, sizes = MODELS[request.param]
    return model(), mapping, sizes


@pytest.fixture
def state():
    """A small state_dict of two layers: attention, a norm, an embedding."""
    rng = np.random.default_rng(0)
    shapes = {"embed.weight": (7, 6), "norm.weight": (6,)}
    shapes |= {f"layers.{i}.{x}.weight": (8, 6) for i in range(2) for x in "qv"}
    return {n: torch.tensor(rng.standard_normal(s), dtype=torch.float32) for n, s in shapes.items()}


SMALL = [
    Map("embed.weight", "embed.embedding"),
    Map("norm.weight", "norm.scale"),
    Map("layers.{i}.q.weight", "layers.{i}.query", "(N H) D -> D N H"),
    Map("layers.{i}.v.weight", "layers.{i}.value", "(N H) D -> D N H"),
]
TWO = {"N": 2}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def refusal(*args, back=False, **options):
    with pytest.raises(ValueError, match=r"^The ") as caught:
        (to_torch_state if back else from_torch)(*args, **options)
    return str(caught.value)


def test_a_model_goes_to_flax_and_back_bit_for_bit(case):
    model, mapping, sizes = case
    state = dict(model.state_dict())
    params = from_torch(state, mapping, sizes=sizes)
    back = to_torch_state(params, mapping, sizes=sizes)
    report = compare_bits(state, back)
    assert report.equal, str(report)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0)
    model.load_state_dict(back)
    assert compare_bits(dict(model.state_dict()), state | back).equal


def test_a_pretrained_folder_is_read(case, tmp_path):
    model, mapping, sizes = case
    model.save_pretrained(tmp_path)
    expected = from_torch(model.state_dict(), mapping, sizes=sizes)
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        params = from_torch(path, mapping, sizes=sizes, like=abstract(expected))
        assert compare_bits(params, expected).equal
    back = to_torch_state(expected, mapping, sizes=sizes)
    save_file(back, tmp_path / "back.safetensors")
    assert compare_bits(load_safetensors(tmp_path / "back.safetensors"), back).equal


def rounding(x, kernel, terms):
    """Two sums of so many products differ by no more, in any order: each is off by half of it."""
    return terms * np.finfo(np.float32).eps * terms * np.abs(x).max() * np.abs(kernel).max()


@pytest.mark.parametrize(("name", "heads"), [("query", N), ("key", K), ("value", K)])
def test_kernels_are_where_flax_has_them(name, heads):
    """Products with the converted kernels equal those of PyTorch's layers, without any pattern."""
    model = llama(tied=False)
    kernel = from_torch(model.state_dict(), UNTIED, sizes=SIZES)["layers"][1]["attention"][name]
    kernel = kernel["kernel"]
    linear = model.get_submodule(f"model.layers.1.self_attn.{name[0]}_proj")
    x = np.random.default_rng(1).standard_normal((2, 5, D)).astype(np.float32)
    with torch.no_grad():
        expected = linear(torch.from_numpy(x)).reshape(2, 5, heads, H).numpy()
    bound = rounding(x, kernel, D)
    found = jnp.einsum("bsd,dnh->bsnh", x, kernel)
    assert np.abs(found - expected).max() <= bound
    # Heads and channels taken for each other: the check can fail.
    wrong = jnp.einsum("bsd,dnh->bsnh", x, kernel.reshape(D, H, heads).swapaxes(1, 2))
    assert np.abs(wrong - expected).max() > 100 * bound


def test_the_output_kernel_is_where_flax_has_it():
    model = llama(tied=False)
    params = from_torch(model.state_dict(), UNTIED, sizes=SIZES)
    kernel = params["layers"][1]["attention"]["out"]["kernel"]
    x = np.random.default_rng(2).standard_normal((2, 5, N, H)).astype(np.float32)
    with torch.no_grad():
        linear = model.get_submodule("model.layers.1.self_attn.o_proj")
        expected = linear(torch.from_numpy(x).flatten(2)).numpy()
    found = jnp.einsum("bsnh,nhd->bsd", x, kernel)
    assert np.abs(found - expected).max() <= rounding(x, kernel, N * H)


@pytest.mark.parametrize("name", NARROW + WIDE)
def test_every_dtype_keeps_its_bits(name):
    values = np.resize(every_byte(name), 256 // np.dtype(every_byte(name).dtype).itemsize)
    state = {"w": numpy_to_torch(values[: len(values) // 4 * 4].reshape(-1, 4))}
    if name == "bool":
        state = {"w": torch.tensor([[True, False, False, True]])}
    mapping = [Map("w", "w", "a (b c) -> c b a")]
    with jax.enable_x64(name in WIDE):
        params = from_torch(state, mapping, sizes={"b": 2})
        back = to_torch_state(params, mapping)
    assert params["w"].dtype == name
    assert compare_bits(state, back).equal
    expected = state["w"].reshape(-1, 2, 2).permute(2, 1, 0)
    assert compare_bits(params["w"], expected).equal


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_corners_keep_their_bits(name):
    state = {"w": numpy_to_torch(corners(name))}
    with jax.enable_x64(name == "float64"):
        params = from_torch(state, [Map("w", "w")])
        assert compare_bits(params, state).equal
        assert compare_bits(to_torch_state(params, [Map("w", "w")]), state).equal


def test_parameters_and_views_cross():
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "parameter": torch.nn.Parameter(base),
        "grown": base.clone().requires_grad_() * 2,
        "transposed": base.T,
        "strided": base[:, ::2],
        "expanded": base[:1].expand(3, 6),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    params = from_torch(state, [Map(name, name) for name in state])
    assert compare_bits(params, state).equal


def test_memory_is_not_shared(state):
    before = {name: x.clone() for name, x in state.items()}
    params = from_torch(state, SMALL, sizes=TWO)
    for x in state.values():
        x.fill_(0)
    back = to_torch_state(params, SMALL, sizes=TWO)
    assert compare_bits(back, before).equal
    for x in back.values():
        x.fill_(0)
    assert compare_bits(to_torch_state(params, SMALL, sizes=TWO), before).equal


@settings(max_examples=60)
@given(st.data())
def test_random_patterns_invert(data):
    """Axes named at random, grouped on either side, against reshape and transpose of NumPy."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    names = "abcde"[: len(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    cuts = st.lists(st.booleans(), min_size=len(sizes) - 1, max_size=len(sizes) - 1)

    def grouped(axes, breaks):
        groups = [[axes[0]]]
        for axis, new in zip(axes[1:], breaks, strict=True):
            groups.append([axis]) if new else groups[-1].append(axis)
        text = " ".join(f"({' '.join(names[i] for i in group)})" for group in groups)
        return text, tuple(int(np.prod([sizes[i] for i in group])) for group in groups)

    left, torch_shape = grouped(list(range(len(sizes))), data.draw(cuts))
    right, flax_shape = grouped(order, data.draw(cuts))
    x = np.arange(np.prod(sizes), dtype=np.float32).reshape(torch_shape)
    mapping = [Map("w", "w", f"{left} -> {right}")]
    given_sizes = dict(zip(names, sizes, strict=True))
    params = from_torch({"w": torch.from_numpy(x)}, mapping, sizes=given_sizes)
    expected = x.reshape(sizes).transpose(order).reshape(flax_shape)
    assert np.array_equal(params["w"], expected)
    assert compare_bits(to_torch_state(params, mapping, sizes=given_sizes), {"w": x}).equal


def test_numbers_are_keys_of_their_own(state):
    params = from_torch(state, SMALL, sizes=TWO)
    assert set(params["layers"]) == {0, 1}
    assert set(params) == {"embed", "norm", "layers"}
    mixed = [Map("a", "blocks.0.w"), Map("b", "blocks.last.w"), Map("c", "blocks.00.w")]
    tree = from_torch({name: torch.ones(1) for name in "abc"}, mixed)
    assert set(tree["blocks"]) == {"0", "00", "last"}


@pytest.mark.parametrize("key", [int, str])
def test_like_says_which_keys(state, key):
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    like["layers"] = {key(i): layer for i, layer in like["layers"].items()}
    params = from_torch(state, SMALL, sizes=TWO, like=like)
    assert jax.tree.structure(params) == jax.tree.structure(like)
    assert compare_bits(to_torch_state(params, SMALL, sizes=TWO), state).equal


def test_like_says_which_containers(state):
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    like["layers"] = [like["layers"][0], like["layers"][1]]
    like["activation"] = {}
    params = from_torch(state, SMALL, sizes=TWO, like=like)
    assert jax.tree.structure(params) == jax.tree.structure(like)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(6, (2, 4), use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(2)])


NNX = [Map("layers.{i}.q.weight", "layers.{i}.query.kernel", "(N H) D -> D N H")]


@pytest.fixture
def queries(state):
    return {name: x for name, x in state.items() if ".q." in name}


@pytest.mark.parametrize("is_abstract", [False, True])
def test_a_model_of_nnx(queries, is_abstract):
    make = nnx.eval_shape if is_abstract else lambda f: f()
    like = nnx.state(make(lambda: Model(nnx.Rngs(0))), nnx.Param)
    params = from_torch(queries, NNX, sizes=TWO, like=like)
    model = Model(nnx.Rngs(1))
    nnx.update(model, params)
    kernel = model.layers[1].query.kernel[...]
    expected = queries["layers.1.q.weight"].reshape(2, 4, 6).permute(2, 0, 1)
    assert compare_bits(kernel, expected).equal
    assert compare_bits(to_torch_state(nnx.state(model, nnx.Param), NNX), queries).equal
    pure = from_torch(queries, NNX, sizes=TWO, like=nnx.to_pure_dict(like))
    nnx.replace_by_pure_dict(like, pure)
    assert compare_bits(nnx.to_pure_dict(like), nnx.to_pure_dict(params)).equal


def test_what_is_not_a_parameter_is_not_of_like(queries):
    like = nnx.state(Model(nnx.Rngs(0)))
    message = refusal(queries, NNX, sizes=TWO, like=like)
    assert "layers.0.dropout.rngs" in message
    assert "which has no Map" in message


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))


def test_arrays_go_where_like_has_them(state, mesh):
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    for layer in like["layers"].values():
        layer["query"] = jax.ShapeDtypeStruct((6, 2, 4), jnp.float32, sharding=sharding)
    params = from_torch(state, SMALL, sizes=TWO, like=like)
    assert params["layers"][1]["query"].sharding == sharding
    assert compare_bits(to_torch_state(params, SMALL, sizes=TWO), state).equal
    # Arrays as like, and on the way back from where they are.
    again = from_torch(state, SMALL, sizes=TWO, like=params)
    assert again["layers"][0]["query"].sharding == sharding


def test_arrays_that_are_nowhere_in_particular_join_a_mesh(state, mesh):
    scale = from_torch(state, SMALL, sizes=TWO)["norm"]["scale"]
    x = jax.device_put(jnp.ones(6), NamedSharding(mesh, PartitionSpec("model")))
    assert jax.jit(jnp.multiply)(scale, x).sharding.device_set == set(mesh.devices.flat)
    like = from_torch(state, SMALL, sizes=TWO)
    assert not from_torch(state, SMALL, sizes=TWO, like=like)["norm"]["scale"].committed


def test_an_abstract_mesh_is_made_concrete():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Explicit,))
    mapping, state = [Map("w", "w")], {"w": torch.arange(4.0)}
    with jax.set_mesh(mesh):
        init = lambda: {"w": jax.sharding.reshard(jnp.ones(4), PartitionSpec("model"))}  # noqa: E731
        like = jax.eval_shape(init)
        params = from_torch(state, mapping, like=like)
        assert params["w"].sharding == NamedSharding(mesh, PartitionSpec("model"))
        assert compare_bits(params, state).equal
        assert compare_bits(to_torch_state(params, mapping), state).equal
    with pytest.raises(ValueError, match=r"w on an abstract mesh.*with jax\.set_mesh\(mesh\)"):
        from_torch(state, mapping, like=like)


def test_names_without_a_line(state):
    extra = {f"extra.{i}": torch.ones(1) for i in range(13)}
    message = refusal(state | extra, SMALL, sizes=TWO)
    assert "13 names are without a line: extra.0, extra.1, " in message
    assert "extra.9, and 3 more. Add Map(name, path, pattern)" in message
    assert "extra.10" not in message


def test_all_that_is_wrong_with_the_names_is_said_at_once(state):
    del state["layers.1.v.weight"], state["norm.weight"]
    state["extra"] = torch.ones(1)
    state["embed.copy"] = state["embed.weight"] + 1
    mapping = [
        *SMALL,
        Tied("embed.copy", to="embed.weight"),
        Map("experts.{e}.weight", "experts.{e}.kernel"),
    ]
    message = refusal(state, mapping, sizes=TWO)
    assert "1 name is without a line: extra." in message
    assert "3 names are missing: norm.weight, layers.1.v.weight, experts.{e}.weight" in message
    assert "embed.copy is not tied to embed.weight: ['embed.copy'] float32[7, 6]: 42 of" in message
    assert "Write Map('embed.copy', path, pattern)" in message


def test_one_name_in_two_lines(state):
    mapping = [*SMALL, Ignored("norm.weight", "by mistake")]
    message = refusal(state, mapping, sizes=TWO)
    assert "1 name is in several lines: norm.weight (Map(torch='norm.weight'" in message
    assert "and Ignored(torch='norm.weight'" in message
    assert "missing" not in message


def test_one_path_written_twice(state):
    mapping = [*SMALL[:-1], Map("layers.{i}.v.weight", "layers.{i}.query", "(N H) D -> D N H")]
    message = refusal(state, mapping, sizes=TWO)
    assert (
        "2 names are written twice: layers.0.query (from layers.0.q.weight, layers.0.v.weight), "
        in message
    )


def test_one_name_written_twice(state):
    params = from_torch(state, SMALL, sizes=TWO)
    params["scale"] = params["norm"]["scale"]
    message = refusal(params, [*SMALL, Map("norm.weight", "scale")], sizes=TWO, back=True)
    assert "1 name is written twice: norm.weight (from " in message
    assert refusal(params, [*SMALL, Map("a", "scale"), Map("b", "scale")], sizes=TWO, back=True)


@pytest.mark.parametrize("other", ["norm", "norm.scale.deep"])
def test_paths_through_each_other(state, other):
    state["other"] = torch.ones(1)
    for mapping in ([*SMALL, Map("other", other)], [Map("other", other), *SMALL]):
        with pytest.raises(ValueError, match=r"norm.* is a path through another"):
            from_torch(state, mapping, sizes=TWO)


def test_lines_of_the_same_placeholders_have_the_same_numbers(state):
    state |= {f"decoder.{i}.w": torch.ones(1) for i in range(4)}
    shared = refusal(state, [*SMALL, Map("decoder.{i}.w", "decoder.{i}.w")], sizes=TWO)
    missing = "layers.2.q.weight, layers.3.q.weight, layers.2.v.weight, layers.3.v.weight"
    assert f"4 names are missing: {missing}." in shared
    assert "write {i} in some lines and {j} in the others" in shared
    own = [*SMALL, Map("decoder.{j}.w", "decoder.{j}.w")]
    params = from_torch(state, own, sizes=TWO)
    assert compare_bits(to_torch_state(params, own, sizes=TWO), state).equal


def test_a_line_that_nothing_has_is_missing(state):
    mapping = [*SMALL, Map("experts.{e}.w", "experts.{e}.w"), Map("head", "head")]
    assert "2 names are missing: experts.{e}.w, head." in refusal(state, mapping, sizes=TWO)
    params = from_torch(state, SMALL, sizes=TWO)
    message = refusal(params, mapping, sizes=TWO, back=True)
    assert "2 names are missing: experts.{e}.w, head." in message


def test_two_placeholders():
    names = [f"layers.{i}.experts.{e}.{i}" for i in range(2) for e in (0, 10)]
    state = {name: torch.full((1,), float(k)) for k, name in enumerate(names)}
    mapping = [Map("layers.{i}.experts.{e}.{i}", "experts.{e}.{i}")]
    params = from_torch(state, mapping)
    assert {e: sorted(x) for e, x in params["experts"].items()} == {0: [0, 1], 10: [0, 1]}
    assert params["experts"][10][1] == 3
    assert compare_bits(to_torch_state(params, mapping), state).equal
    assert "layers.0.experts.0.1" in refusal({"layers.0.experts.0.1": torch.ones(1)}, mapping)
    assert "layers.00.w" in refusal({"layers.00.w": torch.ones(1)}, [Map("layers.{i}.w", "{i}")])


def test_missing_and_not_in_like(state):
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    del like["layers"][0]["query"]
    like["head"] = like["norm"]
    del state["embed.weight"]
    message = refusal(state, SMALL, sizes=TWO, like=like)
    assert "2 paths are missing: embed.embedding (embed.weight), head.scale (which has" in message
    assert "1 path is not in like: layers.0.query (layers.0.q.weight)." in message


def test_a_layer_missing_altogether_is_seen_by_like(state):
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    less = {name: x for name, x in state.items() if ".1." not in name}
    assert set(from_torch(less, SMALL, sizes=TWO)["layers"]) == {0}
    assert "layers.1.value (layers.1.v.weight)" in refusal(less, SMALL, sizes=TWO, like=like)


def test_a_line_that_like_does_not_have_may_go_unused(state):
    like = from_torch(state, SMALL, sizes=TWO)
    params = from_torch(state, [*SMALL, Map("head.weight", "head.kernel")], sizes=TWO, like=like)
    assert compare_bits(params, like).equal


def test_shapes_that_differ(state):
    like = abstract(from_torch(state, SMALL, sizes=TWO))
    like["layers"][0]["query"] = jax.ShapeDtypeStruct((6, 4, 2), jnp.float32)
    like["embed"]["embedding"] = jax.ShapeDtypeStruct((6, 7), jnp.bfloat16)
    like["norm"]["scale"] = jax.ShapeDtypeStruct((5,), jnp.float32)
    message = refusal(state, SMALL, sizes=TWO, like=like)
    assert (
        'layers.0.q.weight [8, 6] becomes [6, 2, 4] by "(N H) D -> D N H", but layers.0.query is '
        '[6, 4, 2]. Of these shapes is "(b c) a -> a b c"' in message
    )
    assert "embed.weight [7, 6] becomes [7, 6] without a pattern, but embed.emb" in message
    assert 'is [6, 7]. Of these shapes is "b a -> a b"' in message
    assert "embed.weight is float32, but embed.embedding is bfloat16." in message
    assert "norm.scale is [5]. No pattern joins these shapes; or make" in message


def test_what_a_refusal_suggests_fits():
    suggested = list(_fitting((24, 24), (24, 6, 4)))
    assert '"(b c) a -> a b c"' in suggested
    for torch_shape, flax_shape in (((24, 24), (24, 6, 4)), ((6, 4, 10), (10, 24)), ((3,), (1, 3))):
        for pattern in _fitting(torch_shape, flax_shape):
            state, like = {"w": torch.ones(torch_shape)}, {"w": np.ones(flax_shape, np.float32)}
            names = dict(zip("abc", flax_shape, strict=False))
            sizes = names if len(flax_shape) > len(torch_shape) else {}
            from_torch(state, [Map("w", "w", pattern.strip('"'))], sizes=sizes, like=like)
    assert not list(_fitting((5, 2), (3, 3)))
    assert not list(_fitting((2,) * 7, (2,) * 7))


def test_patterns_that_do_not_fit(state):
    message = refusal(state, SMALL, sizes={"N": 3})
    assert (
        "layers.0.q.weight [8, 6] does not fit \"(N H) D -> D N H\" with sizes {'N': 3}: Shape "
        "mismatch, can't divide axis of length 8 in chunks of 3. Write a pattern of its 2 axes"
        in message
    )
    assert message.count("does not fit") == 4
    assert "Could not infer sizes" in refusal(state, SMALL)
    params = from_torch(state, SMALL, sizes=TWO)
    message = refusal(params, SMALL, sizes={"N": 4}, back=True)
    assert 'layers.0.query [6, 2, 4] does not fit "D N H -> (N H) D"' in message


def test_sizes_that_nothing_uses(state):
    with pytest.raises(ValueError, match=r"1 size is of no axis.*: K\. The patterns have D, H, N"):
        from_torch(state, SMALL, sizes={"N": 2, "K": 1})
    with pytest.raises(ValueError, match="The patterns have no axes"):
        to_torch_state({}, [], sizes={"N": 2})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (lambda: Map("a.{i}", "b.{j}"), r"has \{i\} on one side and \{j\} on the other"),
        (lambda: Map("a.{i}", "b"), r"\{i\} on one side and no placeholder on the other"),
        (lambda: Tied("a.{i}", to="b.{i}.{j}"), r"\{i\} on one side and \{i\}, \{j\} on"),
        (lambda: Map("a.{0}", "b.{0}"), r"braces around no name.*like \{i\}"),
        (lambda: Ignored("a.{}", "why"), r"braces around no name"),
        (lambda: Map("a", "b", "N H D"), r"no pattern with two sides.*\(N H\) D -> D N H"),
        (lambda: Map("a", "b", "a -> b -> c"), r"no pattern with two sides"),
        (lambda: Map(1, "b"), r"^torch must be a string, got 1 in Map\("),  # pyright: ignore
        (lambda: Map("a", None), r"^flax must be a string, got None"),  # pyright: ignore
        (lambda: Map("a", "b", 3), r"^pattern must be a string, got 3"),  # pyright: ignore
        (lambda: Tied("a", to=None), r"^to must be a string, got None"),  # pyright: ignore
        (lambda: Ignored(None, "why"), r"^torch must be a string, got None"),  # pyright: ignore
        (lambda: Ignored("a", None), r"^reason must be a string, got None"),  # pyright: ignore
        (lambda: Fused("a", "b", "parts -> parts", ("1",)), r"^flax must be a tuple of strings"),  # pyright: ignore
        (lambda: Fused("a", ("b", "c"), "parts -> parts", ("1",)), r"has 2 paths and 1 parts"),
        (lambda: Fused("a", ("b",), "D -> D", ("1",)), r"the axis parts once on both sides"),
        (lambda: Fused("a.{i}", ("b",), "parts -> parts", ("N",)), r"\{i\} on one side and no"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_lines_that_make_no_sense(line, message):
    with pytest.raises(ValueError, match=message):
        line()


QKV = ("query", "key", "value")
KERNELS = tuple(f"layers.{{i}}.{name}.kernel" for name in QKV)
BIASES = tuple(f"layers.{{i}}.{name}.bias" for name in QKV)
SAME = ("1", "1", "1")
FUSED = {
    "one after another, grouped": (
        Phi3Model,
        Phi3Config(pad_token_id=0, num_key_value_heads=K, attention_dropout=0.0),
        "layers.{i}.self_attn.qkv_proj",
        [(KERNELS, "weight", "(parts H) D -> D parts H", ("N", "K", "K"))],
    ),
    "head by head": (
        GPTNeoXModel,
        GPTNeoXConfig(),
        "layers.{i}.attention.query_key_value",
        [
            (KERNELS, "weight", "(N parts H) D -> D (N parts) H", SAME),
            (BIASES, "bias", "(N parts H) -> (N parts) H", SAME),
        ],
    ),
    "inputs first": (
        GPT2Model,
        GPT2Config(),
        "h.{i}.attn.c_attn",
        [
            (KERNELS, "weight", "D (parts H) -> D parts H", ("N", "N", "N")),
            (BIASES, "bias", "(parts H) -> parts H", ("N", "N", "N")),
        ],
    ),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_fused_weights_are_those_that_the_model_attends_with(case):
    """Rotary embeddings turn nothing in position 0, so the operands of the model's attention are
    products of the fused layer's input and weights."""
    make, config, name, fused = case
    small = {"vocab_size": 32, "hidden_size": D, "intermediate_size": 40, "num_hidden_layers": 2}
    config.update(small | {"num_attention_heads": N})
    if make is GPT2Model:
        config.update({"n_embd": D, "n_layer": 2, "n_head": N, "attn_pdrop": 0.0})
    seen = []

    def spy(module, query, key, value, *args, **kwargs):
        seen.append([x.detach().transpose(1, 2) for x in (query, key, value)])
        return torch.zeros_like(seen[-1][0]), None

    AttentionInterface.register("spy", spy)
    config._attn_implementation = "spy"
    torch.manual_seed(0)
    model = make(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    inputs = []
    for layer in range(2):
        module = model.get_submodule(name.replace("{i}", str(layer)))
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(torch.arange(5)[None], position_ids=torch.zeros(1, 5, dtype=torch.int64))

    mapping = [
        Fused(f"{name}.{kind}", paths, pattern, parts) for paths, kind, pattern, parts in fused
    ]
    state = {n: x for n, x in model.state_dict().items() if f".{name.rpartition('.')[2]}." in n}
    sizes = {"N": N, "K": K, "H": D // N}
    named = "".join(x for line in mapping for x in (line.pattern, *line.parts))
    sizes = {axis: size for axis, size in sizes.items() if axis in named}
    params = from_torch(state, mapping, sizes=sizes)
    for layer, (x, attended) in enumerate(zip(inputs, seen, strict=True)):
        for part, expected in zip(QKV, attended, strict=True):
            own = {
                key: np.asarray(a, np.float64) for key, a in params["layers"][layer][part].items()
            }
            product = np.einsum("bsd,dnh->bsnh", x.double().numpy(), own["kernel"])
            np.testing.assert_allclose(product + own.get("bias", 0), expected, rtol=0, atol=1e-4)
    back = to_torch_state(params, mapping, sizes=sizes)
    assert compare_bits(state, back).equal
    assert all(x.is_contiguous() for x in back.values())


def test_fused_weights_that_do_not_fit():
    line = Fused("a.{i}", ("q.{i}", "k.{i}"), "(parts H) D -> D parts H", ("N", "K"))
    sizes = {"N": 3, "K": 1, "H": 4}
    message = refusal({"a.0": torch.ones(15, 2)}, [line], sizes=sizes)
    assert 'a.0 [15, 2] does not fit "(parts H) D -> parts H D"' in message
    assert "'parts': 4" in message
    for size in (0, -3):
        with pytest.raises(ValueError, match=r"sizes\['N'\] must be a positive integer, got"):
            from_torch({}, [line], sizes={"N": size, "K": 1})
    parts = {"a.0": torch.ones(16, 2), "a.0[1]": torch.zeros(4, 2)}
    message = refusal(parts, [line], sizes=sizes)
    assert "a.0[1] is a part of a.0 by Fused(torch='a.{i}'" in message
    with pytest.raises(ValueError, match=r"1 size is of parts and not told: N\. Write sizes="):
        from_torch({}, [line], sizes={"K": 1})
    params = {"q": {0: jnp.ones((2, 3, 4))}, "k": {0: jnp.ones((2, 1, 5))}}
    message = refusal(params, [line], sizes={"N": 3, "K": 1}, back=True)
    assert (
        "parts of a.0 differ in more than their axis 0: float32[3, 4, 2], float32[1, 5, 2]"
        in message
    )
    params["k"][0] = jnp.ones((2, 1, 4), jnp.bfloat16)
    message = refusal(params, [line], sizes=sizes, back=True)
    assert "float32[3, 4, 2], bfloat16[1, 4, 2]. Make them of one dtype" in message
    message = refusal({"q": params["q"]}, [line], sizes=sizes, back=True)
    assert "1 name is missing: k.0" in message
    with pytest.raises(TypeError, match=r"^a\.0 must be a PyTorch tensor, got ndarray"):
        from_torch({"a.0": np.ones(2)}, [line], sizes=sizes)


@pytest.mark.parametrize("other", (Ignored("a.0", "by mistake"), Tied("a.{i}", to="b.{i}")))
def test_a_fused_name_in_two_lines(other):
    line = Fused("a.{i}", ("q.{i}", "k.{i}"), "(parts H) D -> D parts H", ("N", "K"))
    sizes = {"N": 3, "K": 1, "H": 4}
    message = refusal({"a.0": torch.ones(16, 2)}, [line, other], sizes=sizes)
    assert "a.0 is in several lines: Fused(torch='a.{i}'" in message
    assert f"and {other}" in message


@pytest.mark.parametrize("other", (Map("a.0", "b"), Tied("a.0", to="c")))
def test_a_fused_name_that_another_line_writes(other):
    line = Fused("a.{i}", ("q.{i}", "k.{i}"), "(parts H) D -> D parts H", ("N", "N"))
    params = {"q": {0: jnp.ones((4, 2, 3))}, "k": {0: jnp.ones((4, 2, 3))}, "c": jnp.ones(3)}
    params |= {"b": jnp.ones(3)} if isinstance(other, Map) else {}
    message = refusal(params, [line, Map("c", "c"), other], back=True, sizes={"N": 2})
    assert "a.0 is written twice: by Fused(torch='a.{i}'" in message


def test_tied_names_are_checked_and_written_back():
    x = torch.tensor([0.0, float("nan"), 2.0])
    mapping = [
        Map("layers.{i}.w", "layers.{i}"),
        Tied("copies.{i}.w", to="layers.{i}.w"),
    ]
    params = from_torch({"layers.0.w": x, "copies.0.w": x.clone(), "layers.1.w": x}, mapping)
    back = to_torch_state(params, mapping)
    assert set(back) == {"layers.0.w", "layers.1.w", "copies.0.w", "copies.1.w"}
    assert compare_bits(back, dict.fromkeys(back, x)).equal
    assert len({x.data_ptr() for x in back.values()}) == 4
    message = refusal({"layers.0.w": x, "copies.0.w": -x}, mapping)
    assert "copies.0.w is not tied to layers.0.w" in message
    assert "3 of 3 elements differ" in message


def test_tied_to_what_does_not_go_over():
    x = torch.ones(2)
    mapping = [Ignored("a", "a mistake"), Tied("b", to="a")]
    message = refusal({"a": x, "b": x}, mapping)
    assert "1 name is tied to what is missing or has no Map: b (to a)." in message
    assert "is tied to what no Map writes" in refusal({}, mapping, back=True)
    both = [Map("a", "a"), Map("b", "b"), Tied("b", to="a")]
    message = refusal({"a": jnp.ones(2), "b": jnp.ones(2)}, both, back=True)
    assert "1 name is both tied and mapped: b. Keep one" in message
    twice = [Map("a", "a"), Map("b", "b"), Tied("h", to="a"), Tied("h", to="b")]
    message = refusal({"a": jnp.ones(2), "b": jnp.ones(2)}, twice, back=True)
    assert "1 name is tied twice: h. Keep one" in message


def test_ignored_names_may_be_anything():
    mapping = [Map("w", "w"), Ignored("extra", "an object"), Ignored("absent", "optional")]
    params = from_torch({"w": torch.ones(2), "extra": object()}, mapping)
    assert set(to_torch_state(params, mapping)) == {"w"}


def test_paths_without_a_line(state):
    params = from_torch(state, SMALL, sizes=TWO)
    params["cache"] = {"key": jnp.ones(1)}
    del params["layers"][1]["value"]
    message = refusal(params, SMALL, sizes=TWO, back=True)
    assert "1 name is without a line: cache.key. Add Map(name, path, pattern), or take" in message
    assert "1 name is missing: layers.1.value." in message


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: from_torch({"w": np.ones(2)}, [Map("w", "w")]),
            r"^w must be a PyTorch tensor, got ndarray\. Write torch\.as_tensor",
        ),
        (
            lambda: from_torch(torch.nn.Linear(2, 2), []),  # pyright: ignore
            r"path of safetensors, got Linear\. Of a module write model\.state_dict\(\)",
        ),
        (lambda: from_torch({}, Map("w", "w")), r"sequence of Map, Fused, .* got Map\(torch='w'"),  # pyright: ignore
        (
            lambda: to_torch_state({}, [("w", "w")]),  # pyright: ignore
            r"sequence of Map, Fused, .* got \[\('w', 'w'\)\]",
        ),
        (lambda: load_safetensors(3), r"path must be a string or a pathlib\.Path, got int"),  # pyright: ignore
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_arguments_of_another_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_narrowing_is_refused():
    message = r"torch\.float64 tensor of shape \(2,\) at \['w'\].*jax\.enable_x64"
    with jax.enable_x64(False), pytest.raises(ValueError, match=message):
        from_torch({"w": torch.ones(2, dtype=torch.float64)}, [Map("w", "w")])


def test_what_is_no_array_of_jax(state):
    with pytest.raises(TypeError, match=r"got ndarray at \['w'\]\. Write jnp\.asarray"):
        to_torch_state({"w": np.ones(2)}, [Map("w", "w")])
    with pytest.raises(TypeError, match=r"\['w'\] is a random key"):
        to_torch_state({"w": jax.random.key(0)}, [Map("w", "w")])
    with pytest.raises(ValueError, match=r"\['w'\] is a tracer"):
        jax.jit(lambda w: to_torch_state({"w": w}, [Map("w", "w")]))(jnp.ones(2))
    with pytest.raises(TypeError, match=r"like has no shape or dtype at w\. Write jax\.eval_shape"):
        from_torch({"w": torch.ones(2)}, [Map("w", "w")], like={"w": 3})
    with pytest.raises(ValueError, match="two leaves of one path"):
        to_torch_state({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, [Map("w", "a.b")])


def sharded_files(folder, state):
    names = sorted(state)
    places = {name: f"model-{k % 2}.safetensors" for k, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, folder / file)
    return places


def test_a_checkpoint_in_several_files(state, tmp_path):
    places = sharded_files(tmp_path, state)
    assert compare_bits(load_safetensors(tmp_path), state).equal
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    # With an index, only what it names.
    save_file({"stray": torch.ones(1)}, tmp_path / "stray.safetensors")
    for path in (tmp_path, index, str(index)):
        assert compare_bits(load_safetensors(path), state).equal
    index.write_text(json.dumps({"weight_map": places | {"promised": "model-0.safetensors"}}))
    with pytest.raises(ValueError, match=r"1 name is in the index.*none of its files: promised"):
        load_safetensors(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has 2 indices.*Give the path of a file: model\.safet"):
        load_safetensors(tmp_path)


def test_a_folder_that_lacks_one_of_its_numbered_files(tmp_path):
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    save_file({"a": torch.ones(1)}, first)
    with pytest.raises(ValueError, match=r"has 1 of the 2 files model-\*-of-00002\.safetensors"):
        load_safetensors(tmp_path)
    assert set(load_safetensors(first)) == {"a"}
    save_file({"b": torch.ones(1)}, second)
    assert set(load_safetensors(tmp_path)) == {"a", "b"}


def test_files_that_cannot_be_read(state, tmp_path):
    with pytest.raises(ValueError, match=r"it has none"):
        load_safetensors(tmp_path)
    for name in ("absent.safetensors", "model.bin"):
        with pytest.raises(ValueError, match=re.escape(name) + r" must be a folder.*torch\.load"):
            load_safetensors(tmp_path / name)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a file of safetensors"):
        from_torch(broken, SMALL, sizes=TWO)
    broken.unlink()
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        "{}",
        "[]",
        "no JSON",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[" * 10**6,
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is no index of safetensors.*weight_map"):
            load_safetensors(tmp_path)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index of no tensor: its weight_map is empty"):
        load_safetensors(tmp_path)
    for place in ("../model.safetensors", "/etc/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(ValueError, match=rf"1 file is outside its folder: {place}\. Put them"):
            load_safetensors(tmp_path)
    index.unlink()
    for file in ("a.safetensors", "b.safetensors"):
        save_file(state, tmp_path / file)
    with pytest.raises(ValueError, match=r"6 names are in .*b\.safetensors and in a file before"):
        load_safetensors(tmp_path)


@pytest.mark.parametrize("package", ["torch", "einops", "safetensors"])
def test_it_names_the_extra_it_needs(package):
    code = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from jax_seqpar.bridge import Map, from_torch, load_safetensors\n"
        + {
            "torch": "from_torch({}, [])",
            "einops": "import torch; from_torch({'w': torch.ones(2, 1)}, "
            "[Map('w', 'w', 'a b -> b a')])",
            "safetensors": "load_safetensors('model.safetensors')",
        }[package]
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1].endswith('is needed here: pip install "jax-seqpar[parity]"')
