"""`seqpar parity --report`: one page whose pictures show where bits differ, and no other file."""

import base64
import re
import struct
import sys
import zlib
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jax_seqpar import cli
from jax_seqpar.bridge.torch_ranks import RankError
from jax_seqpar.cli import parity_command, parity_question
from jax_seqpar.compare.picture import COLUMNS, ROWS, SEQUENCES, Picture, picture
from jax_seqpar.parity import pictures
from jax_seqpar.parity import run as parity
from jax_seqpar.parity.checks import PipelineCheck, history_checks, pipeline
from jax_seqpar.parity.html_report import html_report
from jax_seqpar.parity.inputs import Case
from torch_ref.wrong_versions import WRONG_VERSIONS

pytestmark = pytest.mark.usefixtures("less_optimised")

CASE = Case(2, 4, 4, 2, 3)
TINY = ("--batch=2", "--tokens=4", "--heads=4", "--kv-heads=2", "--head-dim=3")
ABOUT = {"command": "seqpar parity", "versions": {"jax": "1", "torch": None}, "platform": "here"}
VOID = {"meta", "br", "img", "rect"}


class Page(HTMLParser):
    """Page as a browser reads it: text, images, addresses; every tag has to be closed."""

    def __init__(self, source):
        super().__init__()
        self.open, self.words, self.images, self.addresses, self.ids = [], [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.images += [given] if tag == "img" else []
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def decoded(image):
    """The pixels `[rows, columns, 4]` of a PNG in a data URI, by the format's description."""
    file = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(file):
        size, kind = struct.unpack(">I4s", file[place : place + 8])
        chunks[kind] = file[place + 8 : place + 8 + size]
        (checksum,) = struct.unpack(">I", file[place + 8 + size : place + 12 + size])
        assert checksum == zlib.crc32(kind + chunks[kind])
        place += 12 + size
    columns, rows, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 6, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 4)


def masks(page):
    """Masks of the visible cells of each image of differing bits, `[rows, columns]`."""
    shown = [x for x in page.images if x["alt"].startswith("where the bits differ")]
    return [decoded(x)[..., 3] > 0 for x in shown]


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    """The command that a page tells: of a test, that of the test's process."""
    monkeypatch.setattr(sys, "argv", ["/bin/seqpar", "parity", "--scale", "0.5", "--report", "a b"])


def seqpar(*arguments):
    environment = {"COLUMNS": "500", "TERMINAL_WIDTH": "500"}
    return CliRunner().invoke(cli.app, ["parity", *map(str, arguments)], env=environment)


def drawn(a, b):
    found = picture(a, b)
    assert found is not None
    return found


def compared(check, degree, jax_side, torch_side):
    """The result and evidence of a check, of both sides' outputs."""
    parts = [
        {name: np.split(x, degree, axis=1)[rank] for name, x in torch_side.items()}
        for rank in range(degree)
    ]
    result, joined = parity._compare(check, degree, parts, jax_side)
    found = pictures.evidence(check, result.reports, jax_side, joined)
    return replace(result, evidence=found)


