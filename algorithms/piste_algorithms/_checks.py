"""Checks of arguments that the algorithms share."""

import math


def check_range(
    name: str, value: object, *, low: float, high: float = math.inf, low_open: bool = False
) -> None:
    """Raise `ValueError` unless `value` is a number in `[low, high)`, or in `(low, high)` with `low_open`."""
    elements = getattr(value, "numel", None)  # a tensor's; torch itself is not needed here
    number: object = value.item() if callable(elements) and elements() == 1 else value  # type: ignore[attr-defined]
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not (is_number and isinstance(number, int | float) and low <= number < high) or (
        low_open and number == low
    ):
        opening = "(" if low_open else "["
        raise ValueError(f"{name} must be a number in {opening}{low:g}, {high:g}), got {value!r}")


def check_integer(name: str, value: object, *, low: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def check_betas(name: str, betas: object) -> None:
    """Raise `ValueError` unless `betas` is a pair of numbers in `[0, 1)`."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name} must be a pair of numbers in [0, 1), got {betas!r}")
    for index, beta in enumerate(betas):
        check_range(f"{name}[{index}]", beta, low=0.0, high=1.0)
