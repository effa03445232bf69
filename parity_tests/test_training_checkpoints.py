"""Damage to a checkpoint of the training example is named, and the step before it is resumed."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import jax
import jax.numpy as jnp
import long_context_training
import numpy as np
import pytest
from cases import slow
from decoder import Config
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from long_context_training import Run, Text, read, train

from jax_seqpar.training import digest_arrays

pytestmark = [
    pytest.mark.usefixtures("less_optimised"),
    # TensorStore reports further reads to the event loop that Orbax closed at the first failure.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = Config(features=16, hidden=16, layers=1)
TEXT = read([], 64, limit=1 << 15)
RUN = Run(2, tokens=64, batch=2, steps=4, attention="blockwise", save_every=2)
STEPS = (2, 3)


@pytest.fixture(scope="module", autouse=True)
def _as_users_have_it():
    """Optax adds Python floats to integers."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True)
def _reads_forgotten():
    """TensorStore's garbage is collected here; in a test without the filter above it would fail."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of two steps, the state that each restores to, and its losses."""
    folder = tmp_path_factory.mktemp("saved") / "steps"
    losses = train(RUN, TEXT, CONFIG, folder)
    initial, of = initial_state()
    states = {}
    with checkpoints.reader_of(folder) as reader:
        assert tuple(reader.all_steps()) == STEPS
        for step in STEPS:
            states[step], part = checkpoints.restored(reader, step, initial, of)
            assert part == losses[: step + 1]
    return folder, states, initial, of


def initial_state():
    """Initial state of the example, and the options that its losses depend on."""
    got = []

    def resumed(folder, state, of):
        got.append((state, of))
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_context_training, "resumed", resumed)
        with pytest.raises(InterruptedError):
            train(RUN, TEXT, CONFIG)
    return got[0]


def flip(place: float) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        bit = int(place * 8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)

    return change


DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{f"a bit at {place:.0%}": flip(place) for place in (0.0, 0.37, 0.51, 0.999)},
    "deleted": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
}


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


LIKE_ANOTHER = {"a bit at 0%", "a bit at 51%", "a bit at 100%", "empty"}


@pytest.mark.parametrize("damage", [slow(x) if x in LIKE_ANOTHER else x for x in DAMAGES])
def test_damage_to_any_file_makes_no_difference_or_is_named(saved, damage, tmp_path, capsys):
    original, states, initial, of = saved
    named = set()
    files = sorted(x.relative_to(original) for x in original.glob("3/**/*") if x.is_file())
    assert len(files) > 8
    for i, file in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(original, folder)
        DAMAGES[damage](folder / file)
        state, losses = checkpoints.resumed(folder, initial, of)
        assert same(state, states[len(losses) - 1]), file
        errors = capsys.readouterr().err
        if len(losses) == 3:
            named.add(file.parts[1])
            assert "Step 3 is damaged (" in errors
            assert "Resuming after step 2" in errors
        else:
            assert len(losses) == 4
            assert "damaged" not in errors
    assert {"state", "losses"} <= named, "the damage was there"


def test_an_empty_folder_and_a_lost_half_are_moved_aside_and_saved_again(saved, tmp_path, capsys):
    original, *_ = saved
    folder = tmp_path / "steps"
    shutil.copytree(original, folder)
    (folder / "12").mkdir()
    shutil.rmtree(folder / "3" / "state")
    seen = []
    train(replace(RUN, degree=4), TEXT, CONFIG, folder, lambda step, _: seen.append(step))
    assert seen == [3]
    errors = capsys.readouterr().err
    assert "Step 12 is damaged (losses cannot be read" in errors
    assert "Step 3 is damaged (state cannot be read" in errors
    assert sorted(x.name.rsplit("-", 1)[0] for x in folder.glob("damaged-*")) == [
        "damaged-12",
        "damaged-3",
    ]
    assert (folder / "3" / "state").is_dir()


def test_without_a_whole_checkpoint_all_of_them_are_named(saved, tmp_path):
    original, *_ = saved
    folder = tmp_path / "steps"
    shutil.copytree(original, folder)
    for step in STEPS:
        shutil.rmtree(folder / str(step) / "losses")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: step 3 is .*; step 2 is"):
        train(RUN, TEXT, CONFIG, folder)
    assert (folder / "3").is_dir(), "nothing was moved"


@pytest.mark.parametrize(
    "dtype", ("bool", "int4", "float8_e5m2", "bfloat16", "float32", "float64", "complex64")
)
def test_every_bit_and_place_counts_in_a_digest_and_no_sharding_does(dtype):
    with jax.enable_x64(dtype == "float64"):
        width = 1 if dtype in ("bool", "int4") else jnp.dtype(dtype).itemsize
        raw = np.random.default_rng(0).integers(
            0, 2 if width == 1 else 256, (4, 8 * width), np.uint8
        )
        x = raw.astype(dtype) if width == 1 and dtype != "float8_e5m2" else raw.view(dtype)
        whole = digest_arrays({"x": jnp.asarray(x)})
        assert list(whole) == ["['x']"]
        assert digest_arrays({"x": x}) == whole, "of NumPy"
        assert whole["['x']"][-16:-8] != whole["['x']"][-8:], "two sums of 32 bits, not one twice"
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
            for spec in (PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec("b", "a")):
                assert digest_arrays({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == whole
        changed = [whole, digest_arrays({"x": jnp.asarray(x[::-1])}), digest_arrays({"x": x.T})]
        for bit in range(8 * x[0, 0].nbytes if dtype not in ("bool", "int4") else 1):
            other = x.copy()
            flat = other.view(np.uint8)
            flat[1, bit // 8] ^= 1 << bit % 8
            changed.append(digest_arrays({"x": jnp.asarray(other)}))
        assert len({x["['x']"] for x in changed}) == len(changed)


def test_numbers_of_64_bits_count_whole_where_jax_has_32():
    x = np.arange(1, 5) / 3
    numbers = [x, np.nextafter(x, 9), x[0], 5, 5 + 2**32, np.arange(4), np.arange(4) + 2**40, 1j]
    digests = [digest_arrays(number)[""] for number in [*numbers, 0.1, 0.1 + 1e-12]]
    assert len(set(digests)) == len(digests)
    assert digests[0].startswith("float64[4] ")
    with jax.enable_x64(True):
        assert digest_arrays(jnp.asarray(x))[""] == digests[0]
    with pytest.raises(
        ValueError, match=r"^\['a'\] is no array of numbers, but int of object\. Leave it"
    ):
        digest_arrays({"a": 2**70})


OTHER_TRAININGS = {
    "rate": (replace(RUN, learning_rate=1e-4), TEXT, CONFIG),
    "text": (RUN, Text(TEXT.rows[::-1].copy(), TEXT.segments[::-1].copy()), CONFIG),
    "features": (RUN, TEXT, replace(CONFIG, features=2 * CONFIG.features)),
    "layers": (RUN, TEXT, replace(CONFIG, layers=CONFIG.layers + 1)),
}


@pytest.mark.parametrize(("run", "text", "config"), OTHER_TRAININGS.values(), ids=OTHER_TRAININGS)
def test_a_checkpoint_of_another_training_is_refused(saved, run, text, config):
    folder, *_ = saved
    with pytest.raises(ValueError, match=r"holds a training of .* Give another folder"):
        train(run, text, config, folder)


def test_more_steps_than_asked_for_are_refused(saved):
    folder, *_ = saved
    with pytest.raises(ValueError, match=r"of 4 steps, and 3 were asked for. Ask for more"):
        train(replace(RUN, steps=3), TEXT, CONFIG, folder)
