"""Checkpoints as they lie on disk: their weights, each with its mask and record, read part by part.

`checkpoint_arrays` reads the arrays, `record` reads `sparsity.json`; this brings them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from t5x_sparsity.artifacts.checkpoint_arrays import (
    CheckpointError,
    SavedArray,
    damaged,
    is_tensorflow,
    layout_of,
    saved_arrays,
    short,
    whole_index,
)
from t5x_sparsity.artifacts.record import RECORD, WeightRecord, read_record
from t5x_sparsity.core.matrix_axes import MatrixAxes, matrix_axes

_NAME = re.compile(r"checkpoint_(\d+)")
# what Orbax and T5X call a save that is under way, or was killed
_TEMPORARY = re.compile(r"checkpoint_(\d+)\.(orbax-checkpoint-tmp|tmp-|tmp$)")
_MASKS, _WEIGHTS, _SPARSITY = "state/sparsity/masks/", "target/", "state/sparsity/"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedWeight:
    """A weight of a checkpoint and all that is known of it; no value is read yet.

    Attributes:
      path: such as 'decoder/layers_0/mlp/wi_0/kernel'.
      array: its values.
      mask: its stored mask, uint8, packed (see core.packing); None where it has none.
      record: what sparsity.json says of it; nothing where that is of a weight of another shape.
      axes: how it is a stack of matrices, by the record where that knows the axes.
      zeros_are_pruned: whether its own zeros stand for a mask: it is a matrix, and no weight of the
        checkpoint has a mask.
    """

    path: str
    array: SavedArray
    mask: SavedArray | None
    record: WeightRecord
    axes: MatrixAxes
    zeros_are_pruned: bool

    def kept(self, x: np.ndarray, index: Sequence[slice] = ()) -> np.ndarray:
        """Which weights are kept: bool, by the mask, else by `zeros_are_pruned`, else all.

        Args:
          x: the values of the weight at `index`.
          index: as of `read_mask`.

        Raises:
          CheckpointError: see `read_mask`.
        """
        if self.mask is not None:
            return self.read_mask(index)
        return x != 0 if self.zeros_are_pruned else np.ones(x.shape, bool)

    def read_mask(self, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads the mask, or a part of it: bool, True where the weight is kept.

        Args:
          index: one slice per axis of the weight, with no step; axes left out are read whole.

        Raises:
          CheckpointError: the mask is damaged, or doesn't fit the weight.
        """
        from t5x_sparsity.core.packing import stored_axis  # here, as it imports JAX

        assert self.mask is not None, f"{self.path} has no mask"
        stored, shape = self.mask, self.array.shape
        damage = f"{stored.folder}: the mask of {self.path} is damaged"
        try:
            axis = stored_axis(stored.shape, shape)
        except ValueError as e:
            raise CheckpointError(f"{damage}: {e}") from e
        at = list(whole_index(index, shape))
        if axis is None:
            return stored.read(at) != 0
        if stored.dtype != np.uint8:
            raise CheckpointError(f"{damage}: it is packed, but of {stored.dtype.name}, not uint8")
        wanted = at[axis]
        first, last = wanted.start // 8, -(-wanted.stop // 8)
        at[axis] = slice(first, last)
        bits = np.unpackbits(stored.read(at), axis=axis, bitorder="little")
        inner = [slice(None)] * len(shape)
        inner[axis] = slice(wanted.start - 8 * first, wanted.stop - 8 * first)
        return bits[tuple(inner)].view(bool)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
      path: its folder.
      step: of training.
      layout: 'orbax' or 't5x' (T5X's own older one).
      arrays: all arrays by name, such as 'target/decoder/...' or 'state/sparsity/masks/...'.
      record: what sparsity.json next to it says, by path of the weight; {} if there is none. For a
        link to a checkpoint, what isn't next to the link is looked for next to the checkpoint.
      config_gin: path of the run's config.gin, None if there is none; likewise.
      skipped: names of newer folders in MODEL_DIR that hold no complete checkpoint.
    """

    path: str
    step: int
    layout: str
    arrays: Mapping[str, SavedArray]
    record: Mapping[str, WeightRecord]
    config_gin: str | None = None
    skipped: Sequence[str] = ()

    @functools.cached_property
    def weights(self) -> Mapping[str, SavedWeight]:
        """The weights by path, each with its mask and record."""
        masks = self.under(_MASKS)
        found = {}
        for path, array in self.under(_WEIGHTS).items():
            record = self.record.get(path, WeightRecord())
            if record.shape not in (None, array.shape):
                record = WeightRecord()
            axes = matrix_axes(len(array.shape), record.stack_axes or (), record.axes)
            found[path] = SavedWeight(
                path=path,
                array=array,
                mask=masks.get(path),
                record=record,
                axes=axes,
                zeros_are_pruned=not masks and bool(axes.inputs and axes.outputs),
            )
        return found

    @property
    def masked(self) -> list[SavedWeight]:
        """The weights that have a mask."""
        return [w for w in self.weights.values() if w.mask is not None]

    @property
    def slots(self) -> Mapping[str, Sequence[SavedArray]]:
        """What else the method keeps for every weight, by the slot's name, such as 'dense'."""
        found: dict[str, list[SavedArray]] = {}
        for name, array in self.under(_SPARSITY).items():
            slot, _, path = name.partition("/")
            if path and slot != "masks":
                found.setdefault(slot, []).append(array)
        return found

    def under(self, prefix: str) -> dict[str, SavedArray]:
        """The arrays whose names begin with `prefix`, by what follows it."""
        return {k[len(prefix) :]: x for k, x in self.arrays.items() if k.startswith(prefix)}


def open_checkpoint(path: str) -> Checkpoint:
    """Finds what a checkpoint holds; no weight is read.

    Args:
      path: a folder checkpoint_<step>, or the MODEL_DIR above it, whose last complete checkpoint is
        then taken.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, incomplete, or of another
        kind.
    """
    path = absolute(path)
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
    skipped: tuple[str, ...] = ()
    if layout_of(folder) is None and not _NAME.fullmatch(folder.name):
        folder, skipped = _last_checkpoint(folder)
    layout = layout_of(folder)
    if layout is None and is_tensorflow(folder):
        raise CheckpointError(_tensorflow(folder))
    arrays = saved_arrays(folder)
    if not any(name.startswith(_WEIGHTS) for name in arrays):
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run: it holds no weights ('target/...')"
        )
    alone = [
        name
        for name in arrays
        if name.startswith(_MASKS) and _WEIGHTS + name.removeprefix(_MASKS) not in arrays
    ]
    if alone:
        raise damaged(folder, f"it holds {alone[0]}, but no weight of that name")
    record, config = _next_to(folder, RECORD), _next_to(folder, "config.gin")
    return Checkpoint(
        path=str(folder),
        step=_step(folder, arrays),
        layout=layout,
        arrays=arrays,
        record={} if record is None else _record(record),
        config_gin=None if config is None else str(config),
        skipped=skipped,
    )


