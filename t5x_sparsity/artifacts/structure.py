"""The N:M groups and blocks that the zeros of a weight form: what inspect names and export uses.

A weight is taken slice by slice, each as one bit per weight, and read a band of rows at a time.
What is found holds in every slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from t5x_sparsity.artifacts.kept_bits import KeptBits
from t5x_sparsity.core.groups import group_counts

# N:M is looked for with m up to this.
MAX_GROUP = 32
# The m with which groups that keep fewer than n are looked for, where those may be filled up.
FILLED_GROUPS = (2, 4, 8, 16, 32)


_FEW = 1 << 12


class Groups(NamedTuple):
    """n weights kept of every m consecutive ones along an axis, 0 < n < m."""

    axis: int
    n: int
    m: int


class StructureFinder:
    """Finds the structure that holds in every slice of a weight, from one slice at a time."""

    def __init__(self, axes: Sequence[int], *, fill: bool = False):
        """Prepares for the slices of a weight.

        Args:
          axes: those of a slice, ascending, as the whole weight numbers them.
          fill: whether to look for `filled_groups` too.
        """
        self._axes, self._fill = tuple(axes), fill
        self._shape: tuple[int, ...] = ()
        # by axis: the groups that are still possible, m -> n; empty before the first slice
        self._exact: dict[int, dict[int, int]] = {}
        self._most: dict[int, dict[int, int]] = {}
        # by axis: 0 where no two neighbors have differed yet
        self._steps = dict.fromkeys(axes, 0)

    def add(self, bits: KeptBits) -> None:
        """Takes a slice; all have one shape, with at least one weight."""
        self._shape = bits.shape
        for i, axis in enumerate(self._axes):
            length, inner = bits.shape[i], math.prod(bits.shape[i + 1 :])
            self._exact[axis] = _exact_groups(bits, length, inner, self._exact.get(axis))
            if self._fill:
                self._most[axis] = _most_kept(bits, length, inner, self._most.get(axis))
            if self._steps[axis] != 1:
                self._steps[axis] = _step(bits, length, inner, self._steps[axis])

    @property
    def groups(self) -> list[Groups]:
        """N:M that holds exactly, of the smallest m, for each axis that has one.

        m may be the whole axis.
        """
        found: dict[int, Groups] = {}
        for axis, exact in self._exact.items():
            for m, n in sorted(exact.items()):
                if 0 < n < m:
                    found.setdefault(axis, Groups(axis, n, m))
        return list(found.values())

    @property
    def filled_groups(self) -> list[Groups]:
        """N:M of which some groups keep fewer than n; [] if not looked for."""
        # longer groups than exact ones say no more
        limits = {g.axis: g.m for g in self.groups}
        return [
            Groups(axis, n, m)
            for axis, most in self._most.items()
            for m, n in most.items()
            if 0 < n and m < limits.get(axis, math.inf)
        ]

    @property
    def runs(self) -> dict[int, int]:
        """Axis -> the length of aligned runs of weights that are alike; the last may be shorter."""
        lengths = zip(self._axes, self._shape, strict=False)
        return {axis: self._steps[axis] or length for axis, length in lengths}


def most_kept(bits: KeptBits, m: int, inner: int, enough: int) -> int:
    """The most weights kept of a group, or the first number found of at least `enough`.

    Args:
      bits: a slice.
      m: weights of a group.
      inner: weights between neighbors of a group.
      enough: where to stop.
    """
    most = 0
    for counts in _grouped(bits, m, inner):
        most = max(most, int(counts.max(initial=0)))
        if most >= enough:
            break
    return most


def _grouped(bits: KeptBits, m: int, inner: int) -> Iterator[np.ndarray]:
    """Weights kept of groups of m, `inner` weights apart, a band of them at a time."""
    multiple = m * inner // math.gcd(m * inner, bits.columns)
    for band in bits.bands(multiple):
        yield group_counts(band.reshape(-1, m, inner), 1, m)


def _kept_of_each(bits: KeptBits, m: int, inner: int) -> int | None:
    """Weights kept of a group, where all groups keep the same number."""
    n = None
    for counts in _grouped(bits, m, inner):
        first = int(counts.flat[0]) if n is None else n
        if (counts != first).any():
            return None
        n = first
    return n


def _exact_groups(
    bits: KeptBits, length: int, inner: int, possible: Mapping[int, int] | None
) -> dict[int, int]:
    """Those of the possible m -> n that hold in a slice; None makes all of them possible."""
    found: dict[int, int] = {}
    for m in range(2, min(MAX_GROUP, length) + 1) if possible is None else possible:
        # One group as long as the axis is a constant fan-in or fan-out. Exports have always stored
        # those of these lengths as groups.
        if length % m or (length == m and m not in FILLED_GROUPS):
            continue
        # what holds of short groups holds of long ones made of them
        shorter = next((s for s in found if m % s == 0), None)
        n = _kept_of_each(bits, m, inner) if shorter is None else found[shorter] * (m // shorter)
        if n is not None and (possible is None or possible[m] == n):
            found[m] = n
    return found


def _most_kept(
    bits: KeptBits, length: int, inner: int, before: Mapping[int, int] | None
) -> dict[int, int]:
    """m -> the most kept of a group in this slice and those before, where that is less than m."""
    before = {m: 0 for m in FILLED_GROUPS if length % m == 0} if before is None else before
    most = {m: max(n, most_kept(bits, m, inner, m)) for m, n in before.items()}
    return {m: n for m, n in most.items() if n < m}


def _step(bits: KeptBits, length: int, inner: int, step: int) -> int:
    """The largest n so that aligned runs of n along an axis are alike; 0 where all of it is.

    Args:
      bits: a slice.
      length: of the axis.
      inner: weights between neighbors along the axis.
      step: of other slices, which is to be a multiple of it.
    """
    for start, differs in _differences(bits, inner):
        # most often, the first few tell that there are no such runs
        for part in (differs[:_FEW], differs):
            places = (np.flatnonzero(part) + start) // inner % length
            step = math.gcd(step, int(np.gcd.reduce(np.unique(places), initial=0)))
            if step == 1:
                return 1
    return step


def _differences(bits: KeptBits, inner: int) -> Iterator[tuple[int, np.ndarray]]:
    """Whether each weight differs from the one `inner` before it, a band of them at a time.

    Yields the flat place of the band's first weight, and bool [weights]. The first `inner` weights
    have none before them, and may be left out.
    """
    if inner % bits.columns:  # neighbors lie in one row
        for start in range(0, bits.rows, bits.band_rows()):
            band = bits.band(start, min(start + bits.band_rows(), bits.rows))
            before = np.roll(band, inner, axis=1)
            before[:, :inner] = band[:, :inner]
            yield start * bits.columns, (band ^ before).ravel()
        return
    gap = inner // bits.columns
    for start in range(gap, bits.rows, bits.band_rows()):
        stop = min(start + bits.band_rows(), bits.rows)
        differs = bits.band(start, stop) ^ bits.band(start - gap, stop - gap)
        yield start * bits.columns, differs.ravel()
