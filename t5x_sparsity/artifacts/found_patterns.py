"""What the zeros of a weight look like: dead rows and columns, and the patterns that they form.

Arrays of NumPy only. A weight is taken slice by slice (a layer, an expert), each a matrix of
[inputs, outputs]; one bit per weight of a slice is held, whatever the weight's type. A pattern is
found where it holds exactly in every slice, and where there is something to hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t5x_sparsity.artifacts.kept_bits import KeptBits
from t5x_sparsity.artifacts.structure import Groups, StructureFinder, most_kept
from t5x_sparsity.core.matrix_axes import MatrixAxes

if TYPE_CHECKING:
    from t5x_sparsity.core import patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What the zeros of a weight look like.

    Attributes:
      size: weights in all.
      kept: weights that are kept.
      rows: inputs, of all slices together.
      columns: outputs, of all slices together.
      dead_rows: inputs all of whose weights are pruned.
      dead_columns: outputs all of whose weights are pruned.
      axes: how the weight is a stack of matrices.
      channels: dead rows and columns explain every zero.
      groups: axis of the weight -> (n, m) of the smallest m so that every aligned group of m along
        it has exactly n kept, and there are several groups.
      block: lengths, along the axes of a slice, of the largest aligned blocks that are kept or
        pruned as a whole; those at the edge may be smaller.
      fan_in: weights kept of an output that isn't dead, the least and the most of any slice; None
        where outputs of a slice differ.
      fan_out: likewise of an input.
      at_most_2_4_inputs: every aligned group of 4 along the inputs has at most 2 kept.
      at_most_2_4_outputs: likewise along the outputs.
      follows: whether the expected pattern holds; None where none was asked for, or it is not known
        here.
    """

    size: int
    kept: int
    rows: int
    columns: int
    dead_rows: int
    dead_columns: int
    axes: MatrixAxes
    channels: bool = False
    groups: Mapping[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    block: tuple[int, ...] | None = None
    fan_in: tuple[int, int] | None = None
    fan_out: tuple[int, int] | None = None
    at_most_2_4_inputs: bool = False
    at_most_2_4_outputs: bool = False
    follows: bool | None = None

    @property
    def sparsity(self) -> float:
        """Share of weights pruned, in [0, 1]."""
        return 1 - self.kept / self.size if self.size else 0.0

    @property
    def n_by_m_inputs(self) -> tuple[int, int] | None:
        """(n, m) along the inputs, of several axes the last."""
        return self.groups.get(self.axes.inputs[-1]) if self.axes.inputs else None

    @property
    def n_by_m_outputs(self) -> tuple[int, int] | None:
        """(n, m) along the outputs, likewise."""
        return self.groups.get(self.axes.outputs[-1]) if self.axes.outputs else None

    @property
    def pattern(self) -> str:
        """In words: all that holds, without what follows from another that does."""
        if self.kept == self.size:
            return "dense"
        if not self.kept:
            return "all zero"
        if self.channels:
            return "whole channels"
        ways = {axes[-1]: way for axes, way in self._ways if axes}
        found = [
            f"{n}:{m} along {ways.get(axis, f'axis {axis}')}"
            for axis, (n, m) in sorted(self.groups.items(), key=lambda item: item[0] not in ways)
        ]
        if self.block:
            found.append(f"blocks {'x'.join(map(str, self.block))}")
        # N:M along the inputs gives every output as many
        if self.fan_in and not self.groups.keys() & set(self.axes.inputs):
            found.append(f"constant fan-in {_range(self.fan_in)}")
        if self.fan_out and not self.groups.keys() & set(self.axes.outputs):
            found.append(f"constant fan-out {_range(self.fan_out)}")
        if not found:
            holds = (self.at_most_2_4_inputs, self.at_most_2_4_outputs)
            held = [way for (_, way), at_most in zip(self._ways, holds, strict=True) if at_most]
            at_most = f", at most 2:4 along {' and '.join(held)}" if held else ""
            return f"unstructured{at_most}"
        return "; ".join(found)

    @property
    def _ways(self) -> tuple[tuple[Sequence[int], str], ...]:
        return (self.axes.inputs, "inputs"), (self.axes.outputs, "outputs")


def _range(numbers: tuple[int, int]) -> str:
    low, high = numbers
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class PatternFinder:
    """Finds what holds in every slice of a weight, from one slice at a time.

    A pattern that asks for something to be the same in several places is found only where there are
    several, and only among zeros: of a dense or an empty matrix, or one with a single row, nothing
    is.
    """

    def __init__(self, axes: MatrixAxes, expected: str | None = None):
        """Prepares for the slices of a weight.

        Args:
          axes: how the weight is a stack of matrices.
          expected: text of a pattern to compare with, such as 'NByM(n=2, m=4, axis=-2)' (see
            `core.patterns.to_text`); None for none.
        """
        self._axes = axes
        self._structure = StructureFinder((*axes.inputs, *axes.outputs))
        self._expected: patterns.BuiltIn | None = None
        if expected is not None:
            from t5x_sparsity.core import patterns  # here, as it imports JAX

            self._expected = patterns.from_text(expected)
        self._follows = True if self._expected else None
        self._slices = self._size = self._kept = self._rows = self._columns = 0
        self._dead_rows = self._dead_columns = 0
        self._channels = True
        self._at_most = {"inputs": True, "outputs": True}
        self._fans: dict[str, list[int] | None] = {"inputs": [], "outputs": []}

    def add(self, bits: KeptBits) -> None:
        """Takes a slice; all are of one shape."""
        if not bits.size:
            return
        rows, columns = _counts(bits)
        kept = int(rows.sum())
        live_rows, live_columns = np.count_nonzero(rows), np.count_nonzero(columns)
        self._slices += 1
        self._size += bits.size
        self._kept += kept
        self._rows += bits.rows
        self._columns += bits.columns
        self._dead_rows += bits.rows - int(live_rows)
        self._dead_columns += bits.columns - int(live_columns)
        # of one row, every zero is a dead column
        is_matrix = bits.rows > 1 and bits.columns > 1
        self._channels &= is_matrix and kept == int(live_rows) * int(live_columns)
        for way, counts, length, inner in (
            ("inputs", columns, bits.rows, bits.columns),
            ("outputs", rows, bits.columns, 1),
        ):
            self._add_fan(way, counts)
            if self._at_most[way]:
                self._at_most[way] = length % 4 == 0 and most_kept(bits, 4, inner, 3) <= 2
        self._structure.add(bits)
        if self._expected and self._follows:
            try:
                self._follows = self._expected.holds(bits.mask())
            except (ValueError, TypeError):  # the slice can't take it
                self._follows = None

    def _add_fan(self, way: str, counts: np.ndarray) -> None:
        live = counts[counts > 0]
        fans = self._fans[way]
        if fans is None or not live.size:
            return
        self._fans[way] = [*fans, int(live[0])] if (live == live[0]).all() else None

    def result(self) -> Found:
        """What holds in all slices so far."""
        facts = {
            "size": self._size,
            "kept": self._kept,
            "rows": self._rows,
            "columns": self._columns,
            "dead_rows": self._dead_rows,
            "dead_columns": self._dead_columns,
            "axes": self._axes,
            "follows": self._follows,
        }
        if self._kept in (0, self._size):
            return Found(**facts)
        rows, columns = self._rows // self._slices, self._columns // self._slices
        block = tuple(self._structure.runs.values())
        has_blocks = math.prod(block) > 1 and min(rows, columns) > 1 and not self._channels
        return Found(
            **facts,
            channels=self._channels,
            groups={g.axis: (g.n, g.m) for g in self._structure.groups if self._has_several(g)},
            block=block if has_blocks else None,
            fan_in=self._fan("inputs", rows, columns),
            fan_out=self._fan("outputs", columns, rows),
            at_most_2_4_inputs=self._at_most["inputs"],
            at_most_2_4_outputs=self._at_most["outputs"],
        )

    def _has_several(self, groups: Groups) -> bool:
        """Whether there are several groups; a single one is a constant fan-in or fan-out."""
        is_input = groups.axis in self._axes.inputs
        length = (self._rows if is_input else self._columns) // self._slices
        return 2 * groups.m <= length

    def _fan(self, way: str, most: int, neurons: int) -> tuple[int, int] | None:
        fans = self._fans[way]
        if not fans or neurons < 2 or min(fans) == most:
            return None
        return min(fans), max(fans)


def _counts(bits: KeptBits) -> tuple[np.ndarray, np.ndarray]:
    """Weights kept of every row, and of every column."""
    rows, columns = [np.zeros(0, np.int64)], np.zeros(bits.columns, np.int64)
    for band in bits.bands():
        rows.append(np.count_nonzero(band, axis=1))
        columns += np.count_nonzero(band, axis=0)
    return np.concatenate(rows), columns
