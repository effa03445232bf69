"""What the text of a compiled program says: collectives, bytes, kernels, what runs under transfers.

A program is a `jax.stages.Compiled`, or its text, by XLA for CPUs and GPUs or by libtpu. The text
has an instruction of a loop once, however often the loop runs; so has every number here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

import jax

AnyProgram = jax.stages.Compiled | str

COLLECTIVES = (
    "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
)
# What a compiled program has for each call of the fused kernel.
KERNELS = {
    "tpu": 'custom_call_target="tpu_custom_call"',
    "gpu": 'custom_call_target="__cudnn$fmha',
}


def collectives(program: AnyProgram) -> dict[str, int]:
    """How many of each collective a compiled program has, as `{"all-to-all": 4}`.

    One that is started and awaited counts once. libtpu makes a reduce-scatter a fusion with an
    all-reduce inside, and a collective-permute where the devices do not divide the array (seen in
    the gradients of `AllGatherKV` for v5e:2x4, libtpu 0.0.42).
    """
    return dict(Counter(re.findall(rf"\b({COLLECTIVES})(?:-start)?\(", _text(program))))


def all_to_all_bytes(program: AnyProgram) -> int:
    """Bytes that one device puts into all-to-alls, its own share included."""
    return sum(_result_bytes(program, "all-to-all"))


def received_bytes(program: AnyProgram, degree: int) -> int:
    """Bytes that one device receives from others in all-to-alls and all-gathers.

    Those of a program without gradients are `Strategy.traffic`, but that XLA:CPU sends 16-bit
    numbers through an all-gather as 32-bit ones. Other collectives are not counted.

    Args:
      degree: devices that take part in each of these collectives.
    """
    return sum(_result_bytes(program, "all-to-all|all-gather")) * (degree - 1) // degree


def kernel_calls(program: AnyProgram) -> int:
    """How many calls of a fused kernel a compiled program has.

    On a TPU these are all Pallas kernels: 1 of splash attention forward, 3 with gradients. On a GPU
    those of cuDNN's attention: 1 and 2.
    """
    text = _text(program)
    return sum(text.count(kernel) for kernel in KERNELS.values())


def kernels_under_transfers(program: AnyProgram) -> dict[str, tuple[str, ...]]:
    """Asynchronous all-to-alls, each with the fused kernels scheduled between its start and end.

    A transfer with none is waited for, unless other work is there. A synchronous all-to-all hides
    under nothing and is not listed. A kernel may be under several transfers. Loops are not read.

    Returns:
      the names of kernels by that of the transfer's first instruction, in the order of the program.

    Raises:
      ValueError: for the text of a program that is not compiled, so that it has no order.
    """
    text = _text(program)
    if "is_scheduled=true" not in text:
        raise ValueError(
            f"the program {text[:40]!r}... is not scheduled, so nothing is known of its order. "
            f"Write lowered.compile(), not lowered.as_text()."
        )
    under_way: list[str] = []
    found: dict[str, tuple[str, ...]] = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\(%?([\w.-]+)?", line)
        if instruction is None:
            continue
        name, operation, operand = instruction.groups()
        if operation == "all-to-all-start":
            # XLA:GPU writes synchronous ones as a start and an end, too, with nothing in between.
            if '"is_sync":true' not in line:
                under_way.append(name)
                found[name] = ()
        elif operation == "all-to-all-done":
            under_way = [transfer for transfer in under_way if transfer != operand]
        elif kernel_calls(line):
            found |= {transfer: (*found[transfer], name) for transfer in under_way}
    return found


def _text(program: AnyProgram) -> str:
    text = program if isinstance(program, str) else program.as_text()
    if text is None:
        raise ValueError(
            f"the compiler of {program!r} gives no text. Give a program that is compiled for a "
            f"TPU, a GPU or a CPU."
        )
    return text


def _result_bytes(program: AnyProgram, kinds: str) -> Iterator[int]:
    """Bytes of each array that collectives give.

    The type of a start has operands and contexts in it, too; that of its end has the result alone.
    """
    for results in re.findall(rf"= (.*?) (?:{kinds})(?:-done)?\(", _text(program)):
        for dtype, bits, sizes in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", results):
            size = math.prod(int(n) for n in sizes.split(",") if n)
            yield size * (8 if dtype == "pred" else int(bits)) // 8
