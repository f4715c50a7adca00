"""Ways to store a sparse weight by the pattern of its zeros: CSR, N:M, blocks, bit masks.

Bool arrays say what is kept; index arrays, which are small, say the same in a file. Values are
moved as bits and never computed with, so that NaN, infinities, -0 and every dtype come back as they
were; whatever isn't stored comes back as +0. docs/export.md says what each array holds.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5x_sparsity.core.groups import group_counts

# the values' name, next to the arrays that place them
VALUES = "values"

Arrays = Mapping[str, np.ndarray]


class Encoding:
    """The base of all encodings; an encoding's own fields are written next to its arrays.

    `kept` is a bool array of the weight's shape, True where the weight is stored: at least wherever
    it isn't 0.
    """

    name: ClassVar[str]

    def fits(self, kept: np.ndarray, *, exactly: bool = True) -> bool:
        """Whether it can store these positions: no other ones if `exactly`, else a few more."""
        return True

    def encode(self, x: np.ndarray, kept: np.ndarray) -> Arrays:
        """The arrays of a weight: 'values', in its dtype, and those that place them."""
        raise NotImplementedError

    def nbytes(self, kept: np.ndarray, itemsize: int) -> int:
        """Bytes of all arrays, for positions that it fits; nothing is encoded."""
        raise NotImplementedError

    def positions(self, arrays: Arrays, shape: Sequence[int]) -> np.ndarray:
        """int64, in the values' shape: each one's position in the flat weight, -1 for padding."""
        raise NotImplementedError

    def stored(self, arrays: Arrays, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(positions in the flat weight, values) of what is stored, in the order of the file.

        Raises:
          ValueError: the arrays contradict each other.
        """
        positions, values = self.positions(arrays, shape), arrays[VALUES]
        check(
            positions.shape == values.shape,
            f"it has {values.shape} values for {positions.shape} positions",
        )
        inside = positions >= 0
        positions, values = positions[inside], values[inside]
        seen = np.zeros(math.prod(shape), bool)
        seen[positions] = True
        check(np.count_nonzero(seen) == positions.size, "one position has several values")
        return positions, values

    def decode(self, arrays: Arrays, shape: Sequence[int]) -> np.ndarray:
        """The weight, in the dtype of its values; raises what `stored` does."""
        positions, values = self.stored(arrays, shape)
        x = np.zeros(math.prod(shape), values.dtype)
        x[positions] = values
        return x.reshape(shape)

    def bound_bytes(self, shape: Sequence[int], kept: int, itemsize: int) -> int:
        """What no exact code of this pattern can go below on average, if values don't compress.

        The values kept, and log2 of the number of ways to choose their positions.
        """
        return kept * itemsize + math.ceil(self._pattern_bits(shape, kept) / 8)

    def _pattern_bits(self, shape: Sequence[int], kept: int) -> float:
        return _choice_bits(math.prod(shape), kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Encoding):
    """All values, as they are."""

    name: ClassVar[str] = "dense"

    def encode(self, x, kept):
        return {VALUES: x}

    def nbytes(self, kept, itemsize):
        return kept.size * itemsize

    def positions(self, arrays, shape):
        return np.arange(math.prod(shape)).reshape(shape)

    def decode(self, arrays, shape):
        check(arrays[VALUES].shape == tuple(shape), "its values contradict its shape")
        return arrays[VALUES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CSR(Encoding):
    """Compressed sparse rows. The columns are the weight's last axis, the rows all others."""

    name: ClassVar[str] = "csr"

    def encode(self, x, kept):
        rows = kept.reshape(-1, kept.shape[-1])
        indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(rows, axis=1))])
        indptr = indptr.astype(_unsigned(int(indptr[-1])))
        return {VALUES: x[kept], "indices": _last_places(rows), "indptr": indptr}

    def nbytes(self, kept, itemsize):
        count, columns = int(np.count_nonzero(kept)), kept.shape[-1]
        starts = (kept.size // columns + 1) * _unsigned(count).itemsize
        return count * (itemsize + _unsigned(columns - 1).itemsize) + starts

    def positions(self, arrays, shape):
        columns = arrays["indices"].astype(np.int64)
        counts = np.diff(arrays["indptr"].astype(np.int64))
        rows = math.prod(shape[:-1])
        check(
            counts.shape == (rows,)
            and arrays["indptr"][0] == 0
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

    def encode(self, x, kept):
        return {VALUES: x[kept], "mask": np.packbits(kept.reshape(-1), bitorder="little")}

    def nbytes(self, kept, itemsize):
        return int(np.count_nonzero(kept)) * itemsize + -(-kept.size // 8)

    def positions(self, arrays, shape):
        size = math.prod(shape)
        check(arrays["mask"].shape == (-(-size // 8),), "its mask contradicts its shape")
        return np.flatnonzero(np.unpackbits(arrays["mask"], count=size, bitorder="little"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NM(Encoding):
    """n values of every m consecutive ones along an axis."""

    name: ClassVar[str] = "nm"
    n: int  #: values of a group, in [1, m)
    m: int  #: weights of a group
    axis: int  #: of the whole weight, not negative

    def __post_init__(self):
        check(0 < self.n < self.m and self.axis >= 0, f"it is said to be {self.n}:{self.m}")

    @property
    def _bits(self) -> int:
        """Bits of an index."""
        return (self.m - 1).bit_length()

    def fits(self, kept, *, exactly=True):
        if not (self.axis < kept.ndim and kept.size and kept.shape[self.axis] % self.m == 0):
            return False
        counts = group_counts(kept, self.axis, self.m)
        return bool((counts == self.n).all() if exactly else (counts <= self.n).all())

    def encode(self, x, kept):
        moved = np.moveaxis(x, self.axis, -1)
        kept = np.ascontiguousarray(np.moveaxis(kept, self.axis, -1))
        missing = self.n - group_counts(kept, -1, self.m)
        groups = kept.reshape(*missing.shape, self.m)
        if missing.any():
            groups = groups.copy()  # of groups with less than n, the first others are stored too
            for j in range(self.m):
                added = (missing > 0) & ~groups[..., j]
                groups[..., j] |= added
                missing = missing - added
        indices = _pack_bits(_last_places(groups), self._bits)
        values = moved[groups.reshape(moved.shape)].reshape(*moved.shape[:-1], -1)
        return {VALUES: values, "indices": indices}

    def nbytes(self, kept, itemsize):
        count = kept.size // self.m * self.n
        return count * itemsize + -(-count * self._bits // 8)

    def positions(self, arrays, shape):
        check(
            self.axis < len(shape) and shape[self.axis] % self.m == 0,
            f"it can't be {self.n}:{self.m} along axis {self.axis}",
        )
        flat = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), self.axis, -1)
        count = flat.size // self.m * self.n
        places = _unpack_bits(arrays["indices"], count, self._bits)
        places = places.reshape(*flat.shape[:-1], -1, self.n)
        places += np.arange(0, shape[self.axis], self.m)[:, None]
        return np.take_along_axis(flat, places.reshape(*flat.shape[:-1], -1), axis=-1)

    def _pattern_bits(self, shape, kept):
        return math.prod(shape) // self.m * math.log2(math.comb(self.m, self.n))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Encoding):
    """Blocks that are stored whole, of any number of axes; a channel is a block too.

    Blocks tile the weight from its origin; one over a ragged edge is filled up with zeros.
    """

    name: ClassVar[str] = "blocks"
    block: tuple[int, ...]  #: its length along every axis of the weight

    def __post_init__(self):
        object.__setattr__(self, "block", tuple(self.block))
        check(all(n > 0 for n in self.block), f"its blocks are said to be {self.block}")

    def _grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """How many blocks there are along every axis."""
        return tuple(-(-n // b) for n, b in zip(shape, self.block, strict=True))

    def _split(self, x: np.ndarray, fill: int) -> np.ndarray:
        """The weights of every block: [*grid, *block]."""
        grid = self._grid(x.shape)
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

    def encode(self, x, kept):
        stored = self._stored(kept)
        indices = np.flatnonzero(stored).astype(_unsigned(stored.size - 1))
        return {VALUES: self._split(x, 0)[stored], "indices": indices}

    def nbytes(self, kept, itemsize):
        stored = self._stored(kept)
        of_one = math.prod(self.block) * itemsize + _unsigned(stored.size - 1).itemsize
        return int(np.count_nonzero(stored)) * of_one

    def positions(self, arrays, shape):
        check(len(self.block) == len(shape), "its blocks contradict its shape")
        grid, indices = self._grid(shape), arrays["indices"].astype(np.int64)
        check((indices < math.prod(grid)).all(), "its blocks lie outside")
        places = np.indices(self.block)[:, None]  # within a block: [axes, 1, *block]
        corners = np.stack(np.unravel_index(indices, grid)).reshape(
            len(shape), -1, *[1] * len(shape)
        )
        at = [c * n + p for c, n, p in zip(corners, self.block, places, strict=True)]
        inside = np.logical_and.reduce([a < n for a, n in zip(at, shape, strict=True)])
        return np.where(inside, np.ravel_multi_index(at, shape, mode="clip"), -1)

    def _pattern_bits(self, shape, kept):
        grid = math.prod(self._grid(shape))
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


def _pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    packed, many = [], 1 << 20
    for start in range(0, max(numbers.size, 1), many):  # eight of them end at a whole byte
        each = numbers[start : start + many].reshape(-1, 1).view(np.uint8)
        split = np.unpackbits(each, axis=1, count=bits, bitorder="little")
        packed.append(np.packbits(split, bitorder="little"))
    return np.concatenate(packed)


def _unpack_bits(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    check(packed.shape == (-(-count * bits // 8),), "its indices contradict its shape")
    split = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    return split @ (np.int64(1) << np.arange(bits, dtype=np.int64))


def _choice_bits(total: int, chosen: int) -> float:
    """log2 of the ways to choose so many of a total."""
    nats = math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
    return max(nats / math.log(2), 0.0)
