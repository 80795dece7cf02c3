"""What ends a command, with its exit code."""

from __future__ import annotations


class Problem(Exception):
    """A command cannot do what it was asked for; one line."""

    code = 1


class BadCommand(Problem):
    """The command itself is wrong."""

    code = 2


class Impossible(Problem):
    """This machine lacks something; a test that meets it is skipped."""

    code = 77