def test_a_planted_transposition_is_seen_where_it_is(monkeypatch, tmp_path):
    """Each JAX device reads its [B, S, n, H] as [B, n, S, H]; the ranks of PyTorch do not."""

    def transposed(query, key, value):
        return query.swapaxes(1, 2).reshape(query.shape)

    def two_checks(degree, named, spec, kernels, seed):
        wrong = next(
            c for c in history_checks(degree, named["grouped"]) if c.name == "history v2 sbhd"
        )
        return [PipelineCheck(degree, named["grouped"], "identity"), wrong]

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(pipeline, "_identity", transposed)
    monkeypatch.setattr(pipeline, "_jax_program", pipeline._jax_program.__wrapped__)
    monkeypatch.setattr(parity_question, "plan", two_checks)
    file = tmp_path / "report.html"
    result = seqpar(*TINY, "--degree=2", "--report", file)
    assert result.exit_code == 1, result.output
    page = Page(file.read_text())
    assert "NOT EQUAL: 1 of 2 checks failed." in page.text
    assert "identity, degree 2: DIFFERS" in page.text
    assert "history v2 sbhd, degree 2: caught" in page.text
    assert "DeepSpeed 0.14.4 (#5664)" in page.text
    assert "seqpar parity --scale 0.5 --report 'a b'" in page.text

    query = CASE.inputs()["query"]
    halves = np.split(query, 2, axis=2)
    wrong = np.concatenate([x.swapaxes(1, 2).reshape(x.shape) for x in halves], axis=2)
    known = (wrong != query).any(axis=3)
    assert 0 < known.sum() < known.size
    np.testing.assert_array_equal(np.stack(masks(page)[:2]), known)

    # JAX's picture has a colour for each place, PyTorch's the same colours where they moved to.
    right, moved = (
        np.stack([decoded(x) for x in page.images if x["alt"].startswith(f"{side}, ")][:2])
        for side in ("JAX", "PyTorch")
    )
    places = np.arange(2 * 4 * 4).reshape(2, 4, 4, 1)
    halves = np.split(places, 2, axis=2)
    sources = np.concatenate([x.swapaxes(1, 2).reshape(x.shape) for x in halves], axis=2)
    # `b` is PyTorch's, which is right: it lies where JAX's wrong array has it.
    flat = right.reshape(-1, 4)
    assert len({tuple(x) for x in flat.tolist()}) == 32
    np.testing.assert_array_equal(moved.reshape(-1, 4)[sources.ravel()], flat)


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    check = PipelineCheck(2, CASE.inputs(), "identity", label="<script>&")
    truth = check.truth()
    equal = compared(check, 2, truth, truth)
    other = {**truth, "forward": -truth["forward"]}
    results = [equal, replace(compared(check, 2, other, truth), name="a <b>name</b>")]
    source = html_report(results, ["inputs <i>as read</i>"], ABOUT)
    page = Page(source)
    assert "NOT EQUAL: 1 of 2 checks failed." in page.text
    for result in results:
        assert result.name in page.text
        assert result.verdict in page.text
    assert "inputs <i>as read</i>" in page.text
    assert {"jax 1", "torch not installed", "platform here"} <= set(
        re.findall(r"jax 1|torch not installed|platform here", page.text)
    )
    assert all(re.match(r"data:image/png;base64,|#check-\d+$", x) for x in page.addresses)
    assert {x[1:] for x in page.addresses if x[0] == "#"} <= set(page.ids)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", source)
    assert 'name="viewport"' in source
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize("degree", (1, 2))
def test_wrong_versions_have_the_picture_that_the_truth_table_says(degree):
    """Pictures of labels by the reshard that is wrong; where PyTorch raises, its words."""
    found = {}
    for check in history_checks(degree, CASE.inputs()):
        evidence = pictures.evidence(check, {}, {}, {})
        assert WRONG_VERSIONS[str(check.version)].published in evidence.about
        assert bool(evidence.reshards) == (check.expected != "right")
        found[check.name] = evidence.reshards
    if degree == 1:
        return
    shuffled = found["history v1"]["sequence to heads"]
    assert isinstance(shuffled, Picture)
    assert shuffled.source is not None
    # Of two ranks with two tokens each, batch-first v1 swaps tokens 2, 3 of one sequence with 0, 1
    # of the other: it takes the axis of the ranks before that of the batch.
    np.testing.assert_array_equal(shuffled.share[:, :, 0] > 0, [[0, 0, 1, 1], [1, 1, 0, 0]])
    source = shuffled.source // 4 % 4 + 10 * (shuffled.source // 16)
    np.testing.assert_array_equal(source[:, :, 0], [[0, 1, 10, 11], [2, 3, 12, 13]])
    assert "invalid for input of size" in found["history v1"]["heads to sequence"]
    assert (
        "shape [8, 4, 1], and [2, 4, 4] is right" in found["history v5 sbhd"]["heads to sequence"]
    )


