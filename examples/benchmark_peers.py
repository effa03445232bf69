"""Peers of `benchmark_attention.py`: PyTorch's kernel, and pipelines on gloo ranks.

Other libraries with a ring do not run on CPUs as they are. Seen with PyTorch 2.13: yunchang
0.6.4 calls `aten::_scaled_dot_product_flash_attention`, which PyTorch has for GPUs alone, and for
its other kernels raises "Not implemented backward for PyTorch attention types"
(`kernels/attention.py`); ring-flash-attn 0.1.8 imports `flash_attn`, which needs CUDA; PyTorch's
own `context_parallel` has no sharding strategy for its kernel for CPUs. So yunchang, where it is
installed, is measured with PyTorch's kernel for CPUs put in place, and its ring forward alone.
`torch_ref.ring` is the other ring here: written to be read, with all weights of a part in memory.
"""

import datetime
import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmark_tools import PASSES, Run
from benchmark_ulysses import sdpa
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel

from jax_seqpar.bridge.torch_ranks import run_ranks
from jax_seqpar.compare.numpy_conversion import numpy_to_torch
from jax_seqpar.parity.inputs import NAMES, Case
from torch_ref.ring import ring_attention
from torch_ref.ulysses import DistributedAttention

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
PEER, PEER_RING = "DeepSpeed" if HAS_DEEPSPEED else "torch_ref", "torch_ref ring"
YUNCHANG, YUNCHANG_RING = "yunchang", "yunchang ring"
# Peers that run here, and their passes.
PEERS = {PEER: PASSES, PEER_RING: PASSES}
if importlib.util.find_spec("yunchang") is not None:
    PEERS |= {YUNCHANG: PASSES, YUNCHANG_RING: PASSES[:1]}
TIMEOUT = 3600.0


def flash_runs(case: Case) -> list[Run]:
    """PyTorch's flash attention for the CPU, heads first: without and with gradients."""
    *leaves, grad = (numpy_to_torch(x).transpose(1, 2).contiguous() for x in case.inputs().values())
    leaves = [x.requires_grad_() for x in leaves]

    def attend() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)

    return _runs(attend, leaves, grad)


class Ranks:
    """Processes with a part of the tokens each; idle until they are asked, so that others may take
    turns with them.

    Args:
      what: the pipeline, one of `PEERS`.
    """

    def __init__(self, what: str, degree: int, case: Case, threads: int):
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.degree, self.asked = degree, 0
        arguments = (run_ranks, rank_main, degree, what, case, degree, self.store.port)
        self.executor = ThreadPoolExecutor(1)
        self.answers = self.executor.submit(*arguments, timeout=TIMEOUT, threads=threads)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends them, also where the benchmark fails or is interrupted."""
        self.store.set(f"ask {self.asked}", "stop")
        self.executor.shutdown()

    def seconds(self, what: str) -> float:
        """Seconds of the slowest rank, for "forward" or "both"."""
        self.store.set(f"ask {self.asked}", what)
        keys = [f"answer {self.asked} {rank}" for rank in range(self.degree)]
        self.asked += 1
        while not self.store.check(keys):
            if self.answers.done():
                self.answers.result()  # raises what went wrong
            time.sleep(0.01)
        return max(float(self.store.get(key)) for key in keys)

    def output(self) -> np.ndarray:
        """The whole output that the ranks computed; nothing can be asked of them afterwards."""
        self.store.set(f"ask {self.asked}", "stop")
        return np.concatenate(self.answers.result(), axis=1)


def rank_main(rank: int, what: str, case: Case, degree: int, port: int) -> np.ndarray:
    """Measures one rank when asked, and returns its part of the output."""
    patience = datetime.timedelta(seconds=TIMEOUT)
    store = TCPStore("localhost", port, is_master=False, timeout=patience)
    attention = pipeline(what)
    inputs = case.inputs()
    *leaves, grad = (
        numpy_to_torch(np.ascontiguousarray(np.split(inputs[name], degree, axis=1)[rank]))
        for name in NAMES
    )
    leaves = [x.requires_grad_() for x in leaves]

    def attend() -> torch.Tensor:
        return attention(*leaves)

    runs: dict[str, Run] = dict(zip(PASSES, _runs(attend, leaves, grad), strict=True))
    for i in itertools.count():
        asked = store.get(f"ask {i}").decode()
        if asked == "stop":
            return attend().detach().numpy()
        dist.barrier()
        start = time.perf_counter()
        runs[asked]()
        store.set(f"answer {i} {rank}", str(time.perf_counter() - start))
    raise AssertionError


def pipeline(what: str) -> Callable[..., torch.Tensor]:
    """The causal attention of a rank's tokens, one of `PEERS`."""
    if what == YUNCHANG:
        return yunchang_attention()
    if what == YUNCHANG_RING:
        return yunchang_ring()
    if what == PEER_RING:
        return partial(ring_attention, is_causal=True)
    ulysses = deepspeed_attention() if HAS_DEEPSPEED else DistributedAttention(sdpa)
    return partial(ulysses, batch_dim_idx=0)


def deepspeed_attention() -> Any:
    """DeepSpeed's pipeline, batch-first, with PyTorch's attention on each rank."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)  # it reports what it finds on this machine
    import deepspeed.comm  # pyright: ignore[reportMissingImports]
    from deepspeed.sequence import layer  # pyright: ignore[reportMissingImports]

    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False)
    return layer.DistributedAttention(sdpa, dist.group.WORLD, scatter_idx=2, gather_idx=1)


def yunchang_attention() -> Any:
    """yunchang's Ulysses, with PyTorch's attention on each rank."""
    from yunchang import UlyssesAttention  # pyright: ignore[reportMissingImports]
    from yunchang.kernels import AttnType  # pyright: ignore[reportMissingImports]

    attention = UlyssesAttention(dist.group.WORLD, attn_type=AttnType.TORCH_MATH)
    attention.attn_fn = lambda q, k, v, **options: sdpa(q, k, v)
    return attention


def yunchang_ring() -> Any:
    """yunchang's ring, with PyTorch's kernel for CPUs in place of that for GPUs."""
    from yunchang.kernels import attention  # pyright: ignore[reportMissingImports]
    from yunchang.ring import ring_pytorch_attn  # pyright: ignore[reportMissingImports]

    for_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention._scaled_dot_product_flash_attention = for_cpu
    return partial(ring_pytorch_attn.ring_pytorch_attn_func, causal=True, group=dist.group.WORLD)


def _runs(attend: Callable[[], torch.Tensor], leaves: Any, grad: torch.Tensor) -> list[Run]:
    def forward() -> None:
        with torch.no_grad():
            attend()

    return [forward, lambda: torch.autograd.grad(attend(), leaves, grad)]
