"""The attention of model classes of `transformers`, and how the same is said to this library.

Each model is built small, with random weights, and called on a padded batch; its own eager
attention, with the mask and the options that the model hands to it, is given random queries, keys
and values. Output and gradients are those of `dot_product_attention` on four devices, described
twice: by what the class does (window, scale, soft cap, ...), and by the additive mask as the model
makes it.
"""

from typing import Any

import numpy as np
import pytest
from cases import slow
from features import as_torch, run_rules
from model_classes import (
    BATCH,
    CLASSES,
    OPERANDS,
    TOKENS,
    WINDOW_SIZE,
    assert_alike,
    attention_mask,
    called,
    described,
    on_four_devices,
    roundings,
    theirs,
)

from torch_ref.dense import dense_attention as torch_dense_attention

pytestmark = pytest.mark.usefixtures("less_optimised", "one_torch_thread")

pytest.importorskip("transformers")

# Another class asks for the same, in the same shapes or nearly; values of another size are among
# the cases of Transformer Engine.
LIKE_ANOTHER = {
    "deepseek_v3",
    *("starcoder2", "qwen2", "olmo2", "stablelm", "cohere", "gemma", "granite"),
    *("gemma2", "gemma3, window", "gpt2, second layer", "gpt_oss", "gpt_neo", "gpt_neox"),
    "gpt_neo, window",
    *("mixtral", "modernbert, window", "opt", "t5, decoder", "t5, cross attention"),
}
# Whose masks are given as they are in the default run.
BY_MASK = {"llama", "gpt_oss, window"}


@pytest.mark.parametrize("name", [slow(n) if n in LIKE_ANOTHER else n for n in CLASSES])
def test_as_the_class(name):
    """Attention with the keywords of the class has the class's output where no query is padding.

    In float64, by PyTorch, the output without any one of the keywords is another.
    """
    case = CLASSES[name]
    call = called(case)
    leaves = {n: x.detach().numpy() for n, x in call.leaves.items()}
    keywords, units = described(case), roundings(leaves, case.ours.get("scale"))
    # The decoder of T5 has no padding, and its queries read the encoder's keys.
    is_decoder = case.model == "t5" and case.call > 0
    valid = np.ones((BATCH, TOKENS)) if is_decoder else attention_mask(case)
    valid = valid[:, :, None, None].astype(np.float32)
    grad = valid * np.random.default_rng(0).standard_normal(call.out.shape).astype(np.float32)
    expected = theirs(call, grad)
    got = run_rules(on_four_devices(), leaves, keywords, grad)
    assert got.keys() == expected.keys()
    assert_alike(got, expected, units, valid)

    def oracle(without: str | None = None) -> Any:
        kept = {n: x for n, x in {**keywords, **leaves}.items() if n != without}
        return {"out": torch_dense_attention(**as_torch(kept)).numpy()}

    assert_alike(oracle(), expected, units, valid)
    for part in {**keywords, **leaves}.keys() - set(OPERANDS):
        # The right side of a causal window says that it is causal.
        if part != "is_causal" or WINDOW_SIZE not in keywords:
            with pytest.raises(AssertionError, match="out"):
                assert_alike(oracle(without=part), expected, 100 * units, valid)


@pytest.mark.parametrize(
    "name",
    [
        n if n in BY_MASK else slow(n)
        for n, case in CLASSES.items()
        if case.model not in ("bloom", "mpt")
    ],
)
def test_by_the_mask_of_the_class(name):
    """The mask as the model adds it to the logits, as a bias; queries of padding, which see every
    key alike, have their output and gradients, too.
    """
    case = CLASSES[name]
    call = called(case)
    leaves = {n: x.detach().numpy() for n, x in call.leaves.items()}
    assert call.mask is not None
    assert call.mask.min() == np.finfo(np.float32).min
    keywords = {n: x for n, x in case.ours.items() if not (x is True and n != "is_causal")}
    if call.rules_in_mask:
        keywords = {n: x for n, x in keywords.items() if n not in ("is_causal", WINDOW_SIZE)}
    keywords["bias"] = call.mask.numpy() + leaves.pop("bias", np.float32(0))
    grad = np.random.default_rng(0).standard_normal(call.out.shape).astype(np.float32)
    got = run_rules(on_four_devices(), leaves, keywords, grad)
    assert_alike(got, theirs(call, grad), roundings(leaves, case.ours.get("scale")))
