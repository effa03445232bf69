"""Reports of the planner on compiled programs: values, JSON, charts."""

import json
from dataclasses import replace
from typing import Any

import pytest

from jax_seqpar.chips import CHIPS, Chip
from jax_seqpar.cli.plan_chart import chart
from jax_seqpar.cli.plan_sizes import layout_of, mesh_of, size_of, tokens_as_text
from jax_seqpar.cli.plan_table import memory_table, sweep_table, verdict
from jax_seqpar.plan import Plan
from jax_seqpar.plan.answer import OUT_OF_MEMORY, _without_program
from jax_seqpar.plan.collective_rows import Collective, collectives_of
from jax_seqpar.plan.compiled_text import Copies, layout_copies, layout_cycles
from jax_seqpar.plan.count import Sent
from jax_seqpar.plan.largest import largest, predict
from jax_seqpar.plan.machine import Machine
from jax_seqpar.plan.report import Chosen, Memory
from jax_seqpar.plan.roofline import part
from jax_seqpar.plan.scopes import part_of
from jax_seqpar.plan.transfers import across_slices, transfers

MACHINE = Machine("v5e:2x4", 1, {"data": 2, "seq": 4})
CHIP = Chip("c", flops=100.0, inside=10.0, between=1.0, bandwidth=50.0, memory=1000.0)
# As libtpu and XLA write them, shortened: groups in each of their forms, along "seq" and "data".
TEXT = """HloModule jit_step, is_scheduled=true

%body (p: f32[2]) -> f32[2] {
  %all-gather.9 = bf16[8]{0} all-gather(%p), channel_id=9, replica_groups={{0,4},{1,5},{2,6},{3,7}}, metadata={op_name="jit(f)/jvp(layer/mlp)/while/body/dot_general"}
}

%async_collective_fusion.1 (p: f32[2]) -> f32[2] {
  %all-gather.1 = bf16[64]{0} all-gather(%p), channel_id=12, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/jvp(loss)/convert_element_type"}
}

%async_collective_fusion.2 (p: f32[2]) -> f32[2] {
  %all-gather.2 = bf16[64]{0} all-gather(%p), channel_id=12, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, frontend_attributes={chain_id="0"}, metadata={op_name="jit(f)/jvp(loss)/convert_element_type"}
}

ENTRY %main () -> f32[2] {
  %all_to_all.1 = bf16[4,8]{1,0} all-to-all(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/jvp(layer/attention)/shard_map/all_to_all"}
  %all-to-all-start = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}, u32[]) all-to-all-start(%b), channel_id=1, replica_groups=[2,4]<=[8], metadata={op_name="jit(f)/layer/attention/all_to_all"}
  %splash.1 = bf16[4,8] custom-call(%d), custom_call_target="tpu_custom_call"
  %all-to-all-done = bf16[4,8]{1,0} all-to-all-done(%all-to-all-start)
  %w = f32[2] while(%t), condition=%cond, body=%body
  %collective-permute-start = (f32[4]{0}, f32[4]{0}) collective-permute-start(%c), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(f)/ppermute"}, backend_config={"is_sync":true}
  %collective-permute-done = f32[4]{0} collective-permute-done(%collective-permute-start)
  %all-reduce.1 = f32[8]{0} all-reduce(%c), replica_groups=[4,2]<=[2,4]T(1,0), metadata={op_name="jit(f)/psum_invariant"}
  %all-reduce.2 = (f32[8]{0}, bf16[2]{0}) all-reduce(%c, %d), replica_groups={}, metadata={op_name="jit(f)/dot_general"}
  ROOT %copy.1 = f32[2]{0} copy(%w), backend_config={"estimated_cycles":"30"}
  %fusion.1 = f32[2]{0} fusion(%w), backend_config={"estimated_cycles":"70"}
}
"""  # noqa: E501


def found() -> list[Any]:
    return transfers(TEXT)


def test_the_groups_of_every_form_are_mesh_axes():
    axes = {x.name: MACHINE.groups.get(x.groups) for x in found() if "permute" not in x.kind}
    assert axes == {
        "all-gather.9": ("data",),
        "all-gather.1": ("seq",),
        "all_to_all.1": ("seq",),
        "all-to-all-start": ("seq",),
        "all-reduce.1": ("data",),
        "all-reduce.2": None,  # those of all devices are not written
    }


