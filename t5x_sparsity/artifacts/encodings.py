"""Ways to say which positions of a weight are stored: CSR, N:M, blocks, bit masks.

Bool arrays say what is kept; index arrays, which are small, say the same in a file. docs/export.md
describes them for readers in other languages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_sparsity.core.groups import group_counts

Arrays = dict[str, np.ndarray]


class Encoding:
    """The base of all encodings: which positions of a weight are stored, and how a file says so.

    `kept` is a bool array of the weight's shape. An encoding's own fields are its parameters, and
    are written next to its arrays.
    """

    name: ClassVar[str]

    def fits(self, kept: np.ndarray, *, exactly: bool = True) -> bool:
        """Whether it can store these positions: no other ones if `exactly`, else a few more."""
        raise NotImplementedError

    def index(self, kept: np.ndarray) -> Arrays:
        """The arrays that place the values."""
        raise NotImplementedError

    def values(self, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """What is stored of a weight, in its dtype."""
        return x[kept]

    def size(self, kept: np.ndarray) -> tuple[int, int]:
        """(values, bytes of the arrays that place them), of positions that it fits."""
        raise NotImplementedError

    def positions(self, shape: Sequence[int], index: Mapping[str, np.ndarray]) -> np.ndarray:
        """int64, in the values' shape: each one's position in the flat weight, -1 for padding."""
        raise NotImplementedError

    def pattern_bits(self, shape: Sequence[int], kept: int) -> float:
        """The fewest bits that can tell `kept` positions from all others of this pattern."""
        return _choice_bits(math.prod(shape), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Encoding):
    """All values, as they are."""

    name: ClassVar[str] = "dense"

    def fits(self, kept, *, exactly=True):
        return bool(kept.all()) or not exactly

    def index(self, kept):
        return {}

    def values(self, x, kept):
        return x

    def size(self, kept):
        return kept.size, 0

    def positions(self, shape, index):
        return np.arange(math.prod(shape)).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSR(Encoding):
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
        return {
            "indices": _last_places(rows),
            "indptr": indptr.astype(_unsigned(int(indptr[-1]))),
        }

    def size(self, kept):
        count, columns = int(np.count_nonzero(kept)), kept.shape[-1]
        indices = count * _unsigned(columns - 1).itemsize
        return count, indices + (kept.size // columns + 1) * _unsigned(count).itemsize

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bitmask(Encoding):
    """One bit per weight, 1 where its value is stored, in C order, the first in the lowest bit."""

    name: ClassVar[str] = "bitmask"

    def fits(self, kept, *, exactly=True):
        return True

    def index(self, kept):
        return {"mask": np.packbits(kept.reshape(-1), bitorder="little")}

    def size(self, kept):
        return int(np.count_nonzero(kept)), -(-kept.size // 8)

    def positions(self, shape, index):
        size = math.prod(shape)
        check(index["mask"].shape == (-(-size // 8),), "its mask contradicts its shape")
        return np.flatnonzero(np.unpackbits(index["mask"], count=size, bitorder="little"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM(Encoding):
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

    def _groups(self, kept: np.ndarray) -> np.ndarray:
        """What is stored: [the other axes, groups, m]."""
        moved = np.ascontiguousarray(np.moveaxis(kept, self.axis, -1))
        groups = moved.reshape(*moved.shape[:-1], -1, self.m)
        missing = self.n - group_counts(moved, -1, self.m)
        if missing.any():
            groups = groups.copy()  # of groups with less than n, the first others are stored too
            for j in range(self.m):
                added = (missing > 0) & ~groups[..., j]
                groups[..., j] |= added
                missing = missing - added
        return groups

    def index(self, kept):
        return {"indices": _pack_bits(_last_places(self._groups(kept)), self.bits)}

    def values(self, x, kept):
        groups, moved = self._groups(kept), np.moveaxis(x, self.axis, -1)
        return moved[groups.reshape(moved.shape)].reshape(*moved.shape[:-1], -1)

    def size(self, kept):
        count = kept.size // self.m * self.n
        return count, -(-count * self.bits // 8)

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
        found = start + places * strides[self.axis]
        return found.reshape(*(shape[a] for a in others), groups * self.n)

    def pattern_bits(self, shape, kept):
        return math.prod(shape) // self.m * math.log2(math.comb(self.m, self.n))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Encoding):
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

    def _split(self, x: np.ndarray, fill: bool) -> np.ndarray:
        """The weights of every block: [*grid, *block]."""
        grid = self._blocks(x.shape)
        ends = [g * b - n for g, b, n in zip(grid, self.block, x.shape, strict=True)]
        if any(ends):
            x = np.pad(x, [(0, n) for n in ends], constant_values=fill)
        split = x.reshape([n for pair in zip(grid, self.block, strict=True) for n in pair])
        return split.transpose(*range(0, split.ndim, 2), *range(1, split.ndim, 2))

    def _stored(self, kept: np.ndarray) -> np.ndarray:
        """[*grid], whether any of a block is kept."""
        return self._split(kept, False).any(axis=tuple(range(kept.ndim, 2 * kept.ndim)))

    def fits(self, kept, *, exactly=True):
        if len(self.block) != kept.ndim or not kept.size:
            return False
        whole = self._split(kept, True).all(axis=tuple(range(kept.ndim, 2 * kept.ndim)))
        return bool((self._stored(kept) == whole).all())

    def index(self, kept):
        stored = self._stored(kept)
        return {"indices": np.flatnonzero(stored).astype(_unsigned(stored.size - 1))}

    def values(self, x, kept):
        return self._split(x, False)[self._stored(kept)]

    def size(self, kept):
        stored = self._stored(kept)
        count = int(np.count_nonzero(stored))
        return count * math.prod(self.block), count * _unsigned(stored.size - 1).itemsize

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
    """An encoding from what was written of it; further fields are ignored.

    Raises:
      ValueError: there is no such encoding, or a field is missing or out of range.
    """
    cls = _ENCODINGS.get(name)
    check(cls is not None, f"its encoding is {name!r}, which is none of {sorted(_ENCODINGS)}")
    own = [f.name for f in dataclasses.fields(cls)]
    check(all(f in fields for f in own), f"of its encoding {name!r}, one of {own} is missing")
    return cls(**{f: fields[f] for f in own})


def check(condition: bool, what: str) -> None:
    """Raises ValueError, which says `what` contradicts what, unless `condition`."""
    if not condition:
        raise ValueError(what)


def _unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds it."""
    return np.min_scalar_type(max(largest, 0))


