"""What can go wrong, in one line: the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PisteError(Exception):
    """A failure with a cause and a fix that fit on one line; exit code 1."""

    exit_code = 1


class BadInput(PisteError, ValueError):
    """Input that no run can start from, found before Ray is started; exit code 2."""

    exit_code = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM once nothing more is waited for: a second one, or the grace period is over; exit code 143."""

    exit_code = 143


def cause(error: BaseException) -> str:
    """Why something failed, on one line: the message, after the type where piste does not know it."""
    message = str(error) if isinstance(error, PisteError) else f"{type(error).__name__}: {error}"
    return message.strip().partition("\n")[0]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or all of them.

    Args:
        name: What was asked for.
        candidates: What there is.

    Returns:
        `"; did you mean 'x'?"`, or `"; there are: a, b"` where nothing is near.
    """
    names = sorted(candidates)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], n=1, cutoff=0.6)
    if close:
        match = next(n for n in names if n.lower() == close[0])
        return f"; did you mean {match!r}?"
    return f"; there are: {', '.join(names)}" if names else ""