def test_one_bit_of_a_large_array_is_seen():
    a = np.zeros((6, 1000, 70, 5), np.float32)
    b = a.copy()
    b.view(np.uint32)[4, 777, 69, 2] = 3
    b.view(np.uint32)[4, 777, 69, 3] = 1 << 31
    found = drawn(a, b)
    assert found.share.shape == (SEQUENCES, ROWS, COLUMNS)
    (cell,) = np.argwhere(found.share)
    sequence, row, column = found.sequences[cell[0]], found.tokens[cell[1]], found.heads[cell[2]]
    assert (sequence, column) == (4, 68)
    end = found.tokens[cell[1] + 1]
    assert row <= 777 < end
    assert found.share[tuple(cell)] == np.ceil(255 * 2 / ((end - row) * 2 * 5))
    assert found.source is None
    assert found.ulp == (1, 0, 1)  # -0 against +0, and a distance of 3


def test_distances_are_counted_by_powers_of_two():
    a = np.ones((1, 1, 1, 9), np.float32)
    b = a.copy()
    b.view(np.uint32)[0, 0, 0, :6] += np.array([1, 2, 3, 4, 7, 8], np.uint32)
    b[0, 0, 0, 6:8] = np.nan, np.inf
    assert drawn(a, b).ulp == (0, 1, 2, 2, 1)


def test_tokens_and_heads_that_moved_have_their_source():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 10, 4, 6)).astype(np.float16)
    b = np.roll(a, 1, axis=1)[:, :, ::-1]
    b[2, 5, 1] = 7
    found = drawn(a, b)
    expected = np.roll(np.arange(120).reshape(3, 10, 4), 1, axis=1)[:, :, ::-1].copy()
    expected[2, 5, 1] = -1
    np.testing.assert_array_equal(found.source, expected)


def test_there_is_no_picture_of_what_is_no_pair():
    x = np.ones((2, 3, 4, 5), np.float32)
    assert picture(x, x) is None
    assert picture(x, -x[:, :, :, :4]) is None
    assert picture(x, 2 * x.astype(np.float16)) is None
    assert picture(x[0], -x[0]) is None


def planned(monkeypatch, outcome):
    """Runs of the command, none of which computes anything."""
    asked = []

    def run_parity(checks, degree, **options):
        asked.append(options)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(parity_command, "run_parity", run_parity)
    return asked


def test_a_page_that_cannot_be_written_is_refused_before_the_run(monkeypatch, tmp_path):
    asked = planned(monkeypatch, [])
    for place, said in (
        (tmp_path, "is a folder. Write the name of a file"),
        (tmp_path / "none" / "a.html", "there is no folder"),
        ("/proc/report.html", "/proc/report.html"),
    ):
        result = seqpar(*TINY, "--degree=2", "--report", place)
        assert result.exit_code == 2
        assert said in result.output
    assert asked == []


def test_pictures_are_computed_for_a_report_alone(monkeypatch, tmp_path):
    asked = planned(monkeypatch, [])
    seqpar(*TINY, "--degree=2")
    seqpar(*TINY, "--degree=2", "--report", tmp_path / "a.html")
    assert [options["pictures"] for options in asked] == [False, True]

    def unwanted(*_):
        raise AssertionError("a picture that nobody asked for")

    monkeypatch.undo()
    monkeypatch.setattr(parity, "evidence", unwanted)
    check = PipelineCheck(1, CASE.inputs(), "identity")

    @contextmanager
    def start_ranks(*_, **__):
        yield lambda: [[check.truth()]]

    monkeypatch.setattr(parity, "start_ranks", start_ranks)
    (result,) = parity.run_parity([check], 1)
    assert result.evidence is None
    with pytest.raises(AssertionError, match="nobody asked"):
        parity.run_parity([check], 1, pictures=True)


def test_a_run_that_does_not_end_leaves_no_verdict(monkeypatch, tmp_path):
    planned(monkeypatch, RankError("rank 1 of 2 failed"))
    file = tmp_path / "report.html"
    file.write_text("EQUAL")
    assert seqpar(*TINY, "--degree=2", "--report", file).exit_code == 3
    page = Page(file.read_text())
    assert "The run did not end." in page.text
    assert "EQUAL" not in page.text
