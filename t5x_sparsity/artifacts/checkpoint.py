"""Checkpoints as they lie on disk: their weights, each with its mask and record, read part by part.

`checkpoint_arrays` reads the arrays, `record` reads `sparsity.json`; this brings them together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from t5x_sparsity.artifacts.checkpoint_arrays import (
    SavedArray,
    damaged,
    saved_arrays,
    short,
    whole_index,
)
from t5x_sparsity.artifacts.checkpoint_folders import CheckpointError, find_checkpoint
from t5x_sparsity.artifacts.record import RECORD, WeightRecord, read_record
from t5x_sparsity.core.matrix_axes import MatrixAxes, matrix_axes

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
        stored, at = self.mask, list(whole_index(index, self.array.shape))
        damage = f"{stored.folder}: the mask of {self.path} is damaged"
        try:
            axis = stored_axis(stored.shape, self.array.shape)
        except ValueError as e:
            raise CheckpointError(f"{damage}: {e}") from e
        if axis is None:
            return stored.read(at) != 0
        if stored.dtype != np.uint8:
            raise CheckpointError(f"{damage}: it is packed, but of {stored.dtype.name}, not uint8")
        first, last = at[axis].start // 8, -(-at[axis].stop // 8)
        inner = slice(at[axis].start - 8 * first, at[axis].stop - 8 * first)
        at[axis] = slice(first, last)
        bits = np.unpackbits(stored.read(at), axis=axis, bitorder="little").view(bool)
        return bits[(*[slice(None)] * axis, inner)]


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


def sparsity(kept: int, size: int) -> float:
    """Share of weights pruned, in [0, 1]; 0 where there are none."""
    return 1 - kept / size if size else 0.0


def open_checkpoint(path: str) -> Checkpoint:
    """Finds what a checkpoint holds; no weight is read.

    Args:
      path: a folder checkpoint_<step>, or the MODEL_DIR above it, whose last complete checkpoint is
        then taken.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, incomplete, or of another
        kind.
    """
    try:
        folder, layout, step, skipped = find_checkpoint(path)
        arrays = saved_arrays(folder, layout)
        _check_names(folder, arrays)
        config = _next_to(folder, "config.gin")
        return Checkpoint(
            path=str(folder),
            step=_step(folder, arrays, step),
            layout=layout,
            arrays=arrays,
            record=_record(_next_to(folder, RECORD)),
            config_gin=None if config is None else str(config),
            skipped=skipped,
        )
    except OSError as e:
        raise CheckpointError(f"{path} can't be read ({type(e).__name__}: {short(e)})") from e


def _check_names(folder: epath.Path, arrays: Mapping[str, SavedArray]) -> None:
    if not any(name.startswith(_WEIGHTS) for name in arrays):
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run: it holds no weights ('target/...')"
        )
    for name in arrays:
        if name.startswith(_MASKS) and _WEIGHTS + name.removeprefix(_MASKS) not in arrays:
            raise damaged(folder, f"it holds {name}, but no weight of that name")


def _next_to(folder: epath.Path, name: str) -> epath.Path | None:
    """A file in the run's folder: next to the checkpoint, or next to what that is a link to."""
    real = folder if "://" in str(folder) else epath.Path(os.path.realpath(folder))
    places = (place.parent / name for place in (folder, real))
    return next((place for place in places if place.exists()), None)


def _step(folder: epath.Path, arrays: Mapping[str, SavedArray], named: int | None) -> int:
    """What the checkpoint says, else its name."""
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
    if named is None:
        raise CheckpointError(f"{folder} doesn't say its step; name it checkpoint_<step>")
    return named


def _record(path: epath.Path | None) -> dict[str, WeightRecord]:
    try:
        return {} if path is None else read_record(path)
    except ValueError as e:
        raise CheckpointError(
            f"{path} is damaged ({short(e)}); move it away to go on without it"
        ) from e
