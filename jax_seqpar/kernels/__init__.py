"""One device's attention: functions of one signature, each stating what it supports."""

from .blockwise import blockwise_attention as blockwise_attention
from .choice import KernelChoice as KernelChoice
from .choice import choose_kernel as choose_kernel
from .dense import dense_attention as dense_attention
from .fused import fused_attention as fused_attention
