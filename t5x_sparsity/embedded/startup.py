"""What is checked before a run compiles or writes anything, and where it starts from."""

import os
from typing import Any, NamedTuple

from absl import logging

from t5x_sparsity.artifacts.checkpoint import absolute, find_checkpoint
from t5x_sparsity.artifacts.checkpoint_arrays import CheckpointError, SavedArray
from t5x_sparsity.embedded import checkpoints, utils


def check_periods(stats: int | None, evaluate: int | None, save: int | None) -> None:
    """Raise a ValueError for a negative period, or where the longer is no multiple of the other."""
    for name, period in {"stats_period": stats, "eval_period": evaluate}.items():
        if period is not None and period < 0:
            raise ValueError(f"train.{name} is {period}; it must be a number of steps, or None.")
    if evaluate and save and max(evaluate, save) % min(evaluate, save):
        raise ValueError(
            f"The periods must all be multiples of the shortest of them, {min(evaluate, save)}, "
            f"but they are train.eval_period = {evaluate}, utils.SaveCheckpointConfig.period = "
            f"{save}. Change one of them."
        )


def check_model_dir(model_dir: str) -> str:
    """The absolute path of `model_dir`; a ValueError if it can't be made or written to."""
    path = above = os.path.abspath(os.path.expanduser(str(model_dir)))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    for fails, why in (
        (not isinstance(model_dir, str) or not model_dir.strip(), "it names no folder"),
        ("://" in str(model_dir), "the embedded host writes to local folders only; T5X, to others"),
        (not os.path.isdir(above), f"{above} is not a folder"),
        (not os.access(above, os.W_OK | os.X_OK), f"{above} can't be written to"),
    ):
        if fails:
            raise ValueError(
                f"model_dir is {model_dir!r}, but {why}. Set the gin macro MODEL_DIR to a folder "
                "that can be written to."
            )
    return path


def check_checkpoint_cfg(cfg: utils.CheckpointConfig, train_cfg: utils.DatasetConfig) -> None:
    """Raise a ValueError where the checkpoint configuration can't work in training."""
    if cfg.save and cfg.save.save_dataset and train_cfg.seed is None:
        raise ValueError(
            "utils.SaveCheckpointConfig.save_dataset is True, but the training data has no fixed "
            "seed, so that a resumed run couldn't find its place in it. Set "
            "train/utils.DatasetConfig.seed = 0 (or another number), or save_dataset = False."
        )
    path = cfg.restore.path if cfg.restore else ()
    if not isinstance(path, str) and list(path or ()):
        raise ValueError(
            f"utils.RestoreCheckpointConfig.path is {path!r}; training starts from one checkpoint. "
            "Set one path, or [] to start from scratch."
        )


class Source(NamedTuple):
    """The checkpoint that a run starts from, checked against the run's own state."""

    path: str
    plan: dict[str, SavedArray]  # which of its arrays goes to which leaf
    batches: int  # training batches to skip
    dtype: str | None  # of the weights as they are read; None: the model's
    fallback_to_scratch: bool  # whether leaves that the plan lacks are initialized


def find_source(model_dir: str, cfg: utils.CheckpointConfig, train_state: Any) -> Source | None:
    """The last checkpoint in `model_dir`, else the one that `cfg.restore` names, else None.

    Raises:
      ValueError: it doesn't fit `train_state`, or what `cfg.restore` names doesn't exist.
    """
    restore = cfg.restore or utils.RestoreCheckpointConfig()
    step = checkpoints.latest_step(model_dir)
    is_resuming = step is not None
    if is_resuming:
        path = checkpoints.checkpoint_path(model_dir, step)
        with_dataset = bool(cfg.save and cfg.save.save_dataset)
        dtype = cfg.save.dtype if cfg.save else "float32"
    elif restore.path:
        path = absolute(restore.path)
        if restore.mode == "latest":
            path = _last_checkpoint(restore.path)
        logging.info("Starting from %s.", path)
        with_dataset, dtype = restore.restore_dataset, restore.dtype
    else:
        return None
    fallback_to_scratch = restore.fallback_to_scratch and not is_resuming
    plan = checkpoints.plan_restore(
        path,
        train_state.state_dict(),
        restore.transformations,
        is_resuming=is_resuming,
        fallback_to_scratch=fallback_to_scratch,
    )
    batches = checkpoints.saved_batches(path) if with_dataset else 0
    if batches is None:
        raise ValueError(
            f"{path} holds no position in the training data: it was saved with "
            "utils.SaveCheckpointConfig.save_dataset = False, or by T5X. Set save_dataset (and "
            "utils.RestoreCheckpointConfig.restore_dataset) to False to read from the start."
        )
    return Source(path, plan, batches, dtype, fallback_to_scratch)


def _last_checkpoint(path: str) -> str:
    """The folder of a run's last checkpoint, or of the one that `path` is."""
    name = f"utils.RestoreCheckpointConfig.path is {path!r}"
    try:
        folder, layout, _ = find_checkpoint(path)
    except CheckpointError as e:
        raise ValueError(f"{name}: {e}. Set it to one of these, or to [] to start afresh.") from e
    if layout != "orbax":
        raise ValueError(
            f"{name}, and {folder} is in T5X's older format, which the embedded host doesn't read; "
            "use T5X for it, or set another path."
        )
    return str(folder)
