"""Which arrays a checkpoint holds, and their values part by part: no model, no host.

Both layouts are read: Orbax's, which T5X and the embedded host write (`checkpoint_<step>/state/`),
and T5X's own older one (`checkpoint_<step>/checkpoint`, msgpack, next to one folder per array).
"""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

# The most bytes of an array that are read at once, where its chunks allow it.
PART_BYTES = 64 * 2**20

_METADATA_KEYS = (".zarray", ".zattrs", ".zgroup", "zarr.json")
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "str")

NAME = re.compile(r"checkpoint_(\d+)")
MASKS, WEIGHTS = "state/sparsity/masks/", "target/"

Index = tuple[slice, ...]


class CheckpointError(ValueError):
    """A checkpoint can't be read: there is none, or it is damaged or of another kind."""


@dataclasses.dataclass(frozen=True, eq=False)
class SavedArray:
    """An array of a checkpoint, not yet read."""

    folder: epath.Path  #: of the checkpoint
    name: str  #: of the leaf, such as 'target/decoder/layers_0/mlp/wi_0/kernel'
    source: np.ndarray | ts.TensorStore = dataclasses.field(repr=False)  #: the values
    chunk_shape: tuple[int, ...]  #: of the pieces that it is saved in, each decoded as a whole

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.source.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the array; bfloat16 is that of ml_dtypes."""
        dtype = self.source.dtype
        return dtype.numpy_dtype if isinstance(dtype, ts.dtype) else dtype

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory."""
        return self.size * self.dtype.itemsize

    def read(self, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads a part: one slice per axis, with no step; axes left out are read whole.

        Raises:
          CheckpointError: the file is damaged.
        """
        return self._read(self.source, whole_index(index, self.shape))

    def parts(
        self, index: Sequence[slice] = (), max_bytes: int | None = None
    ) -> Iterator[tuple[Index, np.ndarray]]:
        """Reads the array, or what is in `index`, piece by piece.

        Pieces don't overlap and follow the chunks, so that none is decoded twice. They have at most
        `max_bytes`, or PART_BYTES; an element is the least.

        Yields:
          Where the piece is, a slice with start and stop for every axis, and the piece.
        """
        region = whole_index(index, self.shape)
        limit = max(1, (PART_BYTES if max_bytes is None else max_bytes) // self.dtype.itemsize)
        lengths = _piece_shape(self.shape, self.chunk_shape, region, limit)
        source, chunk_size = self.source, math.prod(self.chunk_shape)
        if isinstance(source, ts.TensorStore) and math.prod(lengths) < chunk_size:
            # keeps the one chunk that several pieces are cut from, rather than decode it for each
            cached = chunk_size * self.dtype.itemsize + PART_BYTES
            context = ts.Context({"cache_pool": {"total_bytes_limit": cached}})
            spec = source.spec(retain_context=False, minimal_spec=True)
            source = ts.open(spec, open=True, read=True, context=context).result()
        # chunk by chunk, or by several whole ones
        outer = [max(n, c) for n, c in zip(lengths, self.chunk_shape, strict=True)]
        for whole in itertools.product(*map(cuts, region, outer)):
            inner = (cuts(s, n, s.start) for s, n in zip(whole, lengths, strict=True))
            for at in itertools.product(*inner):
                yield at, self._read(source, at)

    def _read(self, source: np.ndarray | ts.TensorStore, index: Index) -> np.ndarray:
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

    def size() -> int:
        return math.prod(map(min, lengths, wanted))

    for axis in range(len(lengths)):
        if size() > limit:
            own = min(lengths[axis], wanted[axis])
            lengths[axis] = max(1, own * limit // size())
    for axis in reversed(range(len(lengths))):
        if lengths[axis] >= wanted[axis]:
            continue
        if lengths[axis] < min(chunk[axis], shape[axis]):
            break
        lengths[axis] *= max(1, min(limit // size(), -(-wanted[axis] // lengths[axis])))
    return lengths


def cuts(region: slice, length: int, origin: int = 0) -> list[slice]:
    """`region`, cut at the multiples of `length` from `origin` on."""
    first = region.start + length - (region.start - origin) % length
    ends = [region.start, *range(first, region.stop, length), region.stop]
    return [slice(a, b) for a, b in itertools.pairwise(ends) if a < b]


def saved_arrays(
    folder: epath.Path, layout: str, *, prefix: str = "", complete: bool = True
) -> dict[str, SavedArray]:
    """The arrays of a checkpoint by name; no values are read.

    Args:
      folder: of the checkpoint.
      layout: 'orbax' or 't5x', see `checkpoint.layout_of`.
      prefix: of the names of the arrays that are wanted; others are not opened.
      complete: whether to look that all their chunks are there, for which all files are listed.

    Raises:
      CheckpointError: it is damaged.
    """
    content = _orbax_content(folder) if layout == "orbax" else _t5x_content(folder)
    leaves = {name: leaf for name, leaf in content.leaves.items() if name.startswith(prefix)}
    small = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    found = {name: SavedArray(folder, name, x, x.shape) for name, x in small.items()}
    places = {name: leaf for name, leaf in leaves.items() if name not in small}
    context = ts.Context({"cache_pool": {"total_bytes_limit": PART_BYTES}})
    try:
        store = ts.KvStore.open(content.store, context=context).result()
        listed = store.list().result() if complete and places else []
    except (ValueError, OSError) as e:
        raise damaged(folder, f"its list of arrays can't be read ({short(e)})") from e
    paths = {path for _, path in places.values()}
    keys = (k.decode("utf-8", "replace") for k in listed)
    chunks = Counter(_path_of(k, paths) for k in keys if not k.endswith(_METADATA_KEYS))
    opening = {}
    for name, (driver, path) in places.items():
        kvstore = {**content.store, "path": f"{content.store.get('path', '')}{path}/"}
        spec = {"driver": driver, "kvstore": kvstore}
        opening[name] = ts.open(spec, open=True, read=True, context=context)
    for name, future in opening.items():
        try:
            x = future.result()
        except (ValueError, OSError) as e:
            raise damaged(folder, f"{name} is missing or damaged ({short(e)})") from e
        grid = tuple(x.chunk_layout.write_chunk.shape or x.shape)
        expected = math.prod(-(-n // max(1, c)) for n, c in zip(x.shape, grid, strict=True))
        there = chunks[places[name][1]]
        # a chunk that is not there reads as the fill value: zeros, which nobody would notice
        if complete and there < expected and (content.writes_all or x.fill_value is None):
            raise damaged(folder, f"{expected - there} of {expected} chunks of {name} are missing")
        found[name] = SavedArray(folder, name, x, grid)
    return found


def check_names(folder: epath.Path, arrays: Mapping[str, SavedArray]) -> None:
    """Raises CheckpointError unless there are weights, and one for every mask."""
    if not any(name.startswith(WEIGHTS) for name in arrays):
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run: it holds no weights ('target/...')"
        )
    for name in arrays:
        if name.startswith(MASKS) and WEIGHTS + name.removeprefix(MASKS) not in arrays:
            raise damaged(folder, f"it holds {name}, but no weight of that name")


def saved_step(folder: epath.Path, arrays: Mapping[str, SavedArray]) -> int:
    """The step that the arrays of a checkpoint say, else its name."""
    leaf = arrays.get("state/step")
    if leaf is not None:
        if leaf.shape or leaf.dtype.kind not in "iuf":
            raise damaged(
                folder, f"state/step is {leaf.dtype.name} of shape {leaf.shape}, not a number"
            )
        step = leaf.read().item()
        if not (math.isfinite(step) and step == int(step) >= 0):
            raise damaged(folder, f"state/step is {step}, which is no step")
        return int(step)
    named = NAME.fullmatch(folder.name)
    if named is None:
        raise CheckpointError(f"{folder} doesn't say its step; name it checkpoint_<step>")
    return int(named[1])


class _Content(NamedTuple):
    """What a checkpoint says that it holds."""

    store: dict[str, Any]  # of tensorstore, in which all arrays are
    leaves: dict[str, Any]  # name -> (driver, path in the store), or a small array itself
    writes_all: bool  # whether chunks were saved even of nothing but the fill value


def _orbax_content(folder: epath.Path) -> _Content:
    state = folder / "state"
    try:
        metadata = json.loads((state / "_METADATA").read_text())
        names = [
            [str(k["key"]) for k in leaf["key_metadata"]]
            for leaf in metadata["tree_metadata"].values()
            if not leaf["value_metadata"].get("skip_deserialize")
            and leaf["value_metadata"].get("value_type") not in _NO_ARRAY
        ]
    except FileNotFoundError as e:
        raise damaged(folder, "the file state/_METADATA is missing") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise damaged(folder, f"the file state/_METADATA is cut ({short(e)})") from e
    store, has_manifest = _kvstore(state), (state / "manifest.ocdbt").exists()
    if metadata.get("use_ocdbt", has_manifest):
        if not has_manifest:
            raise damaged(folder, "the file state/manifest.ocdbt is missing")
        store = {"driver": "ocdbt", "base": store}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    leaves = {"/".join(keys): (driver, ".".join(keys)) for keys in names}
    return _Content(store, leaves, bool(metadata.get("store_array_data_equal_to_fill_value")))


def _t5x_content(folder: epath.Path) -> _Content:
    try:
        content = _unpack((folder / "checkpoint").read_bytes())
    except Exception as e:  # what msgpack raises on any bytes
        raise damaged(
            folder, f"the file 'checkpoint' is cut or not T5X's ({type(e).__name__}: {short(e)})"
        ) from e
    if not isinstance(content, Mapping) or not isinstance(content.get("optimizer"), Mapping):
        raise CheckpointError(
            f"{folder} is no checkpoint of T5X: its file 'checkpoint' holds no 'optimizer'"
        )
    rest = {k: v for k, v in content.items() if k not in ("optimizer", "version")}
    leaves: dict[str, Any] = {}
    for name, leaf in flatten({**rest, **content["optimizer"]}).items():
        if isinstance(leaf, Mapping):
            store = leaf.get("kvstore")
            path = store.get("path") if isinstance(store, Mapping) else leaf.get("path")
            leaves[name] = (leaf["driver"], str(path).strip("/"))
        elif isinstance(leaf, np.ndarray | int | float):
            leaves[name] = np.asarray(leaf)
    return _Content(_kvstore(folder), leaves, writes_all=False)


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


def _path_of(key: str, paths: Collection[str]) -> str | None:
    """The path of the array that a key of a store belongs to."""
    folders = itertools.accumulate(key.split("/"), "{}/{}".format)
    return next((f for f in folders if f in paths), None)


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
