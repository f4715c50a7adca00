"""Where checkpoints are: a folder checkpoint_<step>, or the last one in a run's MODEL_DIR."""

from __future__ import annotations

import contextlib
import os
import re
from typing import NamedTuple

from etils import epath

_NAME = re.compile(r"checkpoint_(\d+)")
# what Orbax and T5X call a save that is under way, or was killed
_TEMPORARY = re.compile(r"checkpoint_(\d+)\.(orbax-checkpoint-tmp|tmp-|tmp$)")


class CheckpointError(ValueError):
    """A checkpoint can't be read: there is none, or it is damaged or of another kind."""


def absolute(path: str) -> str:
    """A local path as an absolute one, without '~'; a URL as it is."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def layout_of(folder: epath.Path) -> str | None:
    """How a checkpoint is laid out: 'orbax' or 't5x'; None if the folder holds neither."""
    if (folder / "state").is_dir():
        return "orbax"
    # TensorFlow has a text file of the same name
    return "t5x" if (folder / "checkpoint").is_file() and not _is_tensorflow(folder) else None


def _is_tensorflow(folder: epath.Path) -> bool:
    """Whether a folder holds a checkpoint of TensorFlow."""
    return any(p.name.endswith(".index") for p in folder.iterdir())


class Place(NamedTuple):
    """Where a checkpoint is."""

    folder: epath.Path
    layout: str  # 'orbax' or 't5x'
    step: int | None  # by the folder's name, None where that is not checkpoint_<step>
    skipped: tuple[str, ...]  # newer folders next to it that hold no complete checkpoint


def find_checkpoint(path: str) -> Place:
    """Where a checkpoint is.

    Args:
      path: that folder, or the MODEL_DIR above it, whose last complete checkpoint is then taken.

    Raises:
      CheckpointError: there is no such checkpoint, or it is incomplete or of another kind.
      OSError: a folder can't be read.
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
        raise CheckpointError(_tensorflow(folder))
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
    if layout is None and not _NAME.fullmatch(folder.name):
        folder, skipped = _last_checkpoint(folder)
        layout = layout_of(folder)
    if layout is None:
        if _is_tensorflow(folder):
            raise CheckpointError(_tensorflow(folder))
        raise CheckpointError(
            f"{folder} is no whole checkpoint: it holds neither 'state/' nor 'checkpoint'; give "
            "another checkpoint_<step>"
        )
    named = _NAME.fullmatch(folder.name)
    return Place(folder, layout, int(named[1]) if named else None, skipped)


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
