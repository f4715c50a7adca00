"""What is checked before a run compiles or writes anything, and where it starts from."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
from absl import logging

from t5x_sparsity.embedded import checkpoints, utils


def check_host(infer_eval_dataset_cfg: Any, use_orbax: bool) -> None:
    """Raise a ValueError for what T5X can do and the embedded host can't."""
    if infer_eval_dataset_cfg is not None:
        raise ValueError(
            "train.infer_eval_dataset_cfg is set, but the embedded host doesn't decode. Set it to "
            "None, or train with T5X."
        )
    if not use_orbax:
        raise ValueError(
            "train.use_orbax is False, but the embedded host writes Orbax checkpoints only. Set it "
            "to True."
        )
    if jax.process_count() > 1:
        raise ValueError(
            f"The embedded host runs as one process, and this is one of {jax.process_count()}. "
            "Train on several hosts with T5X."
        )


def check_model_dir(model_dir: str) -> str:
    """The absolute path of `model_dir`; a ValueError if it can't be made or written to."""
    hint = "Set the gin macro MODEL_DIR to a folder that can be written to."
    if not isinstance(model_dir, str) or not model_dir.strip():
        raise ValueError(f"model_dir is {model_dir!r}. {hint}")
    if "://" in model_dir:
        raise ValueError(
            f"model_dir is {model_dir!r}, but the embedded host writes to local folders only. "
            f"{hint} T5X writes to other file systems."
        )
    path = os.path.abspath(os.path.expanduser(model_dir))
    above = path
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise ValueError(f"model_dir is {path}, but {above} is not a folder. {hint}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"model_dir is {path}, but {above} can't be written to. {hint}")
    return path


def check_checkpoint_cfg(cfg: utils.CheckpointConfig, train_cfg: utils.DatasetConfig) -> None:
    """Raise a ValueError where the checkpoint configuration can't work in training."""
    if cfg.save and cfg.save.save_dataset and train_cfg.seed is None:
        raise ValueError(
            "utils.SaveCheckpointConfig.save_dataset is True, but the training data has no fixed "
            "seed, so that a resumed run couldn't find its place in it. Set "
            "train/utils.DatasetConfig.seed = 0 (or another number), or save_dataset = False."
        )
    if cfg.restore is None:
        return
    path = cfg.restore.path
    if not isinstance(path, str) and list(path or ()):
        raise ValueError(
            f"utils.RestoreCheckpointConfig.path is {path!r}; training starts from one checkpoint. "
            "Set one path, or [] to start from scratch."
        )
    if cfg.restore.mode == "all":
        raise ValueError(
            "utils.RestoreCheckpointConfig.mode is 'all', which is for evaluation. Set 'latest' or "
            "'specific'."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint that a run starts from, checked against the run's own state.

    Attributes:
      path: the checkpoint's folder.
      plan: which of its arrays goes to which leaf.
      batches: how many training batches to pass over.
      dtype: the type to read weights as; None: the model's.
      fallback_to_scratch: whether leaves that the plan lacks are initialized.
    """

    path: str
    plan: dict[str, checkpoints.SavedLeaf]
    batches: int
    dtype: str | None
    fallback_to_scratch: bool


def find_source(model_dir: str, cfg: utils.CheckpointConfig, train_state: Any) -> Source | None:
    """The last checkpoint in `model_dir`, else the one that `cfg.restore` names, else None.

    Raises:
      ValueError: it doesn't fit `train_state`, or what `cfg.restore` names doesn't exist.
    """
    expected = train_state.state_dict()
    restore = cfg.restore or utils.RestoreCheckpointConfig()
    step = checkpoints.latest_step(model_dir)
    if step is not None:
        path = checkpoints.checkpoint_path(model_dir, step)
        with_dataset = bool(cfg.save and cfg.save.save_dataset)
        return Source(
            path=path,
            plan=checkpoints.plan_restore(
                path, expected, restore.transformations, is_resuming=True
            ),
            batches=_batches(path) if with_dataset else 0,
            dtype=cfg.save.dtype if cfg.save else "float32",
            fallback_to_scratch=False,
        )
    if not restore.path:
        return None
    path = os.path.abspath(os.path.expanduser(restore.path))
    if restore.mode == "latest":
        if not os.path.isdir(path):
            raise ValueError(
                f"utils.RestoreCheckpointConfig.path is {path}, which is no folder. Set the folder "
                "that holds checkpoint_<step>, or mode = 'specific' for one checkpoint."
            )
        step = checkpoints.latest_step(path)
        if step is None:
            raise ValueError(
                f"utils.RestoreCheckpointConfig.path is {path}, which holds no checkpoint_<step>. "
                "Set the folder of a run, or path = [] to start from scratch."
            )
        path = checkpoints.checkpoint_path(path, step)
    logging.info("Starting from %s.", path)
    return Source(
        path=path,
        plan=checkpoints.plan_restore(
            path,
            expected,
            restore.transformations,
            fallback_to_scratch=restore.fallback_to_scratch,
        ),
        batches=_batches(path) if restore.restore_dataset else 0,
        dtype=restore.dtype,
        fallback_to_scratch=restore.fallback_to_scratch,
    )


def _batches(path: str) -> int:
    batches = checkpoints.saved_batches(path)
    if batches is None:
        raise ValueError(
            f"{path} holds no position in the training data: it was saved with "
            "utils.SaveCheckpointConfig.save_dataset = False, or by T5X. Set save_dataset (and "
            "utils.RestoreCheckpointConfig.restore_dataset) to False to read from the start."
        )
    return batches
