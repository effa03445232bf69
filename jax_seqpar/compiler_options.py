"""Compiler options for programs with all-to-alls."""

from ._checks import check_platform

OPTIONS: dict[str, dict[str, str]] = {
    "cpu": {},
    # XLA reads "True" and not "true"; libtpu reads the options of TPUs.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": "True"},
    "tpu": {"xla_tpu_enable_async_all_to_all": "true"},
}


def compiler_options(platform: str) -> dict[str, str]:
    """The options with which transfers hide under computation, to be given to `jax.jit`.

    They do so where there is something to hide them under: `head_chunks` of 2 or more, side by
    side. On a TPU all-to-alls are synchronous without; on a GPU they are asynchronous anyway, and
    the scheduler moves them apart from what waits for them. On a CPU there is nothing to set.

    More options are no better: `xla_tpu_enable_async_collective_fusion` together with
    `xla_tpu_overlap_compute_collective_tc` and `xla_enable_async_all_reduce` is known to give NaN
    without a word (https://github.com/jax-ml/jax/issues/38741). Compare the results of a step with
    and without before trusting any recipe, this one included.

    Args:
      platform: "cpu", "gpu" or "tpu", as of `jax.default_backend()`.

    Raises:
      ValueError: for another platform.

    Example:
      step = jax.jit(train_step, compiler_options=compiler_options(jax.default_backend()))
    """
    check_platform(platform, list(OPTIONS))
    return dict(OPTIONS[platform])
