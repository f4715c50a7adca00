"""Arrays of a checkpoint as they lie on disk, read part by part."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

# The most bytes of an array that are read at once, where its chunks allow it.
PART_BYTES = 64 * 2**20

_METADATA_KEYS = (".zarray", ".zattrs", ".zgroup", "zarr.json")

Index = tuple[slice, ...]


class CheckpointError(ValueError):
    """A checkpoint can't be read: there is none, or it is damaged or of another kind."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedArray:
    """An array of a checkpoint, not yet read.

    Attributes:
      name: of the leaf, such as 'target/decoder/layers_0/mlp/wi_0/kernel'.
      shape: of the array.
      dtype: of the array; bfloat16 is that of ml_dtypes.
      chunk_shape: the pieces that it is saved in; a piece is decoded as a whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    _source: Any = dataclasses.field(repr=False)
    _folder: epath.Path = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * self.dtype.itemsize

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads a part, or all of it.

        Args:
          index: a slice an axis, with no step; axes left out are read whole.

        Raises:
          CheckpointError: the file is damaged.
        """
        return self._read(self._source, whole_index(index, self.shape))

    def parts(
        self, index: Sequence[slice] = (), max_bytes: int | None = None
    ) -> Iterator[tuple[Index, np.ndarray]]:
        """Reads the array, or what is in `index`, piece by piece.

        Pieces don't overlap and follow the chunks, so that none is decoded twice.

        Args:
          index: as of `read`.
          max_bytes: the most bytes of a piece; None takes PART_BYTES. An element is the least.

        Yields:
          Where the piece is, a slice with start and stop for every axis, and the piece.
        """
        max_bytes = PART_BYTES if max_bytes is None else max_bytes
        region = whole_index(index, self.shape)
        limit = max(1, max_bytes // self.dtype.itemsize)
        lengths = _piece_shape(self.shape, self.chunk_shape, region, limit)
        source = self._source
        chunk_bytes = math.prod(self.chunk_shape) * self.dtype.itemsize
        if isinstance(source, ts.TensorStore) and math.prod(lengths) < math.prod(self.chunk_shape):
            # keeps the one chunk that several pieces are cut from, rather than decode it for each
            context = ts.Context({"cache_pool": {"total_bytes_limit": chunk_bytes + PART_BYTES}})
            spec = source.spec(retain_context=False, minimal_spec=True)
            source = ts.open(spec, open=True, read=True, context=context).result()
        # chunk by chunk, or by several whole ones
        outer = [max(n, c) for n, c in zip(lengths, self.chunk_shape, strict=True)]
        for whole in itertools.product(*map(_cuts, region, outer)):
            inner = (_cuts(s, n, s.start) for s, n in zip(whole, lengths, strict=True))
            for at in itertools.product(*inner):
                yield at, self._read(source, at)

    def _read(self, source: Any, index: Index) -> np.ndarray:
        if isinstance(source, np.ndarray):
            return np.asarray(source[index])
        try:
            return np.asarray(source[index].read().result())
        except (ValueError, OSError) as e:
            raise damaged(self._folder, f"{self.name} can't be read ({short(e)})") from e


def whole_index(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """A slice with start and stop for every axis; axes that `index` leaves out are whole."""
    if len(index) > len(shape):
        raise IndexError(f"{len(index)} slices for an array of shape {tuple(shape)}")
    pairs = itertools.zip_longest(index, shape, fillvalue=slice(None))
    return tuple(slice(*s.indices(n)[:2]) for s, n in pairs)


def _piece_shape(
    shape: Sequence[int], chunk: Sequence[int], region: Sequence[slice], limit: int
) -> list[int]:
    """Lengths of pieces of at most `limit` elements: parts of a chunk, or several chunks."""
    lengths = [max(1, min(c, n)) for c, n in zip(chunk, shape, strict=True)]
    wanted = [max(1, r.stop - r.start) for r in region]
    for axis in range(len(lengths)):
        rest = math.prod(min(n, w) for n, w in zip(lengths, wanted, strict=True))
        if rest > limit:
            own = min(lengths[axis], wanted[axis])
            lengths[axis] = max(1, own * limit // rest)
    for axis in reversed(range(len(lengths))):
        rest = math.prod(min(n, w) for n, w in zip(lengths, wanted, strict=True))
        if lengths[axis] >= wanted[axis]:
            continue
        if lengths[axis] < min(chunk[axis], shape[axis]):
            break
        lengths[axis] *= max(1, min(limit // rest, -(-wanted[axis] // lengths[axis])))
    return lengths


def _cuts(region: slice, length: int, origin: int = 0) -> list[slice]:
    """`region`, cut at the multiples of `length` from `origin` on."""
    first = region.start + length - (region.start - origin) % length
    ends = [region.start, *range(first, region.stop, length), region.stop]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


def open_arrays(
    folder: epath.Path,
    base: Mapping[str, Any],
    arrays: Mapping[str, tuple[str, str]],
    writes_all: bool,
) -> dict[str, SavedArray]:
    """Opens arrays, of whose elements none is read, and looks whether all their chunks are there.

    Args:
      folder: the checkpoint.
      base: the store that they are all in.
      arrays: name -> driver and place in the store.
      writes_all: whether chunks were saved even where they hold nothing but the fill value.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": PART_BYTES}})
    try:
        store = ts.KvStore.open(dict(base), context=context).result()
        keys = [k.decode("utf-8", "replace") for k in store.list().result()]
    except (ValueError, OSError) as e:
        raise damaged(folder, f"its list of arrays can't be read ({short(e)})") from e
    places = {path for _, path in arrays.values()}
    chunks = Counter(_place(k, places) for k in keys if not k.endswith(_METADATA_KEYS))
    opening = {}
    for name, (driver, path) in arrays.items():
        kvstore = {**base, "path": f"{base.get('path', '')}{path}/"}
        spec = {"driver": driver, "kvstore": kvstore}
        opening[name] = ts.open(spec, open=True, read=True, context=context)
    found = {}
    for name, future in opening.items():
        try:
            x = future.result()
        except (ValueError, OSError) as e:
            raise damaged(folder, f"{name} is missing or damaged ({short(e)})") from e
        grid = x.chunk_layout.write_chunk.shape or x.shape
        expected = math.prod(-(-n // max(1, c)) for n, c in zip(x.shape, grid, strict=True))
        there = chunks[arrays[name][1]]
        # a chunk that is not there reads as the fill value: zeros, which nobody would notice
        if there < expected and (writes_all or x.fill_value is None):
            raise damaged(folder, f"{expected - there} of {expected} chunks of {name} are missing")
        found[name] = make_array(folder, name, x, x.dtype.numpy_dtype, grid)
    return found


def _place(key: str, places: Collection[str]) -> str | None:
    """The array that a key of a store belongs to."""
    folders = itertools.accumulate(key.split("/"), "{}/{}".format)
    return next((f for f in folders if f in places), None)


def make_array(
    folder: epath.Path, name: str, x: Any, dtype: Any, chunk: Sequence[int]
) -> SavedArray:
    """x, of NumPy or of tensorstore, as an array of a checkpoint."""
    return SavedArray(
        name=name,
        shape=tuple(x.shape),
        dtype=np.dtype(dtype),
        chunk_shape=tuple(chunk),
        _source=x,
        _folder=folder,
    )


def kvstore_of(folder: epath.Path) -> dict[str, Any]:
    """What tensorstore calls a folder."""
    path = f"{str(folder).rstrip('/')}/"
    if "://" in path:
        return ts.KvStore.Spec(path).to_json()
    return {"driver": "file", "path": path}


def damaged(folder: epath.Path, what: str) -> CheckpointError:
    """The error that a checkpoint is not whole."""
    return CheckpointError(
        f"{folder} is damaged or half-written: {what}; copy it again, or give another "
        "checkpoint_<step>"
    )


def short(error: Exception) -> str:
    """What a library says, without the places in its source that tensorstore adds."""
    text = " ".join(re.sub(r"\[(source locations|tensorstore_spec)=.*", "", str(error)).split())
    return text if len(text) <= 160 else f"{text[:160]}..."
