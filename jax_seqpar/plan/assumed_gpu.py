"""An absent GPU, assumed while a program for it is traced: its compute capability, and cuDNN."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax._src.cudnn import fused_attention_stablehlo

from ..kernels import cudnn
from .gpu_targets import gpu_target

JAX_CUDNN: Any = fused_attention_stablehlo
CUDNN_VERSION = 91000  # 9.10, as in the description of an H100


class _Versions:
    @staticmethod
    def cudnn_get_version() -> int:
        return CUDNN_VERSION


@contextmanager
def assumed_gpu(topology: str) -> Iterator[None]:
    """Pretends that JAX sees a GPU of this topology.

    JAX asks for cuDNN's version while it traces, and raises "cuDNN is not detected" without its
    CUDA plugin (JAX 0.10.2), though nothing is compiled yet.
    """
    before = JAX_CUDNN.cuda_versions
    if before is None:
        JAX_CUDNN.cuda_versions = _Versions()
    try:
        with cudnn.assume_compute_capability(gpu_target(topology).compute_capability):
            yield
    finally:
        JAX_CUDNN.cuda_versions = before