def test_a_fused_gather_counts_once_by_its_channel():
    gathers = [x for x in found() if x.kind == "all-gather"]
    assert [(x.name, x.nbytes, x.asynchronous, x.in_loop) for x in gathers] == [
        ("all-gather.9", 16, False, True),
        ("all-gather.1", 128, True, False),
    ]
    assert [x.part for x in gathers] == ["layer/mlp", "loss"]


def test_what_is_asynchronous_in_truth():
    by_name = {x.name: (x.asynchronous, x.under) for x in found()}
    assert by_name["all-to-all-start"] == (True, ("splash.1",))
    assert by_name["all_to_all.1"] == (False, ())
    assert by_name["collective-permute-start"] == (False, ())  # "is_sync" says so


def test_the_rows_of_a_plan():
    """Counts of what the program writes are those of its loops; of what is added, of the text."""
    sent = [Sent("all-to-all", ("seq",), "layer/attention", 96.0, 2)]
    rows, received = collectives_of(sent, found(), MACHINE)
    by_key = {(x.kind, x.axes, x.written): x for x in rows}
    assert by_key["all-to-all", ("seq",), True] == Collective(
        *("all-to-all", ("seq",), 2, 96.0, 0.0, True),
        compiled=2,
        asynchronous=1,
        hidden=1,
        under=("splash.1",),
    )
    assert by_key["all-gather", ("seq",), False].inside == 128 * 3 / 4
    assert by_key["all-reduce", ("data", "seq"), False].inside == 2 * (32 + 4) * 7 / 8
    assert sum(x.inside for x in received if x.part == "loss") == 96.0


# Of libtpu for tpu7x: a gather by a SparseCore, of two instructions made into one, and scatters
# without a name.
FUSED = """HloModule jit_step, is_scheduled=true

%called_computation.1 (p: bf16[16]) -> bf16[64] {
  %all-gather.1 = bf16[64]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(f)/jvp(loss)/sharding_constraint;jit(f)/jvp(loss)/convert_element_type"}
}

ENTRY %main () -> f32[2] {
  %all-gather.1.call-start = ((bf16[16]{0}, token[]), bf16[64]{0}) call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %splash.1 = bf16[4,8] custom-call(%d), custom_call_target="tpu_custom_call"
  %all-gather.1.call-done = bf16[64]{0} call-done(%all-gather.1.call-start)
  %splash.2 = bf16[4,8] custom-call(%d), custom_call_target="tpu_custom_call"
  %reduce-scatter.1 = f32[4]{0} reduce-scatter(%a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %reduce-scatter.2 = f32[8]{0} reduce-scatter(%b), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}
}
"""  # noqa: E501


def test_a_sum_that_the_compiler_scatters_counts_once():
    sent = [Sent("all-reduce", ("seq",), "layer/mlp", 2 * 16 * 3.0, 1)]
    rows, received = collectives_of(sent, transfers(FUSED), MACHINE)
    by_key = {(x.kind, x.written): x for x in rows}
    summed = by_key["all-reduce", True]
    assert (summed.count, summed.inside, summed.compiled) == (1, 96.0, 1)
    # Another one, which brings what no sum of the program does, is the compiler's.
    assert by_key["reduce-scatter", False].inside == 32 * 3
    assert [x.part for x in received] == ["layer/mlp", "loss", ""]
    gathered = by_key["all-gather", False]
    assert (gathered.asynchronous, gathered.hidden, gathered.under) == (1, 1, ("splash.1",))
    assert (summed.asynchronous, summed.hidden) == (0, 0)


def test_a_plan_of_slices_has_sends():
    machine = Machine("v5e:2x4", 2, {"seq": 16})
    text = (
        ' %s = (f32[2]) send(%a), frontend_attributes={_xla_megascale_transfer_type="ALL_TO_ALL"}'
    )
    assert across_slices(text + "\n" + text) == {"all-to-all": 2}
    sent = [Sent("all-to-all", ("seq",), "", 15.0, 2)]
    (row,), _ = collectives_of(sent, [], machine, across_slices(text))
    assert (row.between, row.inside, row.link) == (pytest.approx(8), pytest.approx(7), "between")
    assert (row.compiled, row.asynchronous, row.hidden) == (1, 1, 0)


