"""Collectives, bytes, kernels and overlap with transfers, from the text of a compiled program.

A program is a `jax.stages.Compiled`, or its text, by XLA for CPUs and GPUs or by libtpu. The text
has an instruction of a loop once, however often the loop runs; so has every number here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from .._checks import check_count

AnyProgram = jax.stages.Compiled | str

COLLECTIVES = (
    "ragged-all-to-all|all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    "|collective-broadcast"
)
# The largest signed 64-bit number: libtpu 0.0.42.1 writes it for what a SparseCore of a tpu7x does.
NO_ESTIMATE = 2**63 - 1
# What a compiled program has for each call of a kernel that is not XLA's.
KERNELS = {
    "tpu": 'custom_call_target="tpu_custom_call"',
    "gpu, cuDNN": 'custom_call_target="__cudnn$fmha',
    "gpu, Triton": 'custom_call_target="__gpu$xla.gpu.triton"',
    # From jaxlib 0.10.3 on.
    "gpu, Triton, compiled by JAX": 'custom_call_target="triton_kernel_call_ffi"',
}


def collectives(program: AnyProgram) -> dict[str, int]:
    """Numbers of collectives in a compiled program by kind, as `{"all-to-all": 4}`.

    A collective that is started and awaited counts once. libtpu makes a reduce-scatter a fusion
    with an all-reduce inside, and a collective-permute where the devices do not divide the array
    (seen in the gradients of `AllGatherKV` for v5e:2x4, libtpu 0.0.42).
    """
    return dict(Counter(re.findall(rf"(?<![\w-])({COLLECTIVES})(?:-start)?\(", _text(program))))


def all_to_all_bytes(program: AnyProgram) -> int:
    """Bytes that one device puts into all-to-alls, its own share included."""
    return sum(_result_bytes(program, "all-to-all"))


def received_bytes(program: AnyProgram, degree: int) -> int:
    """Bytes that one device receives from others in all-to-alls, all-gathers, reduce-scatters.

    Those of a program without gradients are `Strategy.traffic` of what one device of the other axes
    has, but that XLA:CPU sends 16-bit numbers through an all-gather as 32-bit ones. Other
    collectives are not counted.

    Args:
      degree: devices that take part in each of these collectives.

    Raises:
      ValueError: for a degree that is not a positive integer, and a program that is not compiled.
    """
    check_count("degree", degree)
    whole = sum(_result_bytes(program, "all-to-all|all-gather")) * (degree - 1) // degree
    return whole + sum(_result_bytes(program, "reduce-scatter")) * (degree - 1)


def kernel_calls(program: AnyProgram) -> int:
    """Number of calls of kernels that are not XLA's in a compiled program.

    These are all Pallas kernels, 1 of splash attention or of `Triton` forward, 3 with gradients;
    and on a GPU those of cuDNN's attention: 1 and 2.
    """
    text = _text(program)
    return sum(text.count(kernel) for kernel in KERNELS.values())


def layout_cycles(program: AnyProgram) -> int:
    """Cycles that libtpu estimates for everything but kernels and transfers.

    In a program of one attention by splash that is what brings arrays into the layouts of the
    kernel and of the all-to-alls. Only libtpu writes such estimates; elsewhere it is 0.
    """
    found = re.findall(r'"estimated_cycles":"(\d+)"', _text(program))
    return sum(n for n in map(int, found) if n != NO_ESTIMATE)


@dataclass(frozen=True)
class Copies:
    """Copies and conversions that only bring arrays into other layouts, as libtpu estimates them.

    Attributes:
      cycles: of the copies, each loop's once.
      all_cycles: of everything that libtpu estimates: neither kernels nor transfers.
      unknown: instructions of which it has no estimate, as copies by the SparseCores of a tpu7x.
    """

    cycles: int
    all_cycles: int
    unknown: int = 0

    @property
    def share(self) -> float:
        return self.cycles / max(self.all_cycles, 1)


def layout_copies(program: AnyProgram) -> Copies | None:
    """The copies of a program by libtpu, and what they are a share of; None of another compiler.

    A copy is an instruction named so: libtpu calls a fusion by what is in it, as
    `copy_bitcast_fusion`.
    """
    estimated = r'^\s+(?:ROOT )?%?([\w.-]+) = .*"estimated_cycles":"(\d+)"'
    every = re.findall(estimated, _text(program), re.MULTILINE)
    if not every:
        return None
    found = [(name, int(n)) for name, n in every if int(n) != NO_ESTIMATE]
    copies = (
        r"(copy|transpose|bitcast|convert)([._-](copy|transpose|bitcast|convert|fusion))*[.\d]*"
    )
    cycles = sum(n for name, n in found if re.fullmatch(copies, name))
    return Copies(cycles, sum(n for _, n in found), len(every) - len(found))


def kernels_under_transfers(program: AnyProgram) -> dict[str, tuple[str, ...]]:
    """Asynchronous transfers, each with the kernels and loops scheduled between its start and end.

    Kernels are the fused ones; loops count, as blockwise attention is a loop. A transfer without
    either is waited for, unless other work is there. A synchronous transfer hides under nothing
    and is not listed; XLA:GPU writes it as a start and an end, too. A kernel may be under several
    transfers. Ask of each transfer whether a kernel is under it: every kernel is under some
    transfer also where one transfer is under way all the time and the others are waited for.

    Returns:
      the names of kernels and loops by that of the transfer's first instruction, in the order of
      the program, the bodies of loops included.

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
    on_other_cores = set(calls_of_transfers(text).values())
    for line in text.splitlines():
        instruction = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z-]*)\(%?([\w.-]+)?", line)
        if instruction is None:
            continue
        name, operation, operand = instruction.groups()
        if re.fullmatch(rf"({COLLECTIVES})-start", operation):
            if '"is_sync":true' not in line:
                under_way.append(name)
                found[name] = ()
        elif operation == "call-start" and name in on_other_cores:
            under_way.append(name)
            found[name] = ()
        elif re.fullmatch(rf"({COLLECTIVES}|call)-done", operation):
            under_way = [transfer for transfer in under_way if transfer != operand]
        elif operation == "while" or any(kernel in line for kernel in KERNELS.values()):
            found |= {transfer: (*found[transfer], name) for transfer in under_way}
    return found


def calls_of_transfers(text: str) -> dict[str, str]:
    """Of each computation with a collective that a SparseCore runs, the name of its call.

    So libtpu makes gathers, scatters and sums of a tpu7x asynchronous.
    """
    called = {
        computation: name
        for name, computation in re.findall(
            r"%?([\w.-]+) = .*? call-start\(.*?to_apply=%?([\w.-]+)", text
        )
    }
    having, computation = set(), ""
    for line in text.splitlines() if called else ():
        if (opened := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)) is not None:
            computation = opened[1]
        elif computation in called and re.search(rf"(?<![\w-])(?:{COLLECTIVES})\(", line):
            having.add(computation)
    return {name: called[name] for name in having}


def _text(program: AnyProgram) -> str:
    text = program if isinstance(program, str) else program.as_text()
    if text is None:
        raise ValueError(
            f"the compiler of {program!r} gives no text. Give a program that is compiled for a "
            f"TPU, a GPU or a CPU."
        )
    if not text.lstrip().startswith("HloModule"):
        raise ValueError(
            f"the program {text[:40]!r}... is not compiled, so it has no collectives yet. Write "
            f"lowered.compile(), not lowered or lowered.as_text()."
        )
    return text


def _result_bytes(program: AnyProgram, kinds: str) -> Iterator[int]:
    """Bytes of what each collective gives.

    The type of a start has operands and contexts in it, too; that of its end has the result alone.
    """
    for results in re.findall(rf"= (.*?) (?:{kinds})(?:-done)?\(", _text(program)):
        yield bytes_of_types(results)


def bytes_of_types(types: str) -> int:
    """Bytes of all the arrays that are named in the type of an instruction."""
    found = 0
    for dtype, bits, sizes in re.findall(r"([a-z]+)(\d*)\w*\[([\d,]*)\]", types):
        size = math.prod(int(n) for n in sizes.split(",") if n)
        found += size * (8 if dtype == "pred" else int(bits)) // 8
    return found
