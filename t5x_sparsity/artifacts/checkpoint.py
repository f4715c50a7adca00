"""Checkpoints as they lie on disk: their weights, each with its mask and record, read part by part.

`checkpoint_arrays` reads the arrays, `record` reads `sparsity.json`; this brings them together.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from t5x_sparsity.artifacts.checkpoint_arrays import (
    MASKS,
    NAME,
    WEIGHTS,
    CheckpointError,
    SavedArray,
    check_names,
    saved_arrays,
    saved_step,
    short,
    whole_index,
)
from t5x_sparsity.artifacts.record import RECORD, WeightRecord, read_record
from t5x_sparsity.core.matrix_axes import MatrixAxes, matrix_axes

# what Orbax and T5X call a save that is under way, or was killed
_TEMPORARY = re.compile(r"checkpoint_(\d+)\.(orbax-checkpoint-tmp|tmp-|tmp$)")

_SPARSITY = "state/sparsity/"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SavedWeight:
    """A weight of a checkpoint and all that is known of it; no value is read yet."""

    path: str  #: such as 'decoder/layers_0/mlp/wi_0/kernel'
    array: SavedArray  #: its values
    mask: SavedArray | None  #: uint8, packed (see core.packing); None where it has none
    record: WeightRecord  #: what sparsity.json says of it, if that is of a weight of its shape
    axes: MatrixAxes  #: how it is a stack of matrices, by the record where that knows the axes
    #: whether its own zeros stand for a mask: it is a matrix, and no weight at all has a mask
    zeros_are_pruned: bool

    def kept(self, x: np.ndarray, index: Sequence[slice] = ()) -> np.ndarray:
        """Which of the values x at `index` are kept: bool, by the mask, else by x != 0, or all."""
        if self.mask is not None:
            return self.read_mask(index)
        return x != 0 if self.zeros_are_pruned else np.ones(x.shape, bool)

    def read_mask(self, index: Sequence[slice] = ()) -> np.ndarray:
        """Reads the mask, or the part at `index` of the weight: bool, True where it is kept.

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

    sparsity.json and config.gin are those next to it, or next to what it is a link to.
    """

    path: str  #: its folder
    step: int  #: of training
    layout: str  #: 'orbax' or 't5x' (T5X's own older one)
    #: by name, such as 'target/decoder/...' or 'state/sparsity/masks/...'
    arrays: Mapping[str, SavedArray]
    record: Mapping[str, WeightRecord]  #: what sparsity.json says, by path; {} if there is none
    config_gin: str | None = None  #: its path; None if there is none
    skipped: Sequence[str] = ()  #: newer folders in MODEL_DIR that hold no complete checkpoint

    @functools.cached_property
    def weights(self) -> Mapping[str, SavedWeight]:
        """The weights by path, each with its mask and record."""
        masks = self.under(MASKS)
        found = {}
        for path, array in self.under(WEIGHTS).items():
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


def absolute(path: str) -> str:
    """A local path as an absolute one, without '~'; a URL as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def layout_of(folder: epath.Path) -> str | None:
    """How a checkpoint is laid out: 'orbax' or 't5x'; None if the folder holds neither."""
    if (folder / "state").is_dir():
        return "orbax"
    # TensorFlow has a text file of the same name
    return "t5x" if (folder / "checkpoint").is_file() and not _is_tensorflow(folder) else None


def sparsity(kept: int, size: int) -> float:
    """Share of weights pruned, in [0, 1]; 0 where there are none."""
    return 1 - kept / size if size else 0.0


