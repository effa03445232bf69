"""Programs for TPUs, compiled without one: collectives, memory, kernels, and what hides what.

The compiler is that of libtpu. It is loaded in a process of its own, by running this file.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from questions import collectives

from jax_seqpar import blockwise_attention, compiler_options, dot_product_attention
from jax_seqpar.kernels import fused_attention

CHIPS = {"v5e:2x4": 8, "v5p:2x2x1": 4}
HEAD_DIM = 128
KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclass(frozen=True)
class Program:
    """Causal attention of one sequence in bfloat16, its tokens over all chips."""

    topology: str
    tokens: int
    heads: int = 16
    kv_heads: int = 8
    gradients: bool = False
    kernel: str = "splash"
    head_chunks: int = 1
    hides_transfers: bool = False
    # "sinks" and "segment_ids" stand for arrays.
    options: dict[str, Any] = field(default_factory=dict)

    def compiled(self) -> Any:
        devices = np.array(topologies.get_topology_desc(self.topology, "tpu").devices)
        mesh = Mesh(devices, ("seq",))
        splash = self.kernel == "splash"
        attend = partial(
            dot_product_attention,
            attention=partial(fused_attention, platform="tpu") if splash else blockwise_attention,
            is_causal=True,
            mesh=mesh,
            head_chunks=self.head_chunks,
            check_vma=not splash,
            **{name: x for name, x in self.options.items() if x != "array"},
        )

        def array(*shape: int, dtype: Any = jnp.bfloat16, axes: tuple[Any, ...] = ()) -> Any:
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        def per_token(heads: int) -> Any:
            return array(1, self.tokens, heads, HEAD_DIM, axes=(None, "seq"))

        arrays = {
            "sinks": array(self.heads, dtype=jnp.float32),
            "segment_ids": array(1, self.tokens, dtype=jnp.int32),
            "key_value_seq_lengths": array(1, dtype=jnp.int32),
        }
        given = {name: arrays[name] for name, x in self.options.items() if x == "array"}

        def run(query: Any, key: Any, value: Any, grad: Any, given: Any) -> Any:
            function = partial(attend, **given)
            if not self.gradients:
                return function(query, key, value)
            out, pull = jax.vjp(function, query, key, value)
            return out, *pull(grad)

        query, key = per_token(self.heads), per_token(self.kv_heads)
        options: Any = compiler_options("tpu") if self.hides_transfers else {}
        return jax.jit(run).lower(query, key, key, query, given).compile(compiler_options=options)

    @property
    def most_bytes(self) -> int:
        """Of temporaries on a chip: everything gathered once.

        Query, key, value and output, with their gradients if there are any, have all the tokens and
        a chip's part of the heads. The kernels read positions, and leave the log of the sum of exp
        of each head, in float32 over the 128 lanes of a register.
        """
        chips = CHIPS[self.topology]
        heads, kv_heads = self.heads // chips, self.kv_heads // chips
        gathered = 2 * (heads + kv_heads) * HEAD_DIM * 2
        lanes = 128 * 4
        if self.gradients:
            return self.tokens * (2 * gathered + (heads + 1) * lanes)
        return self.tokens * (gathered + lanes)


def library() -> str | None:
    """The path of libtpu, as the environment or the package of that name says."""
    path = os.environ.get("TPU_LIBRARY_PATH")
    if path is None:
        spec = importlib.util.find_spec("libtpu")
        path = None if spec is None else str(Path(spec.origin or "").parent / "libtpu.so")
    return path if path is not None and Path(path).exists() else None


pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        library() is None,
        reason="the compiler for TPUs is missing: pip install libtpu, or set TPU_LIBRARY_PATH",
    ),
]


def compiled(*programs: Program) -> list[dict[str, Any]]:
    """For each: "text", the optimised program, and "temporaries", bytes on a chip."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(library()),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # tests may run side by side; no chip is touched
        # No question to a metadata server about the machine.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    asked = json.dumps([asdict(program) for program in programs])
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def under_transfers(text: str) -> list[str]:
    """The attention kernels that the schedule puts between the start and the end of an all-to-all.

    A kernel is counted once, whatever number of transfers is under way.
    """
    assert "is_scheduled=true" in text
    entry = text[text.index("\nENTRY") :]
    under_way, found = set(), []
    for line in entry.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\((%[\w.-]+)?", line)
        if instruction is None:
            continue
        name, operation, operand = instruction.groups()
        if operation == "all-to-all-start":
            under_way.add(f"%{name}")
        elif operation == "all-to-all-done":
            under_way.remove(operand)
        elif KERNEL in line and under_way:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("topology", "tokens"),
    (("v5e:2x4", 1 << 17), pytest.param("v5p:2x2x1", 1 << 17, marks=pytest.mark.slow)),
    ids=str,
)
def test_splash_forward_and_backward(topology, tokens):
    programs = [Program(topology, tokens, gradients=gradients) for gradients in (False, True)]
    forward, both = compiled(*programs)
    assert collectives(forward["text"]) == {"all-to-all": 4}
    assert collectives(both["text"]) == {"all-to-all": 8}
    assert forward["text"].count(KERNEL) == 1
    assert both["text"].count(KERNEL) == 3
    assert "all-to-all-start" not in forward["text"]  # without the option they are synchronous
    for program, result in zip(programs, (forward, both), strict=True):
        assert 0 < result["temporaries"] <= program.most_bytes, program


def test_all_features_of_splash_and_the_blockwise_kernel():
    options: dict[str, Any] = {
        "query_offset": 64,
        "local_window_size": (4000, 10),
        "logits_soft_cap": 30.0,
        "sinks": "array",
        "segment_ids": "array",
        "key_value_seq_lengths": "array",
    }
    # Tokens that are no multiple of a block.
    features = Program("v5e:2x4", 8 * 1001, gradients=True, options=options)
    blockwise = Program("v5e:2x4", 1 << 17, gradients=True, kernel="blockwise")
    results = compiled(features, blockwise)
    assert [collectives(result["text"]) for result in results] == [{"all-to-all": 8}] * 2
    assert [result["text"].count(KERNEL) for result in results] == [3, 0]
    assert 0 < results[1]["temporaries"] <= blockwise.most_bytes


def test_a_transfer_hides_under_the_attention_of_another_slice():
    """With one slice of the heads there is no attention to hide it under; with two there is."""
    whole = Program("v5e:2x4", 1 << 17, heads=32, kv_heads=16, hides_transfers=True)
    sliced = replace(whole, head_chunks=2)
    results = compiled(whole, sliced, replace(sliced, gradients=True))
    texts = [result["text"] for result in results]
    all_to_alls = [collectives(text) for text in texts]
    assert all_to_alls == [{"all-to-all": n} for n in (4, 8, 16)]
    assert [text.count(KERNEL) for text in texts] == [1, 2, 6]
    assert [len(under_transfers(text)) for text in texts] == [0, 2, 6]


def main() -> None:
    results = []
    for asked in json.load(sys.stdin):
        asked["options"] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in asked["options"].items()
        }
        program = Program(**asked).compiled()
        temporaries = program.memory_analysis().temp_size_in_bytes
        results.append({"text": program.as_text(), "temporaries": temporaries})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
