"""What the zeros of a weight look like: dead rows and columns, and the patterns that they form.

A weight is taken slice by slice (a layer, an expert), each a matrix of [inputs, outputs]. A pattern
is found where it holds exactly in every slice, and where there is something to hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5x_sparsity.artifacts.structure import KeptBits, StructureFinder, kept_of_groups
from t5x_sparsity.core.matrix_axes import MatrixAxes

if TYPE_CHECKING:
    from t5x_sparsity.core import patterns

# What is found where there is nothing to hold, and the names of all that may be found.
NOTHING = {
    "channels": False,
    "n_by_m_inputs": None,
    "n_by_m_outputs": None,
    "block": None,
    "fan_in": None,
    "fan_out": None,
    "at_most_2_4_inputs": False,
    "at_most_2_4_outputs": False,
}


class PatternFinder:
    """Finds what holds in every slice of a weight, from one slice at a time.

    A pattern that asks for something to be the same in several places is found only where there are
    several, and only among zeros: of a dense or an empty matrix, or one with a single row, nothing
    is.
    """

    def __init__(self, axes: MatrixAxes, expected: str | None = None):
        """`expected` is the text of a pattern to compare with, see `core.patterns.to_text`."""
        self._axes = axes
        self._structure = StructureFinder((*axes.inputs, *axes.outputs))
        self._expected: patterns.BuiltIn | None = None
        if expected is not None:
            from t5x_sparsity.core import patterns  # here, as it imports JAX

            self._expected = patterns.from_text(expected)
        self._follows = True if self._expected else None
        self._slices = 0
        self._counts = Counter(size=0, kept=0, rows=0, columns=0, dead_rows=0, dead_columns=0)
        self._channels = True
        self._at_most = {"inputs": True, "outputs": True}
        # the least and the most kept of what isn't dead, per slice
        self._fans: dict[str, list[tuple[int, int]]] = {"inputs": [], "outputs": []}

    def add(self, bits: KeptBits) -> None:
        """Takes a slice; all are of one shape."""
        if not bits.size:
            return
        rows, columns = _kept_of_lines(bits)
        live_rows, live_columns = int(np.count_nonzero(rows)), int(np.count_nonzero(columns))
        kept = int(rows.sum())
        self._slices += 1
        self._counts.update(
            size=bits.size,
            kept=kept,
            rows=bits.rows,
            columns=bits.columns,
            dead_rows=bits.rows - live_rows,
            dead_columns=bits.columns - live_columns,
        )
        # of one row, every zero is a dead column
        self._channels &= min(bits.rows, bits.columns) > 1 and kept == live_rows * live_columns
        for way, counts, length, inner in (
            ("inputs", columns, bits.rows, bits.columns),
            ("outputs", rows, bits.columns, 1),
        ):
            live = counts[counts > 0]
            if live.size:
                self._fans[way].append((int(live.min()), int(live.max())))
            possible = self._at_most[way] and length % 4 == 0
            self._at_most[way] = possible and kept_of_groups(bits, 4, inner, limit=2)[1] <= 2
        self._structure.add(bits)
        if self._expected and self._follows:
            try:
                self._follows = self._expected.holds(bits.mask())
            except (ValueError, TypeError):  # the slice can't take it
                self._follows = None

    def result(self) -> dict[str, Any]:
        """What holds in all slices so far, by the names that docs/inspect.md explains.

        And `follows`, whether the expected pattern holds, None where that is not known; and
        `groups`, axis of the weight -> (n, m) of the smallest m of which there are several groups.
        """
        counts, axes = self._counts, self._axes
        facts = {**counts, **NOTHING, "groups": {}, "follows": self._follows}
        if counts["kept"] in (0, counts["size"]):
            return {**facts, "pattern": "all zero" if counts["kept"] < counts["size"] else "dense"}
        rows, columns = counts["rows"] // self._slices, counts["columns"] // self._slices
        lengths = dict.fromkeys(axes.inputs, rows) | dict.fromkeys(axes.outputs, columns)
        exact = [g for g in self._structure.groups if 2 * g.m <= lengths[g.axis]]
        groups = {g.axis: (g.n, g.m) for g in exact}
        block = tuple(self._structure.runs.values())
        has_blocks = math.prod(block) > 1 and min(rows, columns) > 1 and not self._channels
        facts |= {
            "channels": self._channels,
            "groups": groups,
            # of several axes the last
            "n_by_m_inputs": groups.get(axes.inputs[-1]) if axes.inputs else None,
            "n_by_m_outputs": groups.get(axes.outputs[-1]) if axes.outputs else None,
            "block": block if has_blocks else None,
            "fan_in": _fan(self._fans["inputs"], rows, columns),
            "fan_out": _fan(self._fans["outputs"], columns, rows),
            "at_most_2_4_inputs": self._at_most["inputs"],
            "at_most_2_4_outputs": self._at_most["outputs"],
        }
        return {**facts, "pattern": _pattern(facts, axes)}


def _pattern(facts: Mapping[str, Any], axes: MatrixAxes) -> str:
    if facts["channels"]:
        return "whole channels"
    matrix = (("inputs", axes.inputs), ("outputs", axes.outputs))
    ways = {of_way[-1]: way for way, of_way in matrix if of_way}
    found = [
        f"{n}:{m} along {ways.get(axis, f'axis {axis}')}"
        for axis, (n, m) in sorted(facts["groups"].items(), key=lambda item: item[0] not in ways)
    ]
    if facts["block"]:
        found.append(f"blocks {'x'.join(map(str, facts['block']))}")
    # N:M along the inputs gives every output as many
    for fan, of_way in (("fan_in", axes.inputs), ("fan_out", axes.outputs)):
        if facts[fan] and not facts["groups"].keys() & set(of_way):
            numbers = dict.fromkeys(f"{n:,}" for n in facts[fan])
            found.append(f"constant {fan.replace('_', '-')} {' to '.join(numbers)}")
    if found:
        return "; ".join(found)
    held = " and ".join(way for way, _ in matrix if facts[f"at_most_2_4_{way}"])
    return f"unstructured, at most 2:4 along {held}" if held else "unstructured"


def _fan(fans: Sequence[tuple[int, int]], full: int, neurons: int) -> tuple[int, int] | None:
    if neurons < 2 or any(least < most for least, most in fans):
        return None
    least, most = min(fans)[0], max(fans)[0]
    return None if least == full else (least, most)


def _kept_of_lines(bits: KeptBits) -> tuple[np.ndarray, np.ndarray]:
    """Weights kept of every row, and of every column."""
    rows, columns = [np.zeros(0, np.int64)], np.zeros(bits.columns, np.int64)
    for span in bits.spans():
        band = bits.band(*span)
        rows.append(np.count_nonzero(band, axis=1))
        columns += np.count_nonzero(band, axis=0)
    return np.concatenate(rows), columns