def test_layout_copies_are_a_share():
    assert layout_copies(TEXT) == Copies(30, 100)
    assert Copies(30, 100).share == 0.3
    # Work of a SparseCore, of which libtpu has no estimate.
    unknown = f'  %copy.2 = f32[2] copy(%w), backend_config={{"estimated_cycles":"{2**63 - 1}"}}\n'
    assert layout_copies(TEXT + unknown) == Copies(30, 100, unknown=1)
    assert layout_cycles(TEXT + unknown) == 100
    assert layout_copies("HloModule a\n") is None


@pytest.mark.parametrize(
    ("scope", "part"),
    (
        ("jit(f)/jvp(layer/mlp)/shard_map/while/body", "layer/mlp"),
        ("transpose(jvp(jvp()))/checkpoint/rematted_computation/layer/mlp/x", "layer/mlp"),
        ("jvp(attention)/vmap(static_sparsity_splash)/splash_mha", "attention"),
        ("jvp(loss)/bsd,dv->bsv", "loss"),
        ("jit(f)/jit(g)", ""),
    ),
)
def test_the_part_of_a_scope(scope, part):
    assert part_of(scope) == part


def test_the_roofline_says_what_bounds():
    assert part("a", 200.0, 50.0, 0.0, 0.0, CHIP).bound == "compute"
    assert part("a", 100.0, 100.0, 0.0, 0.0, CHIP).bound == "memory"
    slow = part("a", 100.0, 50.0, 5.0, 3.0, CHIP)
    assert (slow.bound, slow.link, slow.seconds) == ("link", 3.5, 3.5)


def plan_of(tokens: int, *, peak: int, **fields: Any) -> Plan:
    memory = Memory(peak, 100, peak, 50, 20)
    plan = Plan("f", "v5e:2x4", 1, {"seq": 8}, 8, CHIP, tokens, memory)
    return replace(plan, **({"parts": (part("a", 10.0 * tokens, 9.0, 8.0, 7.0, CHIP),)} | fields))


def test_a_plan_fits_by_its_peak():
    """Arguments and temporaries together are more: 100 + 950 of 1000."""
    assert plan_of(1, peak=950).fits is True
    assert plan_of(1, peak=1001).fits is False
    assert replace(plan_of(1, peak=1), memory=None).fits is None
    assert replace(plan_of(1, peak=1), memory=None, needed=2000).fits is False


@pytest.mark.parametrize(
    ("bytes_over", "said"),
    (
        (-(2 << 30), "fits: peak 29.25 of 31.25 GiB on each device (94 %)"),
        (0, "fits: peak 31.25 of 31.25 GiB on each device (100 %)"),
        (3 << 20, "does not fit: peak 31.253 of 31.250 GiB on each device (100.01 %)"),
        (1, "does not fit: peak 31.250000001 of 31.250000000 GiB on each device (100.000000003 %)"),
    ),
)
def test_a_peak_beside_its_limit_differs(bytes_over, said):
    """A peak that is over the limit by little has the digits that show it."""
    limit = 125 << 28
    plan = replace(plan_of(1, peak=limit + bytes_over), chip=replace(CHIP, memory=float(limit)))
    assert verdict(plan) == said


def test_the_memory_of_the_host_is_apart():
    plan = replace(plan_of(1, peak=950), memory=Memory(2 << 30, 1, 1, 1, 0, host=3 << 30))
    plan = replace(plan, chip=replace(CHIP, memory=float(4 << 30)))
    assert plan.fits is True
    assert verdict(plan) == (
        "fits: peak at most 2.00 of 4.00 GiB on each device (50 %), if its host has 3.00 GiB for it"
    )
    rows = [list(memory_table(x).columns[0].cells) for x in (plan, plan_of(1, peak=950))]
    assert rows[0] == [*rows[1], "in its host"]


