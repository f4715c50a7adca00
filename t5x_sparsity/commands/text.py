"""Words for numbers. Nothing is imported, so that a command which needs no host loads none."""

from __future__ import annotations


def format_bytes(n: int) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n:,} B"