def _last_places(kept: np.ndarray) -> np.ndarray:
    """Where along the last axis each one kept is, in C order and the smallest unsigned type."""
    n = kept.shape[-1]
    return np.broadcast_to(np.arange(n, dtype=_unsigned(n - 1)), kept.shape)[kept]


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[a + 1 :]) for a in range(len(shape))]


def _grid(steps: Sequence[np.ndarray]) -> np.ndarray:
    """All sums of one of each, in C order."""
    total = np.zeros(1, np.int64)
    for step in steps:
        total = np.add.outer(total, step).reshape(-1)
    return total


def _pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    shifts, many = np.arange(bits, dtype=numbers.dtype), 1 << 20
    packed = []
    for start in range(0, max(numbers.size, 1), many):  # eight of them end at a whole byte
        split = numbers[start : start + many, None] >> shifts & 1
        packed.append(np.packbits(split.astype(np.uint8).reshape(-1), bitorder="little"))
    return np.concatenate(packed)


def _unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    check(packed.shape == (-(-count * bits // 8),), "its indices contradict its shape")
    split = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return split @ (np.int64(1) << np.arange(bits, dtype=np.int64))


def _choice_bits(total: int, chosen: int) -> float:
    """log2 of the ways to choose so many of a total."""
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return max(nats / math.log(2), 0.0)
