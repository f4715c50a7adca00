"""Reads the table of `t5x-sparsity fit-scaling`."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5x_sparsity.commands import CommandError, one_line
from t5x_sparsity.commands.fit_scaling.options import LEAST, MOST
from t5x_sparsity.scaling.law import Table

SIZES = ("nonzero_weights", "weights")
COLUMNS = ("sparsity", *SIZES, "tokens", "loss")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A table and where it comes from.

    Attributes:
      path: of the file.
      table: its runs.
      size_column: 'nonzero_weights' or 'weights', whichever it has.
      unused: its other columns.
    """

    path: str
    table: Table
    size_column: str
    unused: tuple[str, ...]


def read(path: str) -> Source:
    """Reads a table; every mistake in it is a CommandError that names line and column."""
    lines = _lines(path)
    if not lines:
        raise CommandError(f"{path} is empty; its first line names the columns: {_wanted()}")
    start, header_line = lines[0]
    delimiter = max(_DELIMITERS, key=header_line.count)
    rows = _split(path, lines, delimiter)
    header = [name.strip() for name in rows[0][1]]
    size = _check_header(path, start, header)
    used = ("sparsity", size, "tokens", "loss")
    values = {name: [] for name in used}
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise CommandError(
                f"{path}, line {line}: {len(cells)} values for {len(header)} columns, which "
                f"{_DELIMITERS[delimiter]} divide"
            )
        for name in used:
            text = cells[header.index(name)].strip()
            values[name].append(_value(f"{path}, line {line}, column {name}", name, text))
    arrays = {name: np.array(x) for name, x in values.items()}
    nonzero = arrays[size] * (1 - arrays["sparsity"]) if size == "weights" else arrays[size]
    table = Table(
        sparsity=arrays["sparsity"], nonzero=nonzero, tokens=arrays["tokens"], loss=arrays["loss"]
    )
    unused = tuple(name for name in header if name and name not in used)
    return Source(path=path, table=table, size_column=size, unused=unused)


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers from 1."""
    file = Path(path)
    try:
        # the mark that some programs put before UTF-8 isn't part of the first column's name
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CommandError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise CommandError(f"{path} is a folder; give a file of comma-separated values") from None
    except UnicodeDecodeError:
        raise CommandError(
            f"{path} isn't text in UTF-8; save the table as comma-separated values in UTF-8"
        ) from None
    except OSError as e:
        raise CommandError(f"can't read {path}: {e.strerror or e}") from None
    if "\0" in text:
        raise CommandError(f"{path} isn't text; save the table as comma-separated values in UTF-8")
    numbered = enumerate(text.splitlines(), start=1)
    return [(i, x) for i, x in numbered if x.strip(" ,;\t") and not x.lstrip().startswith("#")]


def _split(
    path: str, lines: Sequence[tuple[int, str]], delimiter: str
) -> list[tuple[int, list[str]]]:
    found = []
    for number, line in lines:
        try:
            cells = next(csv.reader(io.StringIO(line), delimiter=delimiter, strict=True))
        except csv.Error as e:
            raise CommandError(
                f"{path}, line {number}: not comma-separated values: {one_line(e)}"
            ) from None
        found.append((number, cells))
    return found


def _check_header(path: str, line: int, header: Sequence[str]) -> str:
    """Returns which of the two columns of weights there is."""
    where = f"{path}, line {line}"
    for name in COLUMNS:
        if header.count(name) > 1:
            raise CommandError(f"{where}: {header.count(name)} columns are named {name}; keep one")
    sizes = [name for name in SIZES if name in header]
    if len(sizes) == 2:
        raise CommandError(
            f"{where}: columns nonzero_weights and weights; keep one, as weights x (1 - sparsity) "
            "is taken for nonzero_weights"
        )
    missing = [name for name in ("sparsity", "tokens", "loss") if name not in header]
    if not sizes:
        missing.insert(0, "nonzero_weights")
    if missing:
        name = missing[0]
        wanted = "nonzero_weights, nor weights" if name == "nonzero_weights" else name
        others = [x for x in header if x and x not in COLUMNS]
        names = SIZES if name == "nonzero_weights" else (name,)
        near = [x for n in names for x in _close(n, others)]
        hint = f" (is {near[0]!r} meant?)" if near else ""
        shown = ", ".join(repr(x) for x in header[:10]) + (", ..." if len(header) > 10 else "")
        raise CommandError(
            f"{where}: no column {wanted}{hint}. The columns are {shown}; needed are {_wanted()}"
        )
    return sizes[0]


def _close(name: str, others: Sequence[str]) -> list[str]:
    plain = {x.lower().replace("-", "_").replace(" ", "_"): x for x in others}
    return [plain[x] for x in difflib.get_close_matches(name, plain, n=1, cutoff=0.6)]


def _wanted() -> str:
    return "sparsity, nonzero_weights (or weights), tokens, loss"


def _value(where: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        if not text:
            raise CommandError(f"{where}: no value; every run needs all four") from None
        comma = "; write a decimal point, not a comma" if "," in text else ""
        raise CommandError(f"{where}: {text!r} isn't a number{comma}") from None
    if not math.isfinite(value):
        raise CommandError(f"{where}: {text!r} isn't finite; leave out runs that diverged")
    if name == "sparsity":
        if not 0 <= value < 1:
            percent = "; divide percentages by 100" if 1 < value <= 100 else ""
            raise CommandError(f"{where}: {text} is outside [0, 1){percent}")
    elif value <= 0:
        raise CommandError(f"{where}: {text} isn't above 0")
    elif not LEAST <= value <= MOST:
        raise CommandError(f"{where}: {text} is outside {LEAST:g} to {MOST:g}")
    return value
