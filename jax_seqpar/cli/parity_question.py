"""Question of a call of `seqpar parity`: its options, read, and the checks that answer it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..mask.keywords import from_flat
from ..parity.checks import Check
from ..parity.inputs import Case
from ..parity.plan import inputs_by_label, plan, understood
from .places import check_files, check_folder

DEGREES = (1, 2, 4, 8)
SIZES = ("batch", "tokens", "heads", "kv_heads", "head_dim", "dtype")


class Question(NamedTuple):
    """Checks by degree, and lines that say how inputs and options are understood."""

    plans: dict[int, list[Check]]
    lines: list[str]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Question":
        """The question of a call.

        Args:
          given: values by parameter of the command; options that are None may be left out.

        Raises:
          ValueError: for options that do not go together, sizes or files that do not fit.
          OSError: for a file that cannot be read.
        """
        files, seed, kernel = given.get("input") or [], given["seed"], given["kernel"]
        sizes: dict[str, Any] = {name: given[name] for name in SIZES if name in given}
        if files and sizes:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in sizes)
            raise ValueError(f"--input has its own sizes and dtype. Leave out {options}.")
        check_timeout(given["timeout"])
        check_files({"--json": given.get("json_file"), "--report": given.get("report")})
        check_folder("--save-failing", given.get("save_failing"))
        spec = from_flat(
            {
                "scale": given.get("scale"),
                "is_causal": given["causal"],
                "query_offset": given["query_offset"],
                "local_window_size": given.get("window"),
                "logits_soft_cap": given.get("soft_cap"),
            }
        )
        named = inputs_by_label(Case(**sizes), files, seed, kernel)
        degrees = sorted(set(given.get("degree") or DEGREES))
        plans = {degree: plan(degree, named, spec, kernel, seed) for degree in degrees}
        shown = named if files else {"generated": named["grouped"]}
        lines = [x for name, case in shown.items() for x in understood(name, case, spec, kernel)]
        return cls(plans, lines)


def check_timeout(seconds: float) -> None:
    """Raises ValueError unless the seconds are positive and finite."""
    if not 0 < seconds < math.inf:
        raise ValueError(
            f"--timeout must be a positive number of seconds, got {seconds}. Write 300."
        )
