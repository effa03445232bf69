"""A plan as tables: whether it fits, what it sends, and how long it takes at least."""

from rich.console import Console
from rich.table import Table

from ..plan.collective_rows import Collective
from ..plan.gibibytes import apart, gib, gib_apart
from ..plan.report import Plan
from ..plan.roofline import Part, together
from .console import say
from .plan_sizes import tokens_as_text


def print_plan(console: Console, plan: Plan) -> None:
    """The whole plan, in the order in which people ask."""
    say(console, headline(plan), style="bold")
    say(console, verdict(plan), style=_style(plan))
    if plan.memory is not None:
        console.print(memory_table(plan))
    if plan.collectives:
        console.print(collectives_table(plan))
    if plan.parts:
        console.print(parts_table(plan))
    for line in remarks(plan):
        say(console, line)


def headline(plan: Plan) -> str:
    """The request of a plan, in one line."""
    axes = ", ".join(f"{name} {size}" for name, size in plan.mesh.items())
    tokens = "" if plan.tokens is None else f", {tokens_as_text(plan.tokens)} tokens"
    slices = "" if plan.slices == 1 else f"{plan.slices} x "
    strategy = "" if plan.strategy is None else f", {plan.strategy}"
    machine = f"{slices}{plan.topology}: {plan.devices} devices, {axes}"
    return f"{plan.name}{tokens} on {machine}{strategy}"


def verdict(plan: Plan) -> str:
    """Verdict on the memory of a plan, in one line: whether the program fits on the chip."""
    if plan.failure is not None:
        return plan.failure
    if plan.memory is None:
        return "memory: not checked"
    if plan.fits is None:
        return f"peak {gib(plan.memory.peak)} GiB on each device, whose memory is not known"
    word = "fits" if plan.fits else "does not fit"
    bound, host = "", ""
    if plan.memory.host:
        bound, host = "at most ", f", if its host has {gib(plan.memory.host)} GiB for it"
    peak, most = gib_apart(plan.memory.peak, plan.chip.memory)
    percent, _ = apart(100 * plan.memory.peak / plan.chip.memory, 100, 0)
    return f"{word}: peak {bound}{peak} of {most} GiB on each device ({percent} %){host}"


def memory_table(plan: Plan) -> Table:
    """Memory of a device by part, in GiB, and that of its host."""
    memory = plan.memory
    assert memory is not None
    table = _table("memory of a device", "GiB")
    for name in ("peak", "arguments", "temporaries", "results", "donated"):
        table.add_row(name, gib(getattr(memory, name)))
    if memory.host:
        table.add_row("in its host", gib(memory.host))
    return table


def collectives_table(plan: Plan) -> Table:
    """A row for each kind of collective and mesh axes: runs, bytes, links."""
    heads = ("axis", "by", "runs", "GB, slice", "GB, others", "compiled", "async", "hidden")
    table = _table("collective", *heads)
    for x in plan.collectives:
        table.add_row(x.kind, ", ".join(x.axes) or "?", *_cells(x))
    return table


def parts_table(plan: Plan) -> Table:
    """The roofline: of each named part, of all layers, and of the step."""
    heads = ("TFLOP", "GB", "GB in", "compute ms", "memory ms", "link ms", "bound")
    table = _table("part", *heads)
    for part in plan.parts:
        table.add_row(part.name or "elsewhere", *_numbers(part))
    layers = [x for x in plan.parts if x.name.startswith("layer/")]
    if layers:
        table.add_row("all layers", *_numbers(together("layers", layers, plan.chip)))
    table.add_row("step", *_numbers(plan.step), style="bold")
    return table


def remarks(plan: Plan) -> list[str]:
    """Kernels, copies, the choice of the strategy, and what to know of the numbers."""
    found = []
    if plan.kernels:
        found.append("kernels: " + ", ".join(f"{n} {name}" for name, n in plan.kernels.items()))
    if plan.parts:
        found.append(
            f"at least {1e3 * plan.at_least:,.1f} ms at full speed, of which "
            f"{1e3 * plan.exposed:,.1f} ms are transfers that nothing is known to run under"
        )
    if plan.to_host or plan.from_host:
        found.append(host_copies(plan))
    if plan.copies is not None:
        unknown = plan.copies.unknown
        besides = f"; {unknown} instructions are without an estimate" if unknown else ""
        found.append(
            f"layout copies: {plan.copies.cycles:,} cycles, {100 * plan.copies.share:.0f} % of "
            f"what the compiler estimates, which is neither kernels nor transfers{besides}"
        )
    if plan.choice is not None:
        found.append(f"choose_strategy: {plan.choice.reason}")
    found += [f"note: {note}" for note in plan.notes]
    return found


def host_copies(plan: Plan) -> str:
    """Bytes that go to the memory of the host and back, and the least time of the copies."""
    moved = f"host: {plan.to_host / 1e9:.3f} GB to that of each device, {plan.from_host / 1e9:.3f}"
    if plan.host is None:
        speed = f"in a time that is unknown, as no speed of a {plan.chip.name}'s link is published"
        return f"{moved} GB back, {speed}"
    return f"{moved} GB back: {1e3 * plan.host:,.1f} ms at {plan.chip.host / 1e9:,.0f} GB/s"


def sweep_table(plans: list[Plan], against: str) -> Table:
    """One line for each plan."""
    table = _table(against, "fits", "peak GiB", "at least ms", "TFLOP", "bound")
    for plan in plans:
        point = str(degree_of(plan)) if against == "degree" else tokens_as_text(plan.tokens or 0)
        peak = plan.memory.peak if plan.memory else plan.needed
        fits = {True: "yes", False: "no", None: "?"}[plan.fits]
        time = f"{1e3 * plan.at_least:,.1f}" if plan.parts else ""
        memory = "" if peak is None else gib(peak)
        table.add_row(point, fits, memory, time, f"{plan.flops / 1e12:,.1f}", plan.bound)
    return table


def degree_of(plan: Plan) -> int:
    """Devices that share the tokens of a sequence."""
    found = 1
    for name, size in plan.mesh.items():
        found *= 1 if name in ("data", "tensor") else size
    return found


def _cells(x: Collective) -> tuple[str, ...]:
    compiled = ("", "", "") if x.compiled is None else (x.compiled, x.asynchronous, x.hidden)
    return (
        "program" if x.written else "compiler",
        str(x.count),
        f"{x.inside / 1e9:.3f}",
        f"{x.between / 1e9:.3f}",
        *map(str, compiled),
    )


def _numbers(part: Part) -> tuple[str, ...]:
    return (
        f"{part.flops / 1e12:,.2f}",
        f"{part.bytes / 1e9:,.2f}",
        f"{(part.inside + part.between) / 1e9:,.3f}",
        *(f"{1e3 * x:,.1f}" for x in (part.compute, part.memory, part.link)),
        part.bound,
    )


def _table(name: str, *numbers: str) -> Table:
    """A table for 80 columns: a name that is too long is folded, a number is never cut."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column(name, overflow="fold")
    for head in numbers:
        table.add_column(head.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def _style(plan: Plan) -> str | None:
    return {True: "green", False: "red", None: None}[plan.fits]
