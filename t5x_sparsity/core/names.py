"""Names and errors as messages show them. Imports the standard library alone."""

from collections.abc import Sequence


def first_few(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def one_line(error: object) -> str:
    """A message, however long, as one line."""
    return " ".join(str(error).split())
