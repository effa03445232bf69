"""Memory of a compiled program on one device."""

import jax


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that the compiled program holds on a device besides its arguments and results.

    Args:
      compiled: of `jax.jit(function).lower(...).compile()`, or of `Program.compile`.

    Raises:
      ValueError: if the compiler of its platform does not tell.

    Example:
      temporaries(jax.jit(step).lower(state, batch).compile())
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            f"the compiler of {compiled!r} states no memory. Give a program that is compiled for a "
            f"TPU, a GPU or a CPU."
        )
    return analysis.temp_size_in_bytes
