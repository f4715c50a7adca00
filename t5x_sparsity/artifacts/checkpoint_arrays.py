"""Which arrays a checkpoint holds, and their values part by part: no model, no host.

Both layouts are read: Orbax's, which T5X and the embedded host write (`checkpoint_<step>/state/`),
and T5X's own older one (`checkpoint_<step>/checkpoint`, msgpack, next to one folder per array).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from t5x_sparsity.artifacts.checkpoint_folders import CheckpointError

# The most bytes of an array that are read at once, where its chunks allow it.
PART_BYTES = 64 * 2**20

_METADATA_KEYS = (".zarray", ".zattrs", ".zgroup", "zarr.json")
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "str")

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedArray:
    """An array of a checkpoint, not yet read.

    Attributes:
      name: of the leaf, such as 'target/decoder/layers_0/mlp/wi_0/kernel'.
      shape: of the array.
      dtype: of the array; bfloat16 is that of ml_dtypes.
      chunk_shape: the pieces that it is saved in; a piece is decoded as a whole.
      folder: of the checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    _source: Any = dataclasses.field(repr=False)
    folder: epath.Path = dataclasses.field(repr=False)

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
          index: one slice per axis, with no step; axes left out are read whole.

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
            raise damaged(self.folder, f"{self.name} can't be read ({short(e)})") from e


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


def saved_arrays(
    folder: epath.Path, layout: str, *, prefix: str = "", complete: bool = True
) -> dict[str, SavedArray]:
    """The arrays of a checkpoint by name; no values are read.

    Args:
      folder: that of the checkpoint.
      layout: 'orbax' or 't5x', see `checkpoint_folders.layout_of`.
      prefix: of the names of the arrays that are wanted; others are not opened.
      complete: whether to look that all their chunks are there, for which all files are listed.

    Raises:
      CheckpointError: it is damaged.
    """
    arrays_of = _orbax_arrays if layout == "orbax" else _t5x_arrays
    return arrays_of(folder, prefix, complete)


def _orbax_arrays(folder: epath.Path, prefix: str, complete: bool) -> dict[str, SavedArray]:
    state = folder / "state"
    try:
        metadata = json.loads((state / "_METADATA").read_text())
        tree = metadata["tree_metadata"].values()
        names = [
            [str(k["key"]) for k in leaf["key_metadata"]]
            for leaf in tree
            if not leaf["value_metadata"].get("skip_deserialize")
            and leaf["value_metadata"].get("value_type") not in _NO_ARRAY
        ]
    except FileNotFoundError as e:
        raise damaged(folder, "the file state/_METADATA is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged(folder, f"the file state/_METADATA is cut ({short(e)})") from e
    base = _kvstore(state)
    if metadata.get("use_ocdbt", (state / "manifest.ocdbt").exists()):
        if not (state / "manifest.ocdbt").exists():
            raise damaged(folder, "the file state/manifest.ocdbt is missing")
        base = {"driver": "ocdbt", "base": base}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    places = {"/".join(keys): (driver, ".".join(keys)) for keys in names}
    places = {name: place for name, place in places.items() if name.startswith(prefix)}
    # where Orbax writes all chunks, even those of nothing but the fill value
    writes_all = bool(metadata.get("store_array_data_equal_to_fill_value"))
    return _open_arrays(folder, base, places, writes_all, complete)


def _t5x_arrays(folder: epath.Path, prefix: str, complete: bool) -> dict[str, SavedArray]:
    try:
        content = _unpack((folder / "checkpoint").read_bytes())
    except ImportError:
        raise
    except Exception as e:  # what msgpack raises on any bytes
        raise damaged(
            folder, f"the file 'checkpoint' is cut or not T5X's ({type(e).__name__}: {short(e)})"
        ) from e
    if not isinstance(content, Mapping) or not isinstance(content.get("optimizer"), Mapping):
        raise CheckpointError(
            f"{folder} is no checkpoint of T5X: its file 'checkpoint' holds no 'optimizer'"
        )
    rest = {k: v for k, v in content.items() if k not in ("optimizer", "version")}
    found, places = {}, {}
    for name, leaf in flatten({**rest, **content["optimizer"]}).items():
        if not name.startswith(prefix):
            continue
        if isinstance(leaf, Mapping):
            store = leaf.get("kvstore")
            path = store.get("path") if isinstance(store, Mapping) else leaf.get("path")
            places[name] = (leaf["driver"], str(path).strip("/"))
        elif isinstance(leaf, np.ndarray | int | float):
            x = np.asarray(leaf)
            found[name] = make_array(folder, name, x, x.dtype, x.shape)
    return {**found, **_open_arrays(folder, _kvstore(folder), places, False, complete)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by path; what describes an array of tensorstore is a leaf too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and not {"driver", "metadata"} <= value.keys():
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _unpack(content: bytes) -> Any:
    """What Flax has packed by msgpack: arrays are extensions, large ones are in chunks."""
    import msgpack

    def array(code: int, data: bytes) -> Any:
        if code not in (1, 3):  # an array, a scalar
            return None
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        dtype = np.dtype(ml_dtypes.bfloat16 if dtype == b"bfloat16" else dtype.decode())
        return np.frombuffer(buffer, dtype).reshape(shape)

    def whole(node: dict) -> Any:
        if "__msgpack_chunked_array__" not in node:
            return node
        shape, chunks = (
            [node[part][str(i)] for i in range(len(node[part]))] for part in ("shape", "chunks")
        )
        return np.concatenate(chunks).reshape(shape)

    return msgpack.unpackb(content, ext_hook=array, object_hook=whole, raw=False)


def _open_arrays(
    folder: epath.Path,
    base: Mapping[str, Any],
    arrays: Mapping[str, tuple[str, str]],
    writes_all: bool,
    complete: bool,
) -> dict[str, SavedArray]:
    """Opens arrays, of whose elements none is read.

    Args:
      folder: the checkpoint.
      base: the store that they are all in.
      arrays: name -> driver and place in the store.
      writes_all: whether chunks were saved even where they hold nothing but the fill value.
      complete: whether to look that all their chunks are there.
    """
    context = ts.Context({"cache_pool": {"total_bytes_limit": PART_BYTES}})
    try:
        store = ts.KvStore.open(dict(base), context=context).result()
        listed = store.list().result() if complete and arrays else []
    except (ValueError, OSError) as e:
        raise damaged(folder, f"its list of arrays can't be read ({short(e)})") from e
    places = {path for _, path in arrays.values()}
    keys = (k.decode("utf-8", "replace") for k in listed)
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
        if complete and there < expected and (writes_all or x.fill_value is None):
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
        folder=folder,
    )


def _kvstore(folder: epath.Path) -> dict[str, Any]:
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
