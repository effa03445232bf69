"""One device's attention: kernels of one protocol, each stating what it supports."""

from .blockwise import Blockwise as Blockwise
from .blockwise import blockwise_attention as blockwise_attention
from .choice import KernelChoice as KernelChoice
from .choice import choose_kernel as choose_kernel
from .dense import Dense as Dense
from .dense import dense_attention as dense_attention
from .function_kernel import FunctionKernel as FunctionKernel
from .function_kernel import as_kernel as as_kernel
from .kernel import Kernel as Kernel
from .softmax_residual import Residual as Residual
from .splash_or_cudnn import Fused as Fused
from .splash_or_cudnn import fused_attention as fused_attention
from .triton import Triton as Triton
