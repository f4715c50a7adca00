"""Ways to say which positions of a weight are stored: CSR, N:M, blocks, bit masks.

Bool arrays say what is kept; index arrays, which are small, say the same in a file. docs/export.md
describes them for readers in other languages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Encoding(Protocol):
    """The contract of an encoding.

    `kept` is a bool array of the weight's shape. An encoding's own fields are its parameters, and
    are written beside its arrays.
    """

    name: ClassVar[str]

    def fits(self, kept: np.ndarray, *, exactly: bool = True) -> bool:
        """Whether it can store these positions: no other ones if `exactly`, else a few more."""

    def index(self, kept: np.ndarray) -> Arrays:
        """The arrays that place the values."""

    def values_shape(self, shape: Sequence[int], index: Mapping[str, np.ndarray]) -> tuple:
        """The shape of the values."""

    def positions(self, shape: Sequence[int], index: Mapping[str, np.ndarray]) -> np.ndarray:
        """int64, in the values' shape: each one's position in the flat weight, -1 for padding."""

    def pattern_bits(self, shape: Sequence[int], kept: int) -> float:
        """The fewest bits that can tell `kept` positions from all others of this pattern."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """All values, as they are."""

    name: ClassVar[str] = "dense"

    def fits(self, kept, *, exactly=True):
        return bool(kept.all()) or not exactly

    def index(self, kept):
        return {}

    def values_shape(self, shape, index):
        return tuple(shape)

    def positions(self, shape, index):
        return np.arange(math.prod(shape)).reshape(shape)

    def pattern_bits(self, shape, kept):
        return _choice_bits(math.prod(shape), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSR:
    """Compressed sparse rows. The columns are the weight's last axis, the rows all others.

    indices: column of every value, rows in order and columns ascending within a row. indptr [rows
    + 1]: where each row starts among the values.
    """

    name: ClassVar[str] = "csr"

    def fits(self, kept, *, exactly=True):
        return kept.ndim > 0 and kept.size > 0

    def index(self, kept):
        rows = kept.reshape(-1, kept.shape[-1])
        indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))])
        columns = np.flatnonzero(rows) % rows.shape[1]
        return {
            "indices": columns.astype(_unsigned(rows.shape[1] - 1)),
            "indptr": indptr.astype(_unsigned(int(indptr[-1]))),
        }

    def values_shape(self, shape, index):
        return index["indices"].shape

    def positions(self, shape, index):
        columns = index["indices"].astype(np.int64)
        counts = np.diff(index["indptr"].astype(np.int64))
        rows = math.prod(shape[:-1])
        check(
            counts.shape == (rows,)
            and index["indptr"][0] == 0
            and (counts >= 0).all()
            and counts.sum() == columns.size
            and (columns < shape[-1]).all(),
            "its rows and columns contradict its shape",
        )
        return np.repeat(np.arange(rows), counts) * shape[-1] + columns

    def pattern_bits(self, shape, kept):
        return _choice_bits(math.prod(shape), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bitmask:
    """A bit a weight, 1 where its value is stored, in C order, the first in the lowest bit."""

    name: ClassVar[str] = "bitmask"

    def fits(self, kept, *, exactly=True):
        return True

    def index(self, kept):
        return {"mask": np.packbits(kept.reshape(-1), bitorder="little")}

    def values_shape(self, shape, index):
        return (int(np.bitwise_count(index["mask"]).sum(dtype=np.int64)),)

    def positions(self, shape, index):
        size = math.prod(shape)
        check(index["mask"].shape == (-(-size // 8),), "its mask contradicts its shape")
        return np.flatnonzero(np.unpackbits(index["mask"], count=size, bitorder="little"))

    def pattern_bits(self, shape, kept):
        return _choice_bits(math.prod(shape), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM:
    """n values of every m consecutive ones along an axis.

    values: the weight's shape with that axis moved to the end, and n / m as long. indices: the
    place of each value in its group, ceil(log2 m) bits each, in the order of the values, packed
    into bytes from the lowest bit on.

    Attributes:
      n: values of a group, in [1, m).
      m: of a group, at least 2.
      axis: of the whole weight, not negative.
    """

    name: ClassVar[str] = "nm"
    n: int
    m: int
    axis: int

    def __post_init__(self):
        check(0 < self.n < self.m and self.axis >= 0, f"it is said to be {self.n}:{self.m}")

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return (self.m - 1).bit_length()

    def fits(self, kept, *, exactly=True):
        if not (self.axis < kept.ndim and kept.size and kept.shape[self.axis] % self.m == 0):
            return False
        counts = group_counts(kept, self.axis, self.m)
        return bool((counts == self.n).all() if exactly else (counts <= self.n).all())

    def index(self, kept):
        moved = np.ascontiguousarray(np.moveaxis(kept, self.axis, -1))
        groups = moved.reshape(*moved.shape[:-1], -1, self.m)
        missing = self.n - group_counts(moved, -1, self.m)
        if missing.any():
            groups = groups.copy()  # of groups with less than n, the first others are stored too
            for j in range(self.m):
                added = (missing > 0) & ~groups[..., j]
                groups[..., j] |= added
                missing = missing - added
        places = (np.flatnonzero(groups) % self.m).astype(np.uint32)
        return {"indices": _pack_bits(places, self.bits)}

    def values_shape(self, shape, index):
        others = [n for a, n in enumerate(shape) if a != self.axis]
        return (*others, shape[self.axis] // self.m * self.n)

    def positions(self, shape, index):
        check(
            self.axis < len(shape) and shape[self.axis] % self.m == 0,
            f"it can't be {self.n}:{self.m} along axis {self.axis}",
        )
        strides = _strides(shape)
        count = math.prod(shape) // self.m * self.n
        groups = shape[self.axis] // self.m
        places = _unpack_bits(index["indices"], count, self.bits).reshape(-1, groups, self.n)
        places = places + (np.arange(groups) * self.m)[:, None]
        others = [a for a in range(len(shape)) if a != self.axis]
        start = _grid([np.arange(shape[a]) * strides[a] for a in others]).reshape(-1, 1, 1)
        return (start + places * strides[self.axis]).reshape(self.values_shape(shape, index))

    def pattern_bits(self, shape, kept):
        return math.prod(shape) // self.m * math.log2(math.comb(self.m, self.n))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Blocks that are stored whole, of any number of axes; a channel is a block too.

    Blocks tile the weight from its origin; one over a ragged edge is filled up with zeros. indices
    [stored]: which blocks, ascending, as positions in the flat grid of blocks. values [stored,
    *block].

    Attributes:
      block: its length along every axis of the weight.
    """

    name: ClassVar[str] = "blocks"
    block: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "block", tuple(self.block))
        check(all(n > 0 for n in self.block), f"its blocks are said to be {self.block}")

    def _blocks(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The grid of blocks."""
        return tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))

    def _split(self, kept: np.ndarray, fill: bool) -> np.ndarray:
        """The weights of every block: [grid, weights of a block]."""
        grid = self._blocks(kept.shape)
        ends = [g * b - n for g, b, n in zip(grid, self.block, kept.shape, strict=True)]
        if any(ends):
            kept = np.pad(kept, [(0, n) for n in ends], constant_values=fill)
        split = kept.reshape([n for pair in zip(grid, self.block, strict=True) for n in pair])
        axes = (*range(0, split.ndim, 2), *range(1, split.ndim, 2))
        return split.transpose(axes).reshape(math.prod(grid), -1)

    def fits(self, kept, *, exactly=True):
        if len(self.block) != kept.ndim or not kept.size:
            return False
        stored = self._split(kept, False).any(axis=1)
        return bool((stored == self._split(kept, True).all(axis=1)).all())

    def index(self, kept):
        stored = np.flatnonzero(self._split(kept, False).any(axis=1))
        return {"indices": stored.astype(_unsigned(math.prod(self._blocks(kept.shape)) - 1))}

    def values_shape(self, shape, index):
        return (*index["indices"].shape, *self.block)

    def positions(self, shape, index):
        check(len(self.block) == len(shape), "its blocks contradict its shape")
        grid, strides = self._blocks(shape), _strides(shape)
        check((index["indices"] < math.prod(grid)).all(), "its blocks lie outside")
        starts = np.unravel_index(index["indices"].astype(np.int64), grid)
        found = np.zeros((len(starts[0]), *[1] * len(shape)), np.int64)
        outside = np.zeros(found.shape, bool)
        for a, (start, b) in enumerate(zip(starts, self.block, strict=True)):
            place = (start[:, None] * b + np.arange(b)).reshape(
                -1, *[b if i == a else 1 for i in range(len(shape))]
            )
            found = found + place * strides[a]
            outside = outside | (place >= shape[a])
        return np.where(outside, -1, found)

    def pattern_bits(self, shape, kept):
        grid = math.prod(self._blocks(shape))
        return _choice_bits(grid, min(grid, -(-kept // math.prod(self.block))))


_ENCODINGS = {e.name: e for e in (Dense, CSR, Bitmask, NM, Blocks)}


def from_dict(name: str, fields: Mapping[str, Any]) -> Encoding:
    """An encoding from what was written of it; further fields are passed over.

    Raises:
      ValueError: there is no such encoding, or a field is missing or out of range.
    """
    cls = _ENCODINGS.get(name)
    check(cls is not None, f"its encoding is {name!r}, which is none of {sorted(_ENCODINGS)}")
    own = [f.name for f in dataclasses.fields(cls)]
    check(all(f in fields for f in own), f"of its encoding {name!r}, one of {own} is missing")
    return cls(**{f: fields[f] for f in own})


def group_counts(kept: np.ndarray, axis: int, m: int) -> np.ndarray:
    """How many are kept in every run of m along an axis, int32; that axis is 1/m as long."""
    axis %= kept.ndim
    split = kept.reshape(*kept.shape[:axis], kept.shape[axis] // m, m, *kept.shape[axis + 1 :])
    counts = np.zeros((*split.shape[: axis + 1], *split.shape[axis + 2 :]), np.int32)
    for j in range(m):  # much faster than to reduce a short axis
        counts += split[(slice(None),) * (axis + 1) + (j,)]
    return counts


def check(condition: bool, what: str) -> None:
    """Raises ValueError, which says `what` contradicts what, unless `condition`."""
    if not condition:
        raise ValueError(what)


def _unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds it."""
    return np.min_scalar_type(max(largest, 0))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[a + 1 :]) for a in range(len(shape))]


def _grid(steps: Sequence[np.ndarray]) -> np.ndarray:
    """All sums of one of each, in C order."""
    total = np.zeros(1, np.int64)
    for step in steps:
        total = np.add.outer(total, step).reshape(-1)
    return total


def _pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    split = numbers.reshape(-1, 1) >> np.arange(bits, dtype=numbers.dtype) & 1
    return np.packbits(split.astype(np.uint8).reshape(-1), bitorder="little")


def _unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    check(packed.shape == (-(-count * bits // 8),), "its indices contradict its shape")
    split = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return split @ (np.int64(1) << np.arange(bits, dtype=np.int64))


def _choice_bits(total: int, chosen: int) -> float:
    """log2 of the ways to choose so many of a total."""
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return max(nats / math.log(2), 0.0)
