"""Eight simulated devices, strict promotion, and every annotated shape checked."""

import os
from tempfile import TemporaryDirectory

# Read when JAX is imported, and inherited by the processes of a run: a program compiles once for
# all of them. A third of the time of test_parity_command.py goes (180 s to 125 s on two cores).
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = TemporaryDirectory(prefix="jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Read when JAX starts its backend, and inherited by processes that the tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Read when libtpu is loaded: several processes compile for TPUs side by side, and none has one.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import hypothesis
import jax
import jaxtyping
import pytest
from jax._src import compiler

jaxtyping.install_import_hook("jax_seqpar", "beartype.beartype")

# An example that takes longer than 200 ms, Hypothesis' default, tells of a busy machine.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_runtest_setup(item):
    """Skips tests of a GPU where JAX sees none."""
    if item.get_closest_marker("gpu"):
        from jax_seqpar.kernels.cudnn import compute_capability  # with its shapes checked

        if compute_capability() is None:
            pytest.skip("needs an NVIDIA GPU, and JAX sees none")


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Each compiled program maps memory, of which a process may have 65,530 regions."""
    yield
    jax.clear_caches()


@pytest.fixture
def monkeypatch(monkeypatch):
    """`monkeypatch` without kept programs, which would hide a replacement made after tracing."""
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()


@pytest.fixture
def unchecked_shapes():
    """Switches the shape checks off, so that an error of the library reaches the test as a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def few_optimisations():
    """Programs compile in half the time, those of ranks and other processes, too.

    For files that compare bits of ordinary kernels in programs that are compiled apart: without
    XLA's fusion emitters as well, one of 9,216 bfloat16 numbers is another on four devices.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def less_optimised(few_optimisations):
    """Programs compile in a sixth of the time, those of ranks and other processes, too.

    For files that ask for values to a tolerance, or for bits that no compiler may change. A
    windowed causal attention with gradients over four devices compiles in 2.0 s as users have it,
    in 0.9 s with few optimisations, and in 0.3 s without XLA's fusion emitters as well. JAX has no
    setting of that for all programs, so its compile options are changed on their way.
    """
    jax.devices()  # XLA reads its flags now, so that those below are for other processes alone.
    options_of_jax = compiler.get_compile_options

    def without_emitters(*args, **kwargs):
        options = options_of_jax(*args, **kwargs)
        if jax.config.read("jax_disable_most_optimizations"):
            emitters = ("xla_cpu_use_fusion_emitters", False)
            options.env_option_overrides = [*options.env_option_overrides, emitters]
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", without_emitters)
        flags = os.environ.get("XLA_FLAGS", "")
        patch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_use_fusion_emitters=false".strip())
        yield


@pytest.fixture(scope="module")
def one_torch_thread():
    """PyTorch computes with one thread: on a busy machine small operands wait long for a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def optimised(few_optimisations):
    """Programs optimised as users have them, for tests of communication and memory."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
