"""Checkpoints of the train state, in T5X's layout, written by Orbax.

`<model_dir>/checkpoint_<step>/state` holds the state dict (`target/...`, `state/step`,
`state/param_states/...`), `.../dataset` how many training batches the run had read. A folder is
renamed to that name once it is complete, so a killed save leaves only a temporary folder, which the
next save clears away.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray, saved_arrays

_PREFIX = "checkpoint"
_STATE, _DATASET = "state", "dataset"
_COUNT = "metadata"  # Orbax's name for a file of JSON
_SHOWN = 5


def get_local_data(x: Any) -> Any:
    """The first local shard of a jax.Array; anything else unchanged."""
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        return x.addressable_data(0)
    return x


def all_steps(directory: str) -> list[int]:
    """The steps of the complete checkpoints in `directory`, ascending; [] if there is no folder."""
    if not os.path.isdir(directory):
        return []
    names = (re.fullmatch(rf"{_PREFIX}_(\d+)", name) for name in os.listdir(directory))
    steps = [int(match[1]) for match in names if match]
    return sorted(s for s in steps if os.path.isdir(os.path.join(directory, _name(s), _STATE)))


def latest_step(directory: str) -> int | None:
    """The last step saved in `directory`, or None."""
    return max(all_steps(directory), default=None)


def checkpoint_path(directory: str, step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return os.path.join(os.path.abspath(directory), _name(step))


def _name(step: int) -> str:
    return f"{_PREFIX}_{step}"


def saved_leaves(path: str) -> dict[str, SavedArray]:
    """The arrays that the checkpoint at `path` holds, by name ('target/...'); none is read."""
    if not (epath.Path(path) / _STATE).is_dir():
        raise ValueError(
            f"{path} is no checkpoint: it has no folder 'state'. Set the checkpoint's own folder "
            "(.../checkpoint_1000) with mode = 'specific', or the one above with mode = 'latest'."
        )
    return saved_arrays(epath.Path(path), "orbax")


def _leaves(state_dict: Mapping) -> dict[str, Any]:
    flat = traverse_util.flatten_dict(dict(state_dict), sep="/", keep_empty_nodes=True)
    return {name: leaf for name, leaf in flat.items() if hasattr(leaf, "shape")}


def plan_restore(
    path: str,
    expected: Mapping[str, Any],
    transformations: Sequence[Callable] = (),
    *,
    is_resuming: bool = False,
    fallback_to_scratch: bool = False,
) -> dict[str, SavedArray]:
    """Which array of the checkpoint goes to which leaf of the model, from the metadata alone.

    Arrays that the model doesn't have are left out, with a warning, as T5X does.

    Args:
      path: the checkpoint.
      expected: the model's state dict, of arrays or jax.ShapeDtypeStruct.
      transformations: applied in turn to the checkpoint's nested dict of `SavedArray`.
      is_resuming: passed on to the transformations.
      fallback_to_scratch: leaves that the checkpoint lacks are left out rather than an error.

    Raises:
      ValueError: a leaf is missing or of another shape; all of them are counted and the first few
        shown.
    """
    wanted = _leaves(expected)
    saved: Any = saved_leaves(path)
    if transformations:
        nested = traverse_util.unflatten_dict(saved, sep="/")
        for transform in transformations:
            nested = transform(nested, dict(expected), is_resuming=is_resuming)
        saved = traverse_util.flatten_dict(nested, sep="/")
    missing = [] if fallback_to_scratch else [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    both = [name for name in wanted if name in saved]
    misshapen = [name for name in both if tuple(wanted[name].shape) != saved[name].shape]
    if missing or misshapen:
        raise ValueError(_mismatch(path, wanted, saved, missing, unexpected, misshapen))
    if unexpected:
        logging.warning(
            "%d arrays of %s are not of this run and are left out, such as %s",
            len(unexpected),
            path,
            ", ".join(sorted(unexpected)[:_SHOWN]),
        )
    return {name: saved[name] for name in both}


def _mismatch(path, wanted, saved, missing, unexpected, misshapen) -> str:
    lines = [
        f"The checkpoint {path} doesn't fit this run: it was written by another model or "
        "optimizer. Use another MODEL_DIR, or the configuration that wrote it."
    ]
    for title, names, describe in (
        ("missing in the checkpoint", missing, lambda n: f"expected {_shape(wanted[n])}"),
        ("in the checkpoint only", unexpected, lambda n: f"found {_shape(saved[n])}"),
        (
            "of another shape",
            misshapen,
            lambda n: f"expected {_shape(wanted[n])}, found {_shape(saved[n])}",
        ),
    ):
        if names:
            lines.append(f"{len(names)} leaves {title}:")
            lines += [f"  {name}: {describe(name)}" for name in sorted(names)[:_SHOWN]]
            if len(names) > _SHOWN:
                lines.append(f"  ... and {len(names) - _SHOWN} more")
    return "\n".join(lines)


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def saved_batches(path: str) -> int | None:
    """How many training batches the run had read at the checkpoint; None if it doesn't say."""
    item = epath.Path(path) / _DATASET
    # T5X saves the state of a tf.data iterator there, which is nothing like a count
    if not (item / _COUNT).is_file():
        return None
    return ocp.JsonCheckpointHandler().restore(item, args=ocp.args.JsonRestore()).get("batches")


