"""Checkpoints as they lie on disk, read part by part: no model, no host, never all at once.

Both layouts are read: Orbax's, which T5X and the embedded host write (`checkpoint_<step>/state/`),
and T5X's own older one (`checkpoint_<step>/checkpoint`, msgpack, beside a folder an array).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5x_sparsity.artifacts.checkpoint_arrays import (
    CheckpointError,
    SavedArray,
    damaged,
    kvstore_of,
    make_array,
    open_arrays,
    short,
    whole_index,
)
from t5x_sparsity.artifacts.record import RECORD, WeightRecord, read_record
from t5x_sparsity.core.matrix_axes import MatrixAxes, matrix_axes

_NAME = re.compile(r"checkpoint_(\d+)")
# what Orbax and T5X call a save that is under way, or was killed
_TEMPORARY = re.compile(r"checkpoint_(\d+)\.(orbax-checkpoint-tmp|tmp-|tmp$)")
_MASKS, _WEIGHTS, _SPARSITY = "state/sparsity/masks/", "target/", "state/sparsity/"
_NO_ARRAY = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "str")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
      path: its folder.
      step: of training.
      layout: 'orbax' or 't5x' (T5X's own older one).
      leaves: all arrays by name, such as 'target/decoder/...' or 'state/sparsity/masks/...'.
      record: what sparsity.json beside it says, by path of the weight; {} if there is none. Of a
        link to a checkpoint, what isn't beside the link is looked for beside the checkpoint.
      config_gin: path of the run's config.gin, None if there is none; likewise.
      passed_over: names of newer folders in MODEL_DIR that hold no complete checkpoint.
    """

    path: str
    step: int
    layout: str
    leaves: Mapping[str, SavedArray]
    record: Mapping[str, WeightRecord]
    config_gin: str | None = None
    passed_over: Sequence[str] = ()

    @functools.cached_property
    def weights(self) -> Mapping[str, SavedArray]:
        """The weights by path, such as 'decoder/layers_0/mlp/wi_0/kernel'."""
        return self._under(_WEIGHTS)

    @functools.cached_property
    def masks(self) -> Mapping[str, SavedArray]:
        """The stored masks by path of their weight: uint8, packed (see core.packing)."""
        return self._under(_MASKS)

    @functools.cached_property
    def slots(self) -> Mapping[str, Sequence[SavedArray]]:
        """What else the method keeps for every weight, by the slot's name, such as 'dense'."""
        found: dict[str, list[SavedArray]] = {}
        for name, leaf in self._under(_SPARSITY).items():
            slot, _, path = name.partition("/")
            if path and slot != "masks":
                found.setdefault(slot, []).append(leaf)
        return found

    def _under(self, prefix: str) -> dict[str, SavedArray]:
        return {k[len(prefix) :]: x for k, x in self.leaves.items() if k.startswith(prefix)}

    def stack_axes(self, path: str) -> tuple[int, ...]:
        """The axes along which a weight is a stack of slices; () where there are none or no record.

        Whether the record says so is `knows_stack_axes`.
        """
        return self.record_of(path).stack_axes or ()

    def knows_stack_axes(self, path: str) -> bool:
        """Whether the record says which axes of the weight are stacked."""
        return self.record_of(path).stack_axes is not None

    def axes(self, path: str) -> tuple[str | None, ...] | None:
        """The logical names of a weight's axes; None where the record doesn't have them."""
        return self.record_of(path).axes

    def matrix_axes(self, path: str) -> MatrixAxes:
        """How a weight is a stack of matrices, by the record where it knows the axes."""
        ndim = len(self.weights[path].shape)
        return matrix_axes(ndim, self.stack_axes(path), self.axes(path))

    def zeros_are_pruned(self, path: str) -> bool:
        """Whether a weight's own zeros stand for a mask: it is a matrix, and nothing has a mask."""
        axes = self.matrix_axes(path)
        return not self.masks and bool(axes.inputs and axes.outputs)

    def record_of(self, path: str) -> WeightRecord:
        """What the record says of a weight; nothing where that is of a weight of another shape."""
        entry, weight = self.record.get(path, WeightRecord()), self.weights.get(path)
        fits = weight is None or entry.shape in (None, weight.shape)
        return entry if fits else WeightRecord()

    def kept(self, path: str, x: np.ndarray, index: Sequence[slice] = ()) -> np.ndarray:
        """Which weights are kept: bool, by the mask, else by `zeros_are_pruned`, else all.

        Args:
          path: of the weight.
          x: its values, those of `index`.
          index: as of `read_mask`.

        Raises:
          CheckpointError: see `read_mask`.
        """
        if path in self.masks:
            return self.read_mask(path, index)
        return x != 0 if self.zeros_are_pruned(path) else np.ones(x.shape, bool)

    def read_mask(self, path: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads a mask, or a part of it: bool, True where the weight is kept.

        Args:
          path: of the weight.
          index: a slice an axis of the weight, with no step; axes left out are read whole.

        Raises:
          CheckpointError: the mask is damaged, or doesn't fit its weight.
        """
        from t5x_sparsity.core.packing import stored_axis

        stored, shape = self.masks[path], self.weights[path].shape
        try:
            axis = stored_axis(stored.shape, shape)
        except ValueError as e:
            raise CheckpointError(f"{self.path}: the mask of {path} is damaged: {e}") from e
        at = list(whole_index(index, shape))
        if axis is None:
            return stored.read(at) != 0
        if stored.dtype != np.uint8:
            raise CheckpointError(
                f"{self.path}: the mask of {path} is damaged: it is packed, but of "
                f"{stored.dtype.name}, not uint8"
            )
        wanted = at[axis]
        first, last = wanted.start // 8, -(-wanted.stop // 8)
        at[axis] = slice(first, last)
        bits = np.unpackbits(stored.read(at), axis=axis, bitorder="little")
        inner = [slice(None)] * len(shape)
        inner[axis] = slice(wanted.start - 8 * first, wanted.stop - 8 * first)
        return bits[tuple(inner)].view(bool)


def open_checkpoint(path: str) -> Checkpoint:
    """Finds what a checkpoint holds; no weight is read.

    Args:
      path: a folder checkpoint_<step>, or the MODEL_DIR above it, whose last complete checkpoint is
        then taken.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, incomplete, or of another
        kind.
    """
    path = _absolute(path)
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(
            f"{path!a} can't be read: it is not UTF-8, as tensorstore needs paths to be; rename it"
        ) from e
    try:
        return _open(epath.Path(path))
    except OSError as e:
        raise CheckpointError(f"{path} can't be read ({type(e).__name__}: {short(e)})") from e


def _open(folder: epath.Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(_no_folder(folder))
    if _TEMPORARY.match(folder.name):
        raise CheckpointError(
            f"{folder} is half-written: its name is that of a save that was under way or was "
            "killed; give a folder checkpoint_<step>"
        )
    passed_over: tuple[str, ...] = ()
    if _layout(folder) is None and not _NAME.fullmatch(folder.name):
        folder, passed_over = _last_checkpoint(folder)
    layout = _layout(folder)
    if layout is None:
        if _is_tensorflow(folder):
            raise CheckpointError(_tensorflow(folder))
        raise CheckpointError(
            f"{folder} is no whole checkpoint: it holds neither 'state/' nor 'checkpoint'; give "
            "another checkpoint_<step>"
        )
    leaves = _orbax_leaves(folder) if layout == "orbax" else _t5x_leaves(folder)
    if not any(name.startswith(_WEIGHTS) for name in leaves):
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run: it holds no weights ('target/...')"
        )
    alone = [
        name
        for name in leaves
        if name.startswith(_MASKS) and _WEIGHTS + name.removeprefix(_MASKS) not in leaves
    ]
    if alone:
        raise damaged(folder, f"it holds {alone[0]}, but no weight of that name")
    record, config = _beside(folder, RECORD), _beside(folder, "config.gin")
    return Checkpoint(
        path=str(folder),
        step=_step(folder, leaves),
        layout=layout,
        leaves=leaves,
        record={} if record is None else _record(record),
        config_gin=None if config is None else str(config),
        passed_over=passed_over,
    )


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _beside(folder: epath.Path, name: str) -> epath.Path | None:
    """A file in the run's folder: beside the checkpoint, or beside what that is a link to."""
    real = folder if "://" in str(folder) else epath.Path(os.path.realpath(folder))
    places = (place.parent / name for place in (folder, real))
    return next((place for place in places if place.exists()), None)


def _no_folder(path: epath.Path) -> str:
    if epath.Path(f"{path}.index").exists():
        return _tensorflow(path)
    if not path.exists():
        return f"{path} doesn't exist; give a folder checkpoint_<step>, or a MODEL_DIR"
    return f"{path} is a file; give a folder checkpoint_<step>, or the MODEL_DIR above it"


def _tensorflow(path: epath.Path) -> str:
    return (
        f"{path} is a TensorFlow checkpoint, which is not read here; convert it by T5X's "
        "convert_tf_checkpoint first"
    )


def _is_tensorflow(folder: epath.Path) -> bool:
    return any(p.name.endswith(".index") for p in folder.iterdir())


def _layout(folder: epath.Path) -> str | None:
    if (folder / "state").is_dir():
        return "orbax"
    # TensorFlow calls a file of text by the same name
    return "t5x" if (folder / "checkpoint").is_file() and not _is_tensorflow(folder) else None


def _last_checkpoint(model_dir: epath.Path) -> tuple[epath.Path, tuple[str, ...]]:
    """The last complete checkpoint, and the names of incomplete ones after it."""
    names = [p.name for p in model_dir.iterdir()]
    # other names, such as checkpoint_200_good, are no run's
    steps = {n: int(m[1]) for n in names if (m := _NAME.fullmatch(n) or _TEMPORARY.match(n))}
    complete = [n for n in steps if _NAME.fullmatch(n) and _layout(model_dir / n)]
    if complete:
        last = max(complete, key=steps.__getitem__)
        newer = tuple(sorted(n for n in steps if steps[n] >= steps[last] and n != last))
        return model_dir / last, newer
    if steps:
        shown = min(steps, key=lambda n: (-steps[n], n))
        raise CheckpointError(
            f"{model_dir} holds no complete checkpoint: {shown} is half-written, of a save that "
            "was under way or was killed"
        )
    if _is_tensorflow(model_dir):
        raise CheckpointError(_tensorflow(model_dir))
    hint, run = "give one of these", model_dir.resolve().parent
    with contextlib.suppress(OSError):
        if any(_NAME.fullmatch(p.name) for p in run.iterdir()):
            hint = f"{run} has some"
    raise CheckpointError(
        f"{model_dir} holds no checkpoint: neither is it one, nor has it a folder "
        f"checkpoint_<step>; {hint}"
    )


def _orbax_leaves(folder: epath.Path) -> dict[str, SavedArray]:
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
    base = kvstore_of(state)
    if metadata.get("use_ocdbt", (state / "manifest.ocdbt").exists()):
        if not (state / "manifest.ocdbt").exists():
            raise damaged(folder, "the file state/manifest.ocdbt is missing")
        base = {"driver": "ocdbt", "base": base}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    arrays = {"/".join(keys): (driver, ".".join(keys)) for keys in names}
    writes_all = bool(metadata.get("store_array_data_equal_to_fill_value"))
    return open_arrays(folder, base, arrays, writes_all)


def _t5x_leaves(folder: epath.Path) -> dict[str, SavedArray]:
    from flax import serialization

    try:
        content = serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    except Exception as e:  # what msgpack raises on any bytes
        raise damaged(
            folder, f"the file 'checkpoint' is cut or not T5X's ({type(e).__name__}: {short(e)})"
        ) from e
    if not isinstance(content, Mapping) or not isinstance(content.get("optimizer"), Mapping):
        raise CheckpointError(
            f"{folder} is no checkpoint of T5X: its file 'checkpoint' holds no 'optimizer'"
        )
    rest = {k: v for k, v in content.items() if k not in ("optimizer", "version")}
    found, arrays = {}, {}
    for name, leaf in _flatten({**rest, **content["optimizer"]}):
        if isinstance(leaf, Mapping):
            store = leaf.get("kvstore")
            path = store.get("path") if isinstance(store, Mapping) else leaf.get("path")
            arrays[name] = (leaf["driver"], str(path).strip("/"))
        elif isinstance(leaf, np.ndarray | np.generic | int | float):
            x = np.asarray(leaf)
            found[name] = make_array(folder, name, x, x.dtype, x.shape)
    return {**found, **open_arrays(folder, kvstore_of(folder), arrays, False)}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and not {"driver", "metadata"} <= value.keys():
            yield from _flatten(value, f"{name}/")
        else:
            yield name, value


def _step(folder: epath.Path, leaves: Mapping[str, SavedArray]) -> int:
    leaf, match = leaves.get("state/step"), _NAME.fullmatch(folder.name)
    if leaf is not None:
        if leaf.shape or leaf.dtype.kind not in "iuf":
            raise damaged(
                folder, f"state/step is {leaf.dtype.name} of shape {leaf.shape}, not a number"
            )
        step = leaf.read().item()
        if not (math.isfinite(step) and step == int(step) >= 0):
            raise damaged(folder, f"state/step is {step}, which is no step")
        return int(step)
    if match is None:
        raise CheckpointError(f"{folder} doesn't say its step; name it checkpoint_<step>")
    return int(match[1])


def _record(path: epath.Path) -> dict[str, WeightRecord]:
    try:
        return read_record(path)
    except ValueError as e:
        raise CheckpointError(
            f"{path} is damaged ({short(e)}); move it away to go on without it"
        ) from e
