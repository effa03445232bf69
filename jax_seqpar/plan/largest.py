"""The longest sequence that fits: predicted from what was compiled, confirmed by compiling it."""

from collections.abc import Callable, Sequence

import numpy as np

from .report import Plan

MOST_PROBES = 20
TRUSTED = 5  # plans after which the line is no longer asked


def largest(plan_of: Callable[[int], Plan], start: int, step: int) -> tuple[int, list[Plan]]:
    """The largest multiple of `step` whose plan fits, so that one step more does not.

    A device's memory grows in proportion to the tokens, but for what does not depend on them: a
    line through what is known predicts the limit, and the answer and the next step are compiled.

    Args:
      plan_of: the plan of so many tokens.
      start: tokens of the first one.
      step: tokens, which the devices must divide.

    Returns:
      the tokens, 0 if not even one step fits; and all plans that were made, by their tokens.

    Raises:
      RuntimeError: for a plan that neither fits nor is too large, with its failure.
    """
    known: dict[int, Plan] = {}
    fits, fails = 0, None
    guess = max(start // step, 1) * step
    while fails is None or fails - fits > step:
        if len(known) == MOST_PROBES:
            raise RuntimeError(
                f"{MOST_PROBES} programs were compiled, and the limit is between {fits} and "
                f"{fails} tokens. Give a larger step than {step}."
            )
        plan = known[guess] = plan_of(guess)
        if plan.fits is None:
            why = _why_unknown(plan).rstrip(".")
            raise RuntimeError(
                f"of {guess} tokens: {why}. Give other sizes, the topology of a TPU or a GPU, or "
                f"its compiler."
            )
        fits, fails = (guess, fails) if plan.fits else (fits, guess)
        guess = _next_guess(list(known.values()), fits, fails, step)
    return fits, [known[tokens] for tokens in sorted(known)]


def _why_unknown(plan: Plan) -> str:
    """Why nobody can tell whether a plan fits."""
    if plan.failure is not None:
        return plan.failure
    if plan.memory is not None:
        return f"the memory of a device of {plan.topology} is not known, so nothing says what fits"
    return next((x for x in plan.notes if x.startswith("not checked")), "nothing was compiled")


def _next_guess(plans: list[Plan], fits: int, fails: int | None, step: int) -> int:
    """Tokens to try: where the line says, and where it was wrong too often, halfway."""
    known = [x for x in plans if x.needed_of_host is None]
    predicted = int(predict(known) // step) * step if known else 0
    if fails is None:
        return predicted if predicted > fits else fits + step * 2 ** (len(plans) // 2 - 1)
    # The memory of the host is on no line through those of devices.
    if len(plans) > TRUSTED or any(x.needed_of_host for x in plans):
        return fits + (fails - fits) // (2 * step) * step
    return min(max(predicted, fits + step), fails - step)


def predict(plans: Sequence[Plan]) -> float:
    """The tokens at which a line through the peaks of plans meets the memory of the chip.

    Through the two plans nearest to the limit; of one plan from its arguments, at 0 tokens.
    """
    points = [(float(x.tokens or 0), float(_peak(x))) for x in plans]
    limit = plans[0].chip.memory
    if len(points) == 1:
        memory = plans[0].memory
        points.append((0.0, float(memory.arguments if memory else 0)))
    (a, peak_a), (b, peak_b) = sorted(points, key=lambda x: abs(x[1] - limit))[:2]
    slope = (peak_b - peak_a) / (b - a)
    return a + (limit - peak_a) / slope if slope > 0 else float(np.finfo(np.float32).max)


def _peak(plan: Plan) -> int:
    return plan.needed or (plan.memory.peak if plan.memory else 0)
