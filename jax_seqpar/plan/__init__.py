"""Planning: a program's transfers, memory, FLOPs and overlap on devices that may be absent.

`plan` answers for any function that can be jitted, as the command `seqpar plan` does.

A `Program` describes the attention of one call: a topology, shapes, a mask, a strategy. Its
`compile` asks the compiler of that topology, which runs on any machine, and returns the
`jax.stages.Compiled` of JAX. The functions here read that one, or any other program of `jax.jit`.

    from jax_seqpar import Mask
    from jax_seqpar.plan import Program, collectives, temporaries

    shapes = {"query": (1, 131072, 16, 128), "key": (1, 131072, 8, 128)}
    compiled = Program("v5e:2x4", **shapes, mask=Mask(is_causal=True), gradients=True).compile()
    collectives(compiled)  # {"all-to-all": 8}
    temporaries(compiled)  # bytes on each device

What a strategy sends needs no compiler: `jax_seqpar.Ulysses().traffic(...)`.
"""

from .compiled_text import all_to_all_bytes as all_to_all_bytes
from .compiled_text import collectives as collectives
from .compiled_text import kernel_calls as kernel_calls
from .compiled_text import kernels_under_transfers as kernels_under_transfers
from .compiled_text import layout_cycles as layout_cycles
from .compiled_text import received_bytes as received_bytes
from .decoder import Decoder as Decoder
from .make_plan import plan as plan
from .memory import temporaries as temporaries
from .program import Program as Program
from .report import Plan as Plan
from .topology import compiler_environment as compiler_environment
from .topology import devices as devices
from .topology import missing_compiler as missing_compiler
from .topology import platform_of as platform_of
