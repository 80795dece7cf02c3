"""Step sizes as functions of the number of updates so far."""

from __future__ import annotations

import math
from collections.abc import Callable

from piste_algorithms._checks import check_integer, check_range

Schedule = Callable[[int], float]


def cosine_decay(base: float, flat_steps: int, total_steps: int, minimum: float) -> Schedule:
    """`base` for `flat_steps` updates, then half a cosine towards 0 at `total_steps`, never below `minimum`.

        k < flat                base
        flat <= k <= total      max(minimum, base (1 + cos(pi (k - flat) / (total - flat))) / 2)
        total < k               minimum

    Source: `CosineDecayLR` of the authors' experiments with Anemone (base 0.4, flat 1,000, total 20,000,
    minimum 0.1).

    Raises:
        ValueError: if not 0 < minimum <= base <= 1 or not 0 <= flat_steps <= total_steps.
    """
    check_step_size("base", base)
    check_step_size("minimum", minimum)
    check_integer("flat_steps", flat_steps, low=0)
    check_integer("total_steps", total_steps, low=flat_steps)
    if minimum > base:
        raise ValueError(f"minimum must be in (0, base = {base:g}], got {minimum!r}")

    def step_size(update: int) -> float:
        if update < flat_steps:
            return base
        if update > total_steps or flat_steps == total_steps:
            return minimum
        angle = math.pi * (update - flat_steps) / (total_steps - flat_steps)
        return max(minimum, base * 0.5 * (1 + math.cos(angle)))

    return step_size


def power_decay(exponent: float = 0.6) -> Schedule:
    """(update + 1)^-exponent, the step sizes of Cappe and Moulines' online EM (2009), which start at 1.

    Raises:
        ValueError: if `exponent` is not in (0.5, 1]; outside of it the iteration need not converge.
    """
    check_range("exponent", exponent, low=0.5, low_open=True, high=math.nextafter(1.0, 2.0))
    return lambda update: float((update + 1) ** -exponent)


def check_step_size(name: str, value: object) -> float:
    """The number, or `ValueError` unless it is one in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    return float(value)
