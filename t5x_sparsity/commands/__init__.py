"""What `t5x-sparsity` does, a module a subcommand; each is imported when it is asked for."""

from __future__ import annotations


class CommandError(Exception):
    """What was asked for can't be done: one line for the user, exit code 2."""


def one_line(error: object) -> str:
    """A message, however long, as one line."""
    return " ".join(str(error).split())
