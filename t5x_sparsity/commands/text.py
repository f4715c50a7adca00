"""Numbers, names, lists and tables as commands show them."""

import math
import os.path
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from t5x_sparsity.monitoring.text_table import text_table

T = TypeVar("T")

# The header, the key of the facts, and how `format` shows a number.
Column = tuple[str, str, str]


def format_bytes(n: int) -> str:
    """A size in the unit that suits it."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n:,} B"


def evenly_spaced(values: Sequence[T], most: int) -> list[T]:
    """At most so many of the values, the first and the last among them; `most` is at least 2."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def finite(value: Any) -> Any:
    """A value of dicts, lists and tuples for JSON, with None for infinities and NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def natural(path: str) -> list[Any]:
    """A key to sort paths by, with layers_2 before layers_10."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]


def block_of(path: str) -> str:
    """A path up to the first part with a number in it, such as 'decoder/layers_3'."""
    parts = path.split("/")
    numbered = next((i for i, p in enumerate(parts[:-1]) if any(c.isdigit() for c in p)), 0)
    return "/".join(parts[: numbered + 1])


def trim(paths: Sequence[str]) -> list[str]:
    """Paths without the parts that all begin or end with; at least one part stays of each."""
    parts = [p.split("/") for p in paths]
    most = min(map(len, parts), default=1) - 1
    start = len(os.path.commonprefix([p[:most] for p in parts]))
    end = len(os.path.commonprefix([p[::-1][: most - start] for p in parts]))
    return ["/".join(p[start : len(p) - end]) for p in parts]


def short(text: str, length: int = 22) -> str:
    """A long name with its middle left out."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"
