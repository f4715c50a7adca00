"""Checkpoints of the train state, in T5X's layout, written by Orbax.

`<model_dir>/checkpoint_<step>/state` holds the state dict (`target/...`, `state/step`,
`state/param_states/...`), `.../dataset` how many training batches the run had read. A folder is
renamed to that name once it is complete, so a killed save leaves only a temporary folder, which the
next save clears away.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections import Counter
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

from t5x_sparsity.artifacts.checkpoint import absolute
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
    return sorted(
        s for s in steps if os.path.isdir(os.path.join(checkpoint_path(directory, s), _STATE))
    )


def latest_step(directory: str) -> int | None:
    """The last step saved in `directory`, or None."""
    return max(all_steps(directory), default=None)


def checkpoint_path(directory: str, step: int) -> str:
    """The folder of the checkpoint of `step`."""
    return os.path.join(os.path.abspath(directory), f"{_PREFIX}_{step}")


def saved_leaves(path: str) -> dict[str, SavedArray]:
    """The arrays that the checkpoint at `path` holds, by name ('target/...'); none is read."""
    if not (epath.Path(path) / _STATE).is_dir():
        raise ValueError(
            f"{path} is no checkpoint: it has no folder 'state'. Set the checkpoint's own folder "
            "(.../checkpoint_1000) with mode = 'specific', or the one above with mode = 'latest'."
        )
    return saved_arrays(epath.Path(absolute(path)), "orbax")


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
      transformations: applied in order to the checkpoint's nested dict of `SavedArray`.
      is_resuming: passed on to the transformations.
      fallback_to_scratch: leave out leaves that the checkpoint lacks, without an error.

    Raises:
      ValueError: leaves are missing, of another shape, or read from the same array; the first few
        are shown.
    """
    wanted = _leaves(expected)
    saved: Any = saved_leaves(path)
    if transformations:
        nested = traverse_util.unflatten_dict(saved, sep="/")
        for transform in transformations:
            nested = transform(nested, dict(expected), is_resuming=is_resuming)
        saved = traverse_util.flatten_dict(nested, sep="/")
    plan = {name: saved[name] for name in wanted if name in saved}
    unexpected = {name: f"found {_shape(saved[name])}" for name in saved if name not in wanted}
    missing = {name: f"expected {_shape(wanted[name])}" for name in wanted if name not in saved}
    misshapen = {
        name: f"expected {_shape(wanted[name])}, found {_shape(leaf)}"
        for name, leaf in plan.items()
        if tuple(wanted[name].shape) != leaf.shape
    }
    if misshapen or (missing and not fallback_to_scratch):
        lines = [
            f"The checkpoint {path} doesn't fit this run: it was written by another model or "
            "optimizer. Use another MODEL_DIR, or the configuration that wrote it."
        ]
        for title, names in (
            ("missing in the checkpoint", {} if fallback_to_scratch else missing),
            ("in the checkpoint only", unexpected),
            ("of another shape", misshapen),
        ):
            if names:
                lines.append(f"{len(names)} leaves {title}:")
                lines += [f"  {name}: {names[name]}" for name in sorted(names)[:_SHOWN]]
                if len(names) > _SHOWN:
                    lines.append(f"  ... and {len(names) - _SHOWN} more")
        raise ValueError("\n".join(lines))
    sources = Counter(leaf.name for leaf in plan.values())
    twice = sorted(name for name, count in sources.items() if count > 1)
    if twice:
        raise ValueError(f"Several leaves of the run are read from {twice[0]}: use T5X for it.")
    if unexpected:
        logging.warning(
            "%d arrays of %s are not of this run and are left out, such as %s",
            len(unexpected),
            path,
            ", ".join(sorted(unexpected)[:_SHOWN]),
        )
    return plan


def _shape(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def saved_batches(path: str) -> int | None:
    """How many training batches the run had read at the checkpoint; None if it doesn't say."""
    item = epath.Path(path) / _DATASET
    # T5X saves the state of a tf.data iterator there, which is nothing like a count
    if not (item / _COUNT).is_file():
        return None
    return ocp.JsonCheckpointHandler().restore(item, args=ocp.args.JsonRestore()).get("batches")


@dataclasses.dataclass
class OrbaxCheckpointManagerInterface:
    """Saves and restores train states of one shape in one folder.

    Nothing is written, and the folder isn't made, before the first `save`.

    Attributes:
      directory: the folder of checkpoints.
      train_state: a state of the right shapes (jax.ShapeDtypeStruct will do).
      partitioner: says on which devices restored arrays are put.
      dataset_iterator: its count of `batches` is saved with each checkpoint; None saves none.
      save_dtype: of weights on disk; None keeps theirs.
      restore_dtype: of weights as they are read; None takes the model's.
      keep: how many checkpoints stay; None keeps all.
    """

    directory: str
    train_state: Any
    partitioner: Any
    dataset_iterator: Any | None = None
    save_dtype: str | None = None
    restore_dtype: str | None = None
    keep: int | None = None
    _manager: ocp.CheckpointManager | None = dataclasses.field(default=None, init=False)

    @property
    def _saved(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                os.path.abspath(self.directory),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self.keep,
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
        dtype = self.save_dtype and np.dtype(self.save_dtype)
        args = {
            name: ocp.SaveArgs(dtype=dtype if _is_weight(name, leaf) else None)
            for name, leaf in leaves.items()
        }
        items = {
            _STATE: ocp.args.PyTreeSave(
                traverse_util.unflatten_dict(leaves, sep="/"),
                save_args=traverse_util.unflatten_dict(args, sep="/"),
            )
        }
        if self.dataset_iterator is not None:
            items[_DATASET] = ocp.args.JsonSave({"batches": self.dataset_iterator.batches})
        return bool(self._saved.save(step, args=ocp.args.Composite(**items), force=True))

    def restore(
        self,
        path: str,
        plan: Mapping[str, SavedArray],
        fallback_state: Mapping[str, Any] | None = None,
    ) -> Any:
        """Read the checkpoint at `path` onto the run's devices, by `plan_restore`'s plan.

        `fallback_state`, a state dict, fills in what the plan leaves out.
        """
        begun = time.monotonic()
        expected = self.train_state.state_dict()
        wanted = _leaves(expected)
        axes = self.partitioner.get_mesh_axes(self.train_state).state_dict()
        specs = traverse_util.flatten_dict(dict(axes), sep="/")
        abstract, args = {}, {}
        for name, leaf in plan.items():
            dtype = wanted[name].dtype
            # Only weights are cast: a step of 12345 read as bfloat16 would be 12352.
            if self.restore_dtype and _is_weight(name, wanted[name]):
                dtype = np.dtype(self.restore_dtype)
            sharding = NamedSharding(self.partitioner.mesh, specs.get(name) or PartitionSpec())
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
        read = traverse_util.flatten_dict(read, sep="/")
        result = traverse_util.flatten_dict(dict(expected), sep="/", keep_empty_nodes=True)
        if fallback_state is not None:
            # a None, too: it says that the train state itself makes the leaf
            result.update(traverse_util.flatten_dict(dict(fallback_state), sep="/"))
        result.update({name: read[leaf.name] for name, leaf in plan.items()})
        logging.info("Read %s in %.1f s.", path, time.monotonic() - begun)
        return self.train_state.restore_state(traverse_util.unflatten_dict(result, sep="/"))

    def close(self) -> None:
        """Wait for the save under way and free what Orbax holds; a failed save raises here."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def _is_weight(name: str, leaf: Any) -> bool:
    return name.startswith("target/") and jnp.issubdtype(leaf.dtype, jnp.floating)
