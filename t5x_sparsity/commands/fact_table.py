"""Tables of facts, which are dicts of plain values as JSON has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from t5x_sparsity.monitoring.text_table import text_table

# The header, the key of the facts, and how `format` shows a number.
Column = tuple[str, str, str]


def fact_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column], align: str) -> str:
    """A row per dict; text is shown as it is, and nothing where there is no value.

    >>> columns = ("name", "path", ""), ("share", "share", ".1%")
    >>> print(fact_table([{"path": "a", "share": 0.5}, {"path": "b"}], columns, "lr"))
    name      share
    ------  -------
    a         50.0%
    b
    """

    def cell(value: Any, spec: str) -> str:
        return "" if value is None else value if isinstance(value, str) else format(value, spec)

    cells = [[cell(row.get(key), spec) for _, key, spec in columns] for row in rows]
    return text_table(cells, headers=[header for header, _, _ in columns], align=align)


def shape_text(shape: Sequence[int]) -> str:
    """A shape, such as 2x3."""
    return "x".join(map(str, shape))


def count(n: int, what: str) -> str:
    """How many there are, such as '2 arrays'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