def open_checkpoint(path: str) -> Checkpoint:
    """Finds what a checkpoint holds; no weight is read.

    `path` is a folder checkpoint_<step>, or the MODEL_DIR above it for its last complete one.

    Raises:
      CheckpointError: there is no such checkpoint, or it is damaged, incomplete, or of another
        kind.
    """
    try:
        folder, layout, skipped = find_checkpoint(path)
        config, record = _next_to(folder, "config.gin"), _record(_next_to(folder, RECORD))
        arrays = saved_arrays(folder, layout)
        check_names(folder, arrays)
        return Checkpoint(
            path=str(folder),
            step=saved_step(folder, arrays),
            layout=layout,
            arrays=arrays,
            record=record,
            config_gin=None if config is None else str(config),
            skipped=skipped,
        )
    except OSError as e:
        raise CheckpointError(f"{path} can't be read ({type(e).__name__}: {short(e)})") from e


def _is_tensorflow(folder: epath.Path) -> bool:
    """Whether a folder holds a checkpoint of TensorFlow."""
    return any(p.name.endswith(".index") for p in folder.iterdir())


def find_checkpoint(path: str) -> tuple[epath.Path, str, tuple[str, ...]]:
    """The folder of a checkpoint, its layout, and names of newer ones that are not complete.

    `path` is a folder checkpoint_<step>, or the MODEL_DIR above it for its last complete one.

    Raises:
      CheckpointError: there is none.
    """
    path = absolute(path)
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise CheckpointError(
            f"{path!a} can't be read: it is not UTF-8, as tensorstore needs paths to be; rename it"
        ) from e
    folder, skipped = epath.Path(path), ()
    if epath.Path(f"{folder}.index").exists() and not folder.is_dir():
        raise _tensorflow(folder)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} doesn't exist; give a folder checkpoint_<step>, or a MODEL_DIR"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is a file; give a folder checkpoint_<step>, or the MODEL_DIR above it"
        )
    if _TEMPORARY.match(folder.name):
        raise CheckpointError(
            f"{folder} is half-written: its name is that of a save that was under way or was "
            "killed; give a folder checkpoint_<step>"
        )
    layout = layout_of(folder)
    if layout is None and not NAME.fullmatch(folder.name):
        folder, skipped = _last_checkpoint(folder)
        layout = layout_of(folder)
    if layout is None:
        if _is_tensorflow(folder):
            raise _tensorflow(folder)
        raise CheckpointError(
            f"{folder} is no whole checkpoint: it holds neither 'state/' nor 'checkpoint'; give "
            "another checkpoint_<step>"
        )
    return folder, layout, skipped


def _tensorflow(path: epath.Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a TensorFlow checkpoint, which is not read here; convert it by T5X's "
        "convert_tf_checkpoint first"
    )


def _last_checkpoint(model_dir: epath.Path) -> tuple[epath.Path, tuple[str, ...]]:
    """The last complete checkpoint, and the names of incomplete ones after it."""
    names = [p.name for p in model_dir.iterdir()]
    # other names, such as checkpoint_200_good, are no run's
    steps = {n: int(m[1]) for n in names if (m := NAME.fullmatch(n) or _TEMPORARY.match(n))}
    complete = [n for n in steps if NAME.fullmatch(n) and layout_of(model_dir / n)]
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
        raise _tensorflow(model_dir)
    hint, run = "give one of these", model_dir.resolve().parent
    with contextlib.suppress(OSError):
        if any(NAME.fullmatch(p.name) for p in run.iterdir()):
            hint = f"{run} has some"
    raise CheckpointError(
        f"{model_dir} holds no checkpoint: neither is it one, nor has it a folder "
        f"checkpoint_<step>; {hint}"
    )


def _next_to(folder: epath.Path, name: str) -> epath.Path | None:
    """A file in the run's folder: next to the checkpoint, or next to what that is a link to."""
    real = folder if "://" in str(folder) else epath.Path(os.path.realpath(folder))
    places = (place.parent / name for place in (folder, real))
    return next((place for place in places if place.exists()), None)


def _record(path: epath.Path | None) -> dict[str, WeightRecord]:
    try:
        return {} if path is None else read_record(path)
    except ValueError as e:
        raise CheckpointError(
            f"{path} is damaged ({short(e)}); move it away to go on without it"
        ) from e