def test_a_transfer_under_a_kernel_is_not_exposed():
    row = Collective("all-to-all", ("seq",), 2, 20.0, 0.0, True, compiled=2, hidden=1)
    plan = plan_of(1, peak=1, collectives=(row,), parts=(part("a", 500.0, 1.0, 20.0, 0.0, CHIP),))
    assert (plan.exposed, plan.at_least) == (1.0, 6.0)
    assert replace(plan, collectives=(replace(row, hidden=2),)).at_least == 5.0


def test_json_round_trips():
    row = Collective("all-to-all", ("data", "seq"), 2, 20.0, 1.0, True, 2, 1, 1, ("splash.1",))
    chosen = Chosen("Ulysses()", None, "alone", 1.0, None)
    plan = plan_of(7, peak=9, collectives=(row,), copies=Copies(1, 2), choice=chosen, notes=("n",))
    for one in (plan, replace(plan, memory=None, copies=None, choice=None, failure="no")):
        assert Plan.from_json(one.to_json()) == one
    with pytest.raises(ValueError, match=r"is not a plan .*Give what Plan.to_json wrote"):
        Plan.from_json('{"name": 1}')


@pytest.mark.parametrize("limit", (1000, 2170, 5000, 12_345, *range(800, 14_000, 571)))
@pytest.mark.parametrize("curve", (0.0, 0.05, -0.004, "jump"))
def test_the_largest_is_that_of_brute_force(limit, curve):
    """The largest size fits, and one step more does not, however far memory is from a line."""
    asked: list[int] = []

    def peak(tokens: int) -> int:
        if curve == "jump":  # as where another layout is taken
            return int(100 + 0.5 * tokens + 800 * (tokens > 700) + 3000 * (tokens > 2000))
        return int(100 + 1.5 * tokens + curve * tokens**1.5)

    def plan(tokens: int) -> Plan:
        asked.append(tokens)
        chip = replace(CHIP, memory=float(limit))
        found = replace(plan_of(tokens, peak=peak(tokens)), chip=chip)
        return found if peak(tokens) <= limit else replace(found, memory=None, needed=peak(tokens))

    answer, plans = largest(plan, 64, 16)
    assert answer == max(n for n in range(0, 27_000, 16) if peak(n) <= limit)
    assert len(asked) == len(set(asked)) == len(plans) <= (4 if curve == 0.0 else 20)
    assert {answer, answer + 16} <= set(asked)


