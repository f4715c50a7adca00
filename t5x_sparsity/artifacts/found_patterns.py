"""What the zeros of a weight look like: dead rows and columns, and the patterns that they form.

Arrays of NumPy only. A weight is taken slice by slice (a layer, an expert), each a matrix of
[inputs, outputs]; of a slice a bit a weight is held, whatever the weight's type. A pattern is found
where it holds exactly in every slice, and where there is something to hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from t5x_sparsity.artifacts.kept_bits import KeptBits

if TYPE_CHECKING:
    from t5x_sparsity.core import patterns

# N:M is looked for with M up to this.
MAX_GROUP = 32


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
      channels: dead rows and columns explain every zero.
      n_by_m_inputs: (n, m) of the smallest m so that every aligned group of m along the inputs has
        exactly n kept; None if there is none up to m = MAX_GROUP.
      n_by_m_outputs: likewise along the outputs.
      block: (height, width) of the largest aligned blocks that are kept or pruned as a whole; those
        at the edge may be smaller.
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
    channels: bool = False
    n_by_m_inputs: tuple[int, int] | None = None
    n_by_m_outputs: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
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
    def pattern(self) -> str:
        """In words: all that holds, without what follows from another that does."""
        if self.kept == self.size:
            return "dense"
        if not self.kept:
            return "all zero"
        if self.channels:
            return "whole channels"
        found = []
        for n_by_m, way in ((self.n_by_m_inputs, "inputs"), (self.n_by_m_outputs, "outputs")):
            if n_by_m:
                found.append(f"{n_by_m[0]}:{n_by_m[1]} along {way}")
        if self.block:
            found.append(f"blocks {self.block[0]}x{self.block[1]}")
        # N:M along the inputs gives every output as many
        if self.fan_in and not self.n_by_m_inputs:
            found.append(f"constant fan-in {_range(self.fan_in)}")
        if self.fan_out and not self.n_by_m_outputs:
            found.append(f"constant fan-out {_range(self.fan_out)}")
        if not found:
            ways = [
                way
                for way, holds in (
                    ("inputs", self.at_most_2_4_inputs),
                    ("outputs", self.at_most_2_4_outputs),
                )
                if holds
            ]
            at_most = f", at most 2:4 along {' and '.join(ways)}" if ways else ""
            return f"unstructured{at_most}"
        return "; ".join(found)


def _range(numbers: tuple[int, int]) -> str:
    low, high = numbers
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


class PatternFinder:
    """Finds what holds in every slice of a weight, from one slice at a time.

    A pattern that asks for something to be the same in several places is found only where there are
    several, and only among zeros: of a dense or an empty matrix, or one with a single row, nothing
    is.
    """

    def __init__(self, expected: str | None = None):
        """Prepares for the slices of a weight.

        Args:
          expected: repr of a pattern of t5x_sparsity, such as 'NByM(n=2, m=4, axis=-2)', to compare
            with; None for none.
        """
        self._expected = None if expected is None else _read_pattern(expected)
        self._follows = True if self._expected else None
        self._slices = self._size = self._kept = self._rows = self._columns = 0
        self._dead_rows = self._dead_columns = 0
        self._channels = True
        # by way: the groups still possible, m -> n; None before the first slice
        self._groups: dict[str, dict[int, int] | None] = {"inputs": None, "outputs": None}
        self._at_most = {"inputs": True, "outputs": True}
        # 0: no two neighbours have differed yet
        self._steps = {"inputs": 0, "outputs": 0}
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
            self._groups[way] = _groups(bits, length, inner, self._groups[way])
            if self._at_most[way]:
                self._at_most[way] = length % 4 == 0 and _most(bits, 4, inner, 2) <= 2
            if self._steps[way] != 1:
                self._steps[way] = _step(bits, length, inner, self._steps[way])
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
            "follows": self._follows,
        }
        if self._kept in (0, self._size):
            return Found(**facts)
        rows, columns = self._rows // self._slices, self._columns // self._slices
        height, width = self._steps["inputs"] or rows, self._steps["outputs"] or columns
        has_blocks = height * width > 1 and min(rows, columns) > 1 and not self._channels
        return Found(
            **facts,
            channels=self._channels,
            n_by_m_inputs=_tightest(self._groups["inputs"]),
            n_by_m_outputs=_tightest(self._groups["outputs"]),
            block=(height, width) if has_blocks else None,
            fan_in=self._fan("inputs", rows, columns),
            fan_out=self._fan("outputs", columns, rows),
            at_most_2_4_inputs=self._at_most["inputs"],
            at_most_2_4_outputs=self._at_most["outputs"],
        )

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


def _grouped(bits: KeptBits, m: int, inner: int) -> Iterator[np.ndarray]:
    """Weights kept of groups of m, `inner` weights apart, a band of them at a time."""
    multiple = m * inner // math.gcd(m * inner, bits.columns)
    for band in bits.bands(multiple):
        yield np.count_nonzero(band.reshape(-1, m, inner), axis=1)


def _most(bits: KeptBits, m: int, inner: int, enough: int) -> int:
    """The most weights kept of a group, or the first number found above `enough`."""
    most = 0
    for counts in _grouped(bits, m, inner):
        most = max(most, int(counts.max(initial=0)))
        if most > enough:
            break
    return most


def _exactly(bits: KeptBits, m: int, inner: int) -> int | None:
    """Weights kept of a group, where all groups have as many."""
    n = None
    for counts in _grouped(bits, m, inner):
        first = int(counts.flat[0]) if n is None else n
        if (counts != first).any():
            return None
        n = first
    return n


def _groups(
    bits: KeptBits, length: int, inner: int, possible: Mapping[int, int] | None
) -> dict[int, int]:
    """Those of the possible m -> n that hold in a slice; None makes all of them possible."""
    if possible is None:
        found: dict[int, int] = {}
        for m in range(2, min(MAX_GROUP, length // 2) + 1):
            # what holds of short groups holds of long ones made of them
            shorter = next((s for s in found if m % s == 0), None)
            if shorter is not None and length % m == 0:
                found[m] = found[shorter] * (m // shorter)
            elif length % m == 0 and (n := _exactly(bits, m, inner)) is not None:
                found[m] = n
        return found
    held: dict[int, int] = {}
    for m, n in possible.items():
        shorter = next((s for s in held if m % s == 0), None)
        if shorter is not None or _exactly(bits, m, inner) == n:
            held[m] = n
    return held


def _tightest(groups: Mapping[int, int] | None) -> tuple[int, int] | None:
    return next(((n, m) for m, n in sorted((groups or {}).items()) if 0 < n < m), None)


def _step(bits: KeptBits, length: int, inner: int, step: int = 0) -> int:
    """The largest n so that aligned runs of n along an axis are alike; 0 where all of it is.

    Args:
      bits: a slice.
      length: of the axis.
      inner: weights between neighbours along the axis.
      step: of other slices, which is to be a multiple of it.
    """
    overlap = -(-inner // bits.columns)
    last = np.zeros((overlap, bits.columns), bool)
    start = 0
    for band in bits.bands():
        joined = np.concatenate([last, band]).ravel()
        rest = overlap * bits.columns
        differs = np.flatnonzero(joined[rest:] ^ joined[rest - inner : joined.size - inner])
        places = (differs + start) // inner % length
        step = math.gcd(step, int(np.gcd.reduce(np.unique(places), initial=0)))
        if step == 1:
            break
        start += band.size
        last = joined.reshape(-1, bits.columns)[-overlap:]
    return step


def _read_pattern(text: str) -> patterns.BuiltIn | None:
    from t5x_sparsity.core import patterns  # here, as it imports JAX

    return patterns.from_text(text)