def absolute(path: str) -> str:
    """A local path as an absolute one, without '~'; a URL as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _next_to(folder: epath.Path, name: str) -> epath.Path | None:
    """A file in the run's folder: next to the checkpoint, or next to what that is a link to."""
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


def _last_checkpoint(model_dir: epath.Path) -> tuple[epath.Path, tuple[str, ...]]:
    """The last complete checkpoint, and the names of incomplete ones after it."""
    names = [p.name for p in model_dir.iterdir()]
    # other names, such as checkpoint_200_good, are no run's
    steps = {n: int(m[1]) for n in names if (m := _NAME.fullmatch(n) or _TEMPORARY.match(n))}
    complete = [n for n in steps if _NAME.fullmatch(n) and layout_of(model_dir / n)]
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
    if is_tensorflow(model_dir):
        raise CheckpointError(_tensorflow(model_dir))
    hint, run = "give one of these", model_dir.resolve().parent
    with contextlib.suppress(OSError):
        if any(_NAME.fullmatch(p.name) for p in run.iterdir()):
            hint = f"{run} has some"
    raise CheckpointError(
        f"{model_dir} holds no checkpoint: neither is it one, nor has it a folder "
        f"checkpoint_<step>; {hint}"
    )


def _step(folder: epath.Path, arrays: Mapping[str, SavedArray]) -> int:
    leaf, match = arrays.get("state/step"), _NAME.fullmatch(folder.name)
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