class OrbaxCheckpointManagerInterface:
    """Saves and restores train states of one shape in one folder.

    Nothing is written, and the folder isn't made, before the first `save`.
    """

    def __init__(
        self,
        directory: str,
        train_state: Any,
        partitioner: Any,
        dataset_iterator: Any | None = None,
        save_dtype: str | None = None,
        restore_dtype: str | None = None,
        keep: int | None = None,
        period: int | None = 1,
    ):
        """Prepare a manager.

        Args:
          directory: the folder of checkpoints.
          train_state: a state of the right shapes (jax.ShapeDtypeStruct will do).
          partitioner: says on which devices restored arrays are put.
          dataset_iterator: its count of `batches` is saved with each checkpoint; None saves none.
          save_dtype: the type to save weights in; None keeps theirs.
          restore_dtype: the type to read weights as; None takes the model's.
          keep: how many checkpoints stay; None keeps all.
          period: accepted for T5X's sake; the caller decides when to save.
        """
        del period
        self._directory = os.path.abspath(directory)
        self._train_state = train_state
        self._partitioner = partitioner
        self._dataset_iterator = dataset_iterator
        self._save_dtype = save_dtype and np.dtype(save_dtype)
        self._restore_dtype = restore_dtype and np.dtype(restore_dtype)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    @property
    def directory(self) -> str:
        """The folder of checkpoints, as an absolute path."""
        return self._directory

    def all_steps(self) -> list[int]:
        """The steps saved, ascending; a save under way counts."""
        return (
            all_steps(self._directory) if self._manager is None else list(self._saved.all_steps())
        )

    def latest_step(self) -> int | None:
        """The last step saved, or None."""
        return max(self.all_steps(), default=None)

    @property
    def _saved(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    step_prefix=_PREFIX,
                    cleanup_tmp_directories=True,
                ),
                item_handlers={
                    _STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True),
                    _DATASET: ocp.JsonCheckpointHandler(),
                },
            )
        return self._manager

    def save(self, train_state: Any) -> bool:
        """Save `train_state` under its step; False if that step is saved already.

        Returns once the arrays are copied to host memory, so that they may be donated; the writing
        goes on in the background. A save still under way is waited for.
        """
        step = int(np.asarray(get_local_data(train_state.step)))
        if step in self._saved.all_steps():
            return False
        # None and empty nodes can't be read back; restore takes them from the model instead.
        leaves = _leaves(train_state.state_dict())
        args = {
            name: ocp.SaveArgs(dtype=self._save_dtype if _is_weight(name, leaf) else None)
            for name, leaf in leaves.items()
        }
        items = {
            _STATE: ocp.args.PyTreeSave(
                traverse_util.unflatten_dict(leaves, sep="/"),
                save_args=traverse_util.unflatten_dict(args, sep="/"),
            )
        }
        if self._dataset_iterator is not None:
            items[_DATASET] = ocp.args.JsonSave({"batches": self._dataset_iterator.batches})
        return bool(self._saved.save(step, args=ocp.args.Composite(**items), force=True))

    def restore(
        self,
        step: int | None = None,
        path: str | None = None,
        fallback_state: Mapping[str, Any] | None = None,
        plan: Mapping[str, SavedArray] | None = None,
    ) -> Any:
        """Read a checkpoint onto this run's devices, whatever devices it was saved from.

        Args:
          step: a step in `directory`; or give `path`, a checkpoint's own folder.
          path: see `step`.
          fallback_state: a state dict that fills in what the plan leaves out.
          plan: what `plan_restore` returned; None plans an exact restore.
        """
        if (step is None) == (path is None):
            raise ValueError(f"restore takes either step or path, got {step} and {path}.")
        path = checkpoint_path(self._directory, step) if path is None else os.path.abspath(path)
        expected = self._train_state.state_dict()
        if plan is None:
            plan = plan_restore(path, expected)
        begun = time.monotonic()
        wanted = _leaves(expected)
        axes = self._partitioner.get_mesh_axes(self._train_state).state_dict()
        specs = traverse_util.flatten_dict(dict(axes), sep="/")
        abstract, args, readers = {}, {}, {}
        for name, leaf in plan.items():
            dtype = wanted[name].dtype
            if self._restore_dtype is not None and _is_weight(name, wanted[name]):
                dtype = self._restore_dtype
            # Only weights are cast: a step of 12345 read as bfloat16 would be 12352.
            sharding = NamedSharding(self._partitioner.mesh, specs.get(name) or PartitionSpec())
            readers.setdefault(leaf.name, []).append((name, dtype, sharding))
            if leaf.name not in abstract:
                abstract[leaf.name] = jax.ShapeDtypeStruct(leaf.shape, dtype)
                args[leaf.name] = ocp.ArrayRestoreArgs(
                    sharding=sharding, global_shape=leaf.shape, dtype=dtype
                )
        read = ocp.PyTreeCheckpointHandler().restore(
            epath.Path(path) / _STATE,
            args=ocp.args.PyTreeRestore(
                item=traverse_util.unflatten_dict(abstract, sep="/"),
                restore_args=traverse_util.unflatten_dict(args, sep="/"),
                partial_restore=True,
            ),
        )
        result = traverse_util.flatten_dict(dict(expected), sep="/", keep_empty_nodes=True)
        if fallback_state is not None:
            # a None, too: it says that the train state itself makes the leaf
            result.update(traverse_util.flatten_dict(dict(fallback_state), sep="/"))
        for source, value in traverse_util.flatten_dict(read, sep="/").items():
            (first, _, _), *others = readers[source]
            result[first] = value
            for name, dtype, sharding in others:
                # A copy: a donated array must not have two names.
                result[name] = jax.device_put(np.array(value, dtype), sharding)
        logging.info("Read %s in %.1f s.", path, time.monotonic() - begun)
        return self._train_state.restore_state(traverse_util.unflatten_dict(result, sep="/"))

    def wait_until_finished(self) -> None:
        """Wait for the save under way; its errors are raised here."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save under way and free what Orbax holds."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _is_weight(name: str, leaf: Any) -> bool:
    return name.startswith("target/") and jnp.issubdtype(leaf.dtype, jnp.floating)
