"""What the zeros of a weight look like: dead rows and columns, and the patterns that they form.

Arrays of NumPy only. A weight is taken slice by slice (a layer, an expert), each a matrix of
[inputs, outputs]; one bit per weight of a slice is held, whatever the weight's type. A pattern is
found where it holds exactly in every slice, and where there is something to hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from t5x_sparsity.artifacts.structure import KeptBits, StructureFinder, most_kept
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
        if self.kept in (0, self.size):
            return "all zero" if self.kept < self.size else "dense"
        if self.channels:
            return "whole channels"
        inputs, outputs = self.axes.inputs, self.axes.outputs
        ways = {axes[-1]: way for axes, way in ((inputs, "inputs"), (outputs, "outputs")) if axes}
        found = [
            f"{n}:{m} along {ways.get(axis, f'axis {axis}')}"
            for axis, (n, m) in sorted(self.groups.items(), key=lambda item: item[0] not in ways)
        ]
        if self.block:
            found.append(f"blocks {'x'.join(map(str, self.block))}")
        # N:M along the inputs gives every output as many
        for way, fan, axes in (("in", self.fan_in, inputs), ("out", self.fan_out, outputs)):
            if fan and not self.groups.keys() & set(axes):
                numbers = dict.fromkeys(f"{n:,}" for n in fan)
                found.append(f"constant fan-{way} {' to '.join(numbers)}")
        if found:
            return "; ".join(found)
        at_most = {"inputs": self.at_most_2_4_inputs, "outputs": self.at_most_2_4_outputs}
        held = " and ".join(way for way, holds in at_most.items() if holds)
        return f"unstructured, at most 2:4 along {held}" if held else "unstructured"


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
        self._slices = 0
        counted = ("size", "kept", "rows", "columns", "dead_rows", "dead_columns")
        self._counts = Counter(dict.fromkeys(counted, 0))
        self._channels = True
        self._at_most = {"inputs": True, "outputs": True}
        self._fans: dict[str, list[int] | None] = {"inputs": [], "outputs": []}

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
        is_matrix = bits.rows > 1 and bits.columns > 1
        self._channels &= is_matrix and kept == live_rows * live_columns
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
        counts = self._counts
        facts = {**counts, "axes": self._axes, "follows": self._follows}
        if counts["kept"] in (0, counts["size"]):
            return Found(**facts)
        rows, columns = counts["rows"] // self._slices, counts["columns"] // self._slices
        lengths = dict.fromkeys(self._axes.inputs, rows) | dict.fromkeys(
            self._axes.outputs, columns
        )
        block = tuple(self._structure.runs.values())
        has_blocks = math.prod(block) > 1 and min(rows, columns) > 1 and not self._channels
        return Found(
            **facts,
            channels=self._channels,
            # a single group is a constant fan-in or fan-out
            groups={
                g.axis: (g.n, g.m) for g in self._structure.groups if 2 * g.m <= lengths[g.axis]
            },
            block=block if has_blocks else None,
            fan_in=_fan(self._fans["inputs"], rows, columns),
            fan_out=_fan(self._fans["outputs"], columns, rows),
            at_most_2_4_inputs=self._at_most["inputs"],
            at_most_2_4_outputs=self._at_most["outputs"],
        )


def _fan(fans: Sequence[int] | None, most: int, neurons: int) -> tuple[int, int] | None:
    if not fans or neurons < 2 or min(fans) == most:
        return None
    return min(fans), max(fans)


def _kept_of_lines(bits: KeptBits) -> tuple[np.ndarray, np.ndarray]:
    """Weights kept of every row, and of every column."""
    rows, columns = [np.zeros(0, np.int64)], np.zeros(bits.columns, np.int64)
    for span in bits.spans():
        band = bits.band(*span)
        rows.append(np.count_nonzero(band, axis=1))
        columns += np.count_nonzero(band, axis=0)
    return np.concatenate(rows), columns
