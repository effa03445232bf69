"""Options of Flax's layers in exact arithmetic: honoured, or refused with what to write."""

from functools import partial
from typing import Any

import encoder
import encoder_classifier
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from jax_seqpar import Exact, MeshLayout
from jax_seqpar.flax import Arithmetic, ExactArithmetic, SequenceParallel
from jax_seqpar.flax.exact_checks import check_dense, check_norm

BFLOAT16, RNGS = jnp.bfloat16, nnx.Rngs(0)
EXACT: Any = ExactArithmetic()
X = jnp.ones((2, 4, 4))
MASK = jnp.ones((1, 1, 4, 4), bool)
ATTEND = SequenceParallel(kernel=Exact())
INEXACT = r"Write attention_fn=SequenceParallel\(kernel=Exact"


def linear(**options: Any) -> nnx.Linear:
    return nnx.Linear(4, 4, **options, rngs=RNGS)


def general(inputs: Any = 4, **options: Any) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(inputs, 4, **options, rngs=RNGS)


def attention(attend: Any = ATTEND, **options: Any) -> nnx.MultiHeadAttention:
    options = {"decode": False, "attention_fn": attend} | options
    return nnx.MultiHeadAttention(2, 4, **options, rngs=RNGS)


layer_norm, rms_norm = (partial(kind, 4, rngs=RNGS) for kind in (nnx.LayerNorm, nnx.RMSNorm))
BIASED = linear()
BIASED.bias = nnx.Param(jnp.ones(4, BFLOAT16))
REFUSED = {
    "features of LayerNorm": ("layer_norm", layer_norm(feature_axes=1), "Write feature_axes=-1"),
    "axes of LayerNorm": ("layer_norm", layer_norm(reduction_axes=(1, 2)), "reduction_axes=-1"),
    "features of RMSNorm": ("norm", rms_norm(feature_axes=1), "Write feature_axes=-1"),
    "no bias of LayerNorm": ("layer_norm", layer_norm(use_bias=False), r"nnx\.LayerNorm\(use_s"),
    "no scale of RMSNorm": ("norm", rms_norm(use_scale=False), r"nnx\.RMSNorm\(use_scale=True"),
    "devices of LayerNorm": ("layer_norm", layer_norm(axis_name="data"), "Write axis_name=None"),
    "16 bits of LayerNorm": ("layer_norm", layer_norm(dtype=BFLOAT16), "Write dtype=jnp.float32"),
    "16 bits of Linear": ("dense", linear(dtype=BFLOAT16), "Write dtype=jnp.float32"),
    "16 bits of LinearGeneral": ("dense", general(dtype=BFLOAT16), "Write dtype=jnp.float32"),
    "middle axis": ("dense", general(axis=1), r"Write axis=\(-1,\)"),
    "axes the other way": ("dense", general((4, 4), axis=(2, 1)), r"Write axis=\(-2, -1\)"),
    "first axes": ("dense", general((4, 2), axis=(1, 0)), r"Write axis=\(-2, -1\)"),
    "batch axis": ("dense", general(batch_axis={0: 2}), "Write batch_axis={}"),
    "products": ("dense", linear(dot_general=jnp.dot), "Write no dot_general"),
    "precision": ("dense", linear(precision="highest"), "Write precision=None"),
    "kernel of 16 bits": ("dense", linear(param_dtype=BFLOAT16), "kernel .4, 4. is bfloat16"),
    "bias of 16 bits": ("dense", BIASED, "bias .4,. is bfloat16. Write param_dtype=jnp.float32"),
    "LayerNorm of 16 bits": ("layer_norm", layer_norm(param_dtype=BFLOAT16), "scale .4,. is bfl"),
    "RMSNorm of 16 bits": ("norm", rms_norm(param_dtype=BFLOAT16), "scale .4,. is bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_exact_arithmetic_lacks_are_refused(name):
    operation, layer, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        getattr(EXACT, operation)(layer, X)


def test_tables_of_16_bits_are_refused():
    table, labels = jnp.ones((4, 4), BFLOAT16), jnp.zeros((2, 4), jnp.int32)
    options: Any = {"layout": MeshLayout(), "dtype": BFLOAT16}
    for call in (
        lambda: EXACT.look_up(nnx.Embed(4, 4, param_dtype=BFLOAT16, rngs=RNGS), labels),
        lambda: EXACT.embed(table, labels, **options),
        lambda: EXACT.unembed(X, table),
        lambda: EXACT.tiled_cross_entropy(X, table, labels, None, tiles=1, layout=MeshLayout()),
    ):
        with pytest.raises(ValueError, match=r"embedding \(4, 4\) is bfloat16\. Write param"):
            call()


WRAPPED = nnx.dot_product_attention, jax.nn.dot_product_attention, SequenceParallel()
ATTENTIONS = {
    "Flax's": (attention(WRAPPED[0]), INEXACT),
    "JAX's": (attention(WRAPPED[1]), INEXACT),
    "one of another kernel": (attention(WRAPPED[2]), INEXACT),
    "a partial": (attention(partial(partial(WRAPPED[0]), is_causal=True)), INEXACT),
    "a compiled one": (attention(jax.jit(WRAPPED[0])), INEXACT),
    "a recorded one": (encoder._recording(attention(WRAPPED[0]), print), INEXACT),
    "dropout": (attention(dropout_rate=0.1), "neither dropout_rate = 0.1"),
    "16 bits": (attention(dtype=BFLOAT16), "Write dtype=jnp.float32"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_that_is_not_exact_is_refused(name):
    layer, message = ATTENTIONS[name]
    with pytest.raises(ValueError, match=message):
        EXACT.self_attention(layer, X, mask=MASK)


def test_axes_may_be_counted_from_the_first():
    """The last axis, of whatever name, and 16 bits where x has them."""
    x = X.astype(BFLOAT16)
    check_norm(layer_norm(feature_axes=2, reduction_axes=(-1,), dtype=BFLOAT16), x)
    check_dense(general((4, 4), axis=(1, -1), dtype=BFLOAT16), x)


def test_a_classifier_records_arrays():
    """Layers that record are a loop: a scan would leave tracers of its own."""
    config = encoder.Config(8, 8, 2, features=4, hidden=8, layers=2, heads=2)
    model = encoder_classifier.Classifier(config, nnx.dot_product_attention, Arithmetic())
    recorded = {}
    model(jnp.arange(8)[None], jnp.ones((1, 8), bool), record=recorded.__setitem__)
    assert {"embedding", "layers.0/query", "layers.1/output"} <= recorded.keys()
    # The numbers of a tracer cannot be had.
    assert all(np.isfinite(np.asarray(x)).all() for x in recorded.values())


def test_a_classifier_places_tokens_on_explicit_axes():
    """Tokens that no axis shards, on a mesh of Explicit axes, on which a scan needs one type."""
    config = encoder.Config(8, 8, 2, features=8, hidden=8, layers=2, heads=4)
    tokens = jnp.arange(8, dtype=jnp.int32)[None].repeat(2, 0)
    batch = encoder_classifier.Batch(tokens, tokens < 6, tokens % 4)
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"), (AxisType.Explicit,) * 2)):
        graph, state = nnx.split(encoder_classifier.classifier(config, EXACT))
        loss = jax.value_and_grad(lambda state: nnx.merge(graph, state).loss(batch))
        traced = jax.jit(loss).trace(state)
    scans = [x for x in traced.jaxpr.eqns if x.primitive.name == "scan"]
    carried = [x.aval.sharding.spec for x in scans[0].outvars if x.aval.shape == (2, 8, 8)]
    assert PartitionSpec("data", "seq", None) in carried


def test_a_number_that_is_no_token():
    """A negative one is NaN in exact arithmetic, and a row from the end in Flax."""
    layer, tokens = nnx.Embed(4, 4, rngs=RNGS), jnp.array([[-1, 4, 0]])
    for do, found in ((EXACT, [True, True, False]), (Arithmetic(), [False, True, False])):
        assert np.isnan(do.look_up(layer, tokens)).all(-1).tolist() == [found]
