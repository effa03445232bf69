"""One device's attention: kernels of one protocol, each stating what it supports."""

from .blockwise import Blockwise as Blockwise
from .blockwise import blockwise_attention as blockwise_attention
from .choice import KernelChoice as KernelChoice
from .choice import choose_kernel as choose_kernel
from .dense import Dense as Dense
from .dense import dense_attention as dense_attention
from .function_kernel import FunctionKernel as FunctionKernel
from .function_kernel import as_kernel as as_kernel
from .fused import Fused as Fused
from .fused import fused_attention as fused_attention
from .kernel import Kernel as Kernel
from .residual import Residual as Residual
from .triton import Triton as Triton
