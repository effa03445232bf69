"""Advice of error messages, followed word for word: what it says to write is right."""

import re
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_seqpar
from jax_seqpar import Contiguous, Mask, MeshLayout, Striped, Zigzag, dot_product_attention

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

RNG = np.random.default_rng(5)
ON_SEQ = MeshLayout(mesh=jax.make_mesh((4,), ("seq",)))
CAUSAL = np.tril(np.ones((16, 16), bool))[None, None]
HIDES = np.finfo(np.float32).min
attend: Any = partial(dot_product_attention, layout=ON_SEQ)


def operands(tokens: int) -> list[Any]:
    return [RNG.standard_normal((2, tokens, 4, 8), np.float32) for _ in range(3)]


def truth(query: Any, key: Any, value: Any, allowed: Any = True) -> np.ndarray:
    """Attention in float64, by its formula."""
    query, key, value = (np.float64(x) for x in (query, key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    weights = np.where(allowed, np.exp(logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, value)


def advice(call: Any, pattern: str) -> list[str]:
    """The code of an error's message that a pattern picks out."""
    with pytest.raises(ValueError, match=pattern) as caught:
        call()
    found = re.search(pattern, str(caught.value))
    assert found is not None, caught.value
    return [code for code in found.groups() if code is not None]


@pytest.mark.parametrize("made_by", ("an attention", "&"))
@pytest.mark.parametrize(
    ("mask", "follows"),
    (
        (np.where(CAUSAL, np.float32(0), HIDES), ("array == 0", "bias=array")),
        (np.where(CAUSAL, np.float32(0), -np.float32(np.inf)), ("array == 0", "bias=array")),
        (CAUSAL.astype(np.float32), ("array != 0",)),
        (CAUSAL.astype(np.int32), ("array.astype(bool)",)),
    ),
    ids=("finfo.min", "minus infinity", "ones", "integers"),
)
def test_a_mask_of_numbers(mask, follows, made_by):
    array, (query, key, value) = jnp.asarray(mask), operands(16)
    if made_by == "&":
        message = advice(lambda: Mask(array=array) & Mask(), r"write (.*)\.$")[0]
    else:
        message = advice(lambda: attend(query, key, value, mask=array), r"write (.*)\.$")[0]
        message = re.sub(r"\bmask\b", "array", message)
    for code in follows:
        assert code in message
        written = code.partition("bias=")
        keyword = "bias" if written[1] else "mask"
        given = {keyword: eval(written[2] or code, {"array": array})}
        out = attend(query, key, value, **given)
        assert np.abs(out - truth(query, key, value, CAUSAL)).max() < 1e-5, code
    # What the message must not say to write for floats that hide is wrong by far.
    if "array == 0" in follows:
        assert "astype(bool)" not in message
        out = attend(query, key, value, mask=array.astype(bool))
        assert np.abs(out - truth(query, key, value, CAUSAL)).max() > 0.1


@pytest.mark.parametrize("order", (Contiguous(), Zigzag(), Striped()), ids=repr)
@pytest.mark.parametrize("is_causal", (False, True))
def test_tokens_that_do_not_divide(is_causal, order):
    """Padding keywords keep the 18 tokens from attending to the 2 that are added."""
    query, key, value = operands(18)
    layout = replace(ON_SEQ, order=order)
    call: Any = partial(dot_product_attention, layout=layout, is_causal=is_causal)
    pattern = r"x = (jax_seqpar\.pad_to_degree\(.*?\))"
    names = {"jax_seqpar": jax_seqpar, "query": query, "key": key, "value": value}
    (code,) = advice(lambda: call(query, key, value), pattern)
    x = eval(code.replace("...", "query, key, value"), names)
    degree = 4
    dealt = partial(jax.tree.map, lambda array: order.reorder(array, 1, degree))

    def in_sequence(out):
        return x.unpad(jnp.asarray(order.restore(np.asarray(out), 1, degree)))

    args, keywords = dealt((x.query, x.key, x.value)), dealt(x.keywords)
    out = in_sequence(call(*args, **keywords))
    allowed = np.tril(np.ones((18, 18), bool)) if is_causal else True
    assert np.abs(out - truth(query, key, value, allowed)).max() < 1e-5
    if not is_causal:
        out = in_sequence(call(*args))
        assert np.abs(out - truth(query, key, value)).max() > 1e-2