@pytest.mark.parametrize("host", (100, 64, 900, 1200))
def test_the_largest_by_the_memory_of_the_host(host):
    """Host memory is full before or after that of the devices, which hold 600 tokens."""

    def plan(tokens: int) -> Plan:
        found = plan_of(tokens, peak=100 + tokens * 3 // 2)
        if tokens > host:
            return replace(found, memory=None, needed_of_host=tokens)
        return found if found.fits else replace(found, memory=None, needed=100 + tokens * 3 // 2)

    assert largest(plan, 64, 16)[0] == min(host, 600) // 16 * 16


def test_nothing_fits():
    def plan(tokens: int) -> Plan:
        return replace(plan_of(tokens, peak=1), memory=None, needed=2000 + tokens)

    assert largest(plan, 64, 16)[0] == 0


def test_a_largest_that_cannot_be_found():
    plan = replace(plan_of(64, peak=1), notes=("3 loops have a length ...",))
    unchecked = ("not checked: memory: pip install libtpu", *plan.notes)
    unknown = replace(plan, chip=replace(CHIP, memory=0.0))
    for found, message in (
        (replace(plan, memory=None, failure="it aborts"), r"of 64 tokens: it aborts. Give other s"),
        (
            replace(plan, memory=None, notes=unchecked),
            r"tokens: not checked: .* libtpu. Give other",
        ),
        (
            replace(plan, memory=None),
            r"of 64 tokens: nothing was compiled. Give .* or its compiler",
        ),
        (
            unknown,
            r"of 64 tokens: the memory of a device of v5e:2x4 is not known, .* topology of a TPU",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            largest(lambda tokens, found=found: found, 64, 16)


def test_the_prediction_is_a_line():
    assert predict([plan_of(10, peak=110)]) == pytest.approx(900)
    assert predict([plan_of(10, peak=110), plan_of(20, peak=310)]) == pytest.approx(54.5)


@pytest.mark.parametrize(
    ("said", "needed"),
    (
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (57.00G) exceeds available HBM (15.75G).", "57.00G"),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 20.10G of 15.75G hbm.", "20.10G"),
    ),
)  # fmt: skip
def test_the_words_of_a_compiler_without_memory(said, needed):
    match = OUT_OF_MEMORY.search(said)
    assert match is not None
    assert (match[1] or match[2]) == needed


@pytest.mark.parametrize(
    ("used", "sentence"),
    (
        ("33.25G of 31.25G hbm. Exceeded hbm capacity by 2.00G.", "33.25 GiB of the 31.25 GiB"),
        ("31.25G of 31.25G hbm. Exceeded hbm capacity by 3.1M.", "31.253 GiB of the 31.250 GiB"),
        ("31.25G of 31.25G hbm.", "more than the 31.25 GiB"),
    ),
)
def test_a_compiler_that_misses_little_memory(used, sentence):
    plan = replace(plan_of(1, peak=1), chip=replace(CHIP, memory=float(125 << 28)))
    found = _without_program(plan, f"RESOURCE_EXHAUSTED: Ran out of memory. Used {used}")
    assert found.failure == f"out of memory: a device needs {sentence} of a c"
    assert found.fits is False


@pytest.mark.parametrize(
    "said",
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "host. Used 165.00G of 128.00G host. Exceeded host capacity by 37.00G.\n  Largest program",
        "RESOURCE_EXHAUSTED: Allocation (size=177167400960) would exceed memory (size=137438953472)"
        " :: %s0 = inlined_call_operand.host [shape: bf16[70,1,1048576,1024], index: 0]",
    ),
)
def test_the_words_of_a_compiler_whose_host_is_full(said):
    plan = _without_program(plan_of(1, peak=1), said)
    assert (plan.needed, plan.needed_of_host, plan.fits) == (None, 165 << 30, False)
    assert plan.failure == (
        "out of the host's memory: a device needs 165.00 GiB of the 128.00 GiB that the compiler "
        "grants it"
    )


def test_a_chart_is_drawn(tmp_path):
    plans = [plan_of(64, peak=200), plan_of(128, peak=600), plan_of(256, peak=1)]
    plans[2] = replace(plans[2], memory=None, needed=1400)
    for against in ("tokens", "degree"):
        chart(plans, against, tmp_path / f"{against}.png")
        assert (tmp_path / f"{against}.png").read_bytes().startswith(b"\x89PNG")
    assert sweep_table(plans, "tokens").row_count == 3


def test_sizes_as_people_write_them():
    assert [size_of(x) for x in ("128K", "1M", "4096", " 2g ")] == [1 << 17, 1 << 20, 4096, 1 << 31]
    assert [tokens_as_text(n) for n in (1 << 17, 1 << 20, 100, 96 << 10)] == [
        *("128K", "1M", "100", "96K")
    ]
    assert mesh_of("data=2,seq=8") == {"data": 2, "seq": 8}
    for text in ("12T", "x", "0", "-4", "1.5M"):
        with pytest.raises(ValueError, match=r"is no size. Write a number as 4096, 128K or 1M"):
            size_of(text)
    with pytest.raises(ValueError, match=r"is no mesh. Write"):
        mesh_of("seq:8")


def test_the_layout_of_named_axes():
    assert layout_of({"data": 2, "seq": 4, "tensor": 2}).axis_names == ("data", "seq", "tensor")
    assert layout_of({"ring": 2, "seq": 8}).tokens == ("ring", "seq")
    assert layout_of({"data": 8}).tokens is None


def test_every_chip_of_the_table_has_a_source():
    assert {chip.source == "" for chip in CHIPS.values()} == {False}
    assert all(chip.bandwidth > chip.inside > chip.between > 0 for chip in CHIPS.values())
    assert all(chip.memory > 10e9 for chip in CHIPS.values())
    # Of no link to a host is known that it is faster than one to a neighbour.
    assert all(0 <= chip.host < chip.inside for chip in CHIPS.values())
    assert [chip.name for chip in CHIPS.values() if not chip.host] == ["tpu7x"]
    assert json.dumps([chip.source for chip in CHIPS.values()])
