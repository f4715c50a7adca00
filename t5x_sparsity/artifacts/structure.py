"""The N:M groups and blocks that the zeros of a weight form: what inspect names and export uses.

A weight is taken slice by slice, each as one bit per weight, and read a band of rows at a time.
What is found holds in every slice.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t5x_sparsity.artifacts.encodings import NM
from t5x_sparsity.core.groups import group_counts

# N:M is looked for with m up to this.
MAX_GROUP = 32
# The m with which groups that keep fewer than n are looked for, where those may be filled up.
FILLED_GROUPS = (2, 4, 8, 16, 32)

# Weights looked at together; most patterns fail on the first.
_BAND = 1 << 18
_FEW = 1 << 12


class KeptBits:
    """Which weights of a slice are kept, one bit each: a matrix of rows and columns.

    Of the slice's axes, the last `output_axes` are the columns, all others the rows.
    """

    def __init__(self, shape: Sequence[int], output_axes: int = 1):
        """All pruned."""
        self.shape = tuple(shape)
        first = len(self.shape) - output_axes
        self.rows, self.columns = math.prod(self.shape[:first]), math.prod(self.shape[first:])
        self.size = self.rows * self.columns
        self._bits = np.zeros((*self.shape[:-1], -(-self.shape[-1] // 8)), np.uint8)

    def add(self, kept: np.ndarray, index: Sequence[slice] = ()) -> None:
        """Marks weights of a part as kept; `index` has a slice per axis, or () for the whole."""
        at = list(index) or [slice(0, n) for n in self.shape]
        start, first = divmod(at[-1].start, 8)
        if first:
            kept = np.pad(kept, [*[(0, 0)] * (kept.ndim - 1), (first, 0)])
        packed = np.packbits(kept, axis=-1)
        at[-1] = slice(start, start + packed.shape[-1])
        self._bits[tuple(at)] |= packed

    def band(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the matrix: bool [rows, columns]."""
        packed = self._bits.reshape(self.rows, -1, self._bits.shape[-1])[start:stop]
        bits = np.unpackbits(packed, axis=-1, count=self.shape[-1])
        return bits.reshape(len(packed), self.columns).view(bool)

    def mask(self) -> np.ndarray:
        """The slice: bool, in its shape."""
        return self.band(0, self.rows).reshape(self.shape)

    def spans(self, first: int = 0, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Start and stop of bands, read one by one, of a multiple of so many rows but the last."""
        step = max(1, _BAND // max(1, self.columns * multiple)) * multiple
        for start in range(first, self.rows, step):
            yield start, min(start + step, self.rows)


def slices_of(kept: np.ndarray, stack_axes: Sequence[int] = ()) -> Iterator[KeptBits]:
    """The slices of a weight, from a bool array of its shape."""
    stacked = np.moveaxis(kept, stack_axes, range(len(stack_axes)))
    for at in np.ndindex(*stacked.shape[: len(stack_axes)]):
        bits = KeptBits(stacked[at].shape)
        bits.add(stacked[at])
        yield bits


class StructureFinder:
    """Finds the structure that holds in every slice of a weight, from one slice at a time."""

    def __init__(self, axes: Sequence[int], *, fill: bool = False):
        """`axes` are those of a slice, ascending, as the whole weight numbers them.

        `fill`: whether to look for `filled_groups` too.
        """
        self._axes, self._fill = tuple(axes), fill
        self._shape: tuple[int, ...] = ()
        # by axis: the groups that are still possible, m -> n, None for any; empty before a slice
        self._exact: dict[int, dict[int, int | None]] = {}
        self._most: dict[int, dict[int, int]] = {}
        # by axis: 0 where no two neighbors have differed yet
        self._steps = dict.fromkeys(axes, 0)

    def add(self, bits: KeptBits) -> None:
        """Takes a slice; all have one shape, with at least one weight."""
        self._shape = bits.shape
        for i, axis in enumerate(self._axes):
            length, inner = bits.shape[i], math.prod(bits.shape[i + 1 :])
            if axis not in self._exact:
                sizes = [m for m in range(2, MAX_GROUP + 1) if length % m == 0]
                # One group as long as the axis is a constant fan-in or fan-out. Exports have always
                # stored those of these lengths as groups.
                exact = [m for m in sizes if m < length or m in FILLED_GROUPS]
                self._exact[axis] = dict.fromkeys(exact)
                self._most[axis] = {m: 0 for m in sizes if self._fill and m in FILLED_GROUPS}
            self._exact[axis] = _exact_groups(bits, inner, self._exact[axis])
            most = {
                m: max(n, kept_of_groups(bits, m, inner, limit=m - 1)[1])
                for m, n in self._most[axis].items()
            }
            self._most[axis] = {m: n for m, n in most.items() if n < m}
            if self._steps[axis] != 1:
                self._steps[axis] = _step(bits, length, inner, self._steps[axis])

    @property
    def groups(self) -> list[NM]:
        """N:M that holds exactly, of the smallest m, per axis; m may be the whole axis."""
        found: dict[int, NM] = {}
        for axis, exact in self._exact.items():
            for m, n in exact.items():
                if 0 < n < m:
                    found.setdefault(axis, NM(n=n, m=m, axis=axis))
        return list(found.values())

    @property
    def filled_groups(self) -> list[NM]:
        """N:M of which some groups keep fewer than n; [] if not looked for."""
        # longer groups than exact ones say no more
        limits = {g.axis: g.m for g in self.groups}
        return [
            NM(n=n, m=m, axis=axis)
            for axis, most in self._most.items()
            for m, n in most.items()
            if 0 < n and m < limits.get(axis, math.inf)
        ]

    @property
    def runs(self) -> dict[int, int]:
        """Axis -> the length of aligned runs of weights that are alike; the last may be shorter."""
        lengths = zip(self._axes, self._shape, strict=False)
        return {axis: self._steps[axis] or length for axis, length in lengths}


# In what follows, neighbors along the axis that is looked at are `inner` weights apart.


def kept_of_groups(bits: KeptBits, m: int, inner: int, limit: int | None = None) -> tuple[int, int]:
    """The least and the most weights kept of a group of m.

    Stops early, where the most is above the limit, or without a limit where the two differ.
    """
    least, most = m, 0
    for start, stop in bits.spans(0, m * inner // math.gcd(m * inner, bits.columns)):
        counts = group_counts(bits.band(start, stop).reshape(-1, m, inner), 1, m)
        least, most = min(least, int(counts.min())), max(most, int(counts.max()))
        if least < most if limit is None else most > limit:
            break
    return least, most


def _exact_groups(
    bits: KeptBits, inner: int, possible: Mapping[int, int | None]
) -> dict[int, int | None]:
    """Those of the possible m -> n that hold in a slice."""
    found: dict[int, int | None] = {}
    for m, expected in possible.items():
        # what holds of short groups holds of long ones made of them
        shorter = next((s for s in found if m % s == 0), None)
        if shorter is None:
            n, most = kept_of_groups(bits, m, inner)
        else:
            n = most = found[shorter] * (m // shorter)
        if n == most and expected in (None, n):
            found[m] = n
    return found


def _step(bits: KeptBits, length: int, inner: int, step: int) -> int:
    """The largest n so that aligned runs of n are alike, and `step`, of other slices, a multiple.

    0 where the whole axis is alike.
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
    """Whether each weight differs from its neighbor before it, a band of them at a time.

    Yields the flat place of the band's first weight, and bool [weights]. Weights that have no
    neighbor before them count as alike, or are left out.
    """
    gap, within_row = divmod(inner, bits.columns)
    for start, stop in bits.spans(gap):
        band = bits.band(start, stop)
        if within_row:
            before = np.roll(band, inner, axis=1)
            before[:, :inner] = band[:, :inner]
        else:
            before = bits.band(start - gap, stop - gap)
        yield start * bits.columns, (band ^ before).ravel()
