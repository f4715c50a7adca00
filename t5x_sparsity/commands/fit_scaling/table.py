"""Reads the table of `t5x-sparsity fit-scaling`."""

import csv
import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.fit_scaling.options import LEAST, MOST
from t5x_sparsity.core.names import first_few
from t5x_sparsity.scaling.law import Table

_WANTED = "sparsity, nonzero_weights (or weights), tokens, loss"
# The columns that a table needs, as a message names them; one of each line.
_NEEDED = {
    "nonzero_weights, nor weights": ("nonzero_weights", "weights"),
    "sparsity": ("sparsity",),
    "tokens": ("tokens",),
    "loss": ("loss",),
}
_COLUMNS = [name for names in _NEEDED.values() for name in names]
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What a file has.

    Attributes:
      table: its runs.
      size_column: 'nonzero_weights' or 'weights', whichever it has.
      unused: its other columns.
    """

    table: Table
    size_column: str
    unused: tuple[str, ...]


def read(path: str) -> Source:
    """Reads a table; every mistake in it is a CommandError that names line and column."""
    lines = _lines(path)
    if not lines:
        raise CommandError(f"{path} is empty; its first line names the columns: {_WANTED}")
    delimiter = max(_DELIMITERS, key=lines[0][1].count)
    rows = _split(path, lines, delimiter)
    where, header = next(rows)
    _check_header(where, header)
    size = "weights" if "weights" in header else "nonzero_weights"
    used = ("sparsity", size, "tokens", "loss")
    values = []
    for where, cells in rows:
        if len(cells) != len(header):
            raise CommandError(
                f"{where}: {len(cells)} values for {len(header)} columns, which "
                f"{_DELIMITERS[delimiter]} divide"
            )
        run = dict(zip(header, cells, strict=True))
        values.append([_value(f"{where}, column {name}", name, run[name]) for name in used])
    sparsity, nonzero, tokens, loss = np.reshape(values, (-1, len(used))).T.copy()
    if size == "weights":
        nonzero = nonzero * (1 - sparsity)
    return Source(
        table=Table(sparsity=sparsity, nonzero=nonzero, tokens=tokens, loss=loss),
        size_column=size,
        unused=tuple(name for name in header if name and name not in used),
    )


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines that say something, with their numbers from 1."""
    try:
        # the mark that some programs put before UTF-8 isn't part of the first column's name
        text = Path(path).read_text(encoding="utf-8-sig")
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
) -> Iterator[tuple[str, list[str]]]:
    """Where each line is, as a message says it, and its cells."""
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            cells = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as e:
            raise CommandError(f"{where}: not comma-separated values: {e}") from None
        yield where, [cell.strip() for cell in cells]


def _check_header(where: str, header: Sequence[str]) -> None:
    for name in _COLUMNS:
        if header.count(name) > 1:
            raise CommandError(f"{where}: {header.count(name)} columns are named {name}; keep one")
    if "weights" in header and "nonzero_weights" in header:
        raise CommandError(
            f"{where}: columns nonzero_weights and weights; keep one, as weights x (1 - sparsity) "
            "is taken for nonzero_weights"
        )
    for wanted, names in _NEEDED.items():
        if not set(names) & set(header):
            others = [x for x in header if x not in _COLUMNS]
            plain = {x.lower().replace("-", "_").replace(" ", "_"): x for x in others}
            near = [x for n in names for x in difflib.get_close_matches(n, plain, n=1)]
            hint = f" (is {plain[near[0]]!r} meant?)" if near else ""
            shown = first_few([repr(x) for x in header], most=10)
            raise CommandError(
                f"{where}: no column {wanted}{hint}. The columns are {shown}; needed are {_WANTED}"
            )


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
