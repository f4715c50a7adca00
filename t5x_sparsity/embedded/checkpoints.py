"""Checkpoints of the train state, in T5X's layout, written by Orbax.

`<model_dir>/checkpoint_<step>/state` holds the state dict (`target/...`, `state/step`,
`state/param_states/...`), `.../dataset` how many training batches the run had read. A folder is
renamed to that name once it is complete, so a killed save leaves only a temporary folder, which the
next run clears away.
"""

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
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from t5x_sparsity.artifacts.checkpoint import absolute
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray, saved_arrays
from t5x_sparsity.core.trees import flatten
from t5x_sparsity.embedded.refusals import missing_from

__getattr__ = missing_from(__name__)

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
    # no glob, to which brackets in the folder's name would be a pattern
    names = os.listdir(directory) if os.path.isdir(directory) else []
    found = (re.fullmatch(rf"{_PREFIX}_(\d+)", name) for name in names)
    return sorted(int(m[1]) for m in found if m and os.path.isdir(f"{directory}/{m[0]}/{_STATE}"))


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


def plan_restore(
    path: str,
    expected: Mapping[str, Any],
    transformations: Sequence[Callable] = (),
    *,
    is_resuming: bool = False,
    fallback_to_scratch: bool = False,
) -> dict[str, SavedArray]:
    """Which array of the checkpoint goes to which leaf of the model, from the metadata alone.

    Arrays that the model doesn't have are left out, with a warning, as T5X does. `expected` is the
    model's state dict; `transformations` go over the checkpoint's nested dict of `SavedArray`.

    Raises:
      ValueError: leaves are missing (unless `fallback_to_scratch`), of another shape, or read from
        the same array; the first few are shown.
    """
    wanted = flatten(expected)
    saved: Any = unflatten_dict(saved_leaves(path), sep="/")
    for transform in transformations:
        saved = transform(saved, dict(expected), is_resuming=is_resuming)
    saved = flatten_dict(saved, sep="/")
    plan = {name: saved[name] for name in wanted if name in saved}
    missing = {} if fallback_to_scratch else {k: x for k, x in wanted.items() if k not in saved}
    unexpected = {name: x for name, x in saved.items() if name not in wanted}
    misshapen = {k: wanted[k] for k, x in plan.items() if tuple(wanted[k].shape) != x.shape}
    if misshapen or missing:
        lines = [
            f"The checkpoint {path} doesn't fit this run: it was written by another model or "
            "optimizer. Use another MODEL_DIR, or the configuration that wrote it."
        ]
        for title, leaves in (
            ("missing in the checkpoint", missing),
            ("in the checkpoint only", unexpected),
            ("of another shape", misshapen),
        ):
            if leaves:
                lines.append(f"{len(leaves)} leaves {title}:")
            for name in sorted(leaves)[:_SHOWN]:
                shapes = {"expected": wanted.get(name), "found": saved.get(name)}
                shown = (
                    f"{k} {x.dtype}{list(x.shape)}" for k, x in shapes.items() if x is not None
                )
                lines.append(f"  {name}: {', '.join(shown)}")
            if len(leaves) > _SHOWN:
                lines.append(f"  ... and {len(leaves) - _SHOWN} more")
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


def restore(
    path: str,
    plan: Mapping[str, SavedArray],
    train_state: Any,
    partitioner: Any,
    *,
    dtype: str | None = None,
    fallback_state: Mapping[str, Any] | None = None,
) -> Any:
    """Reads the checkpoint at `path` onto the run's devices, by `plan_restore`'s plan.

    `train_state` has the right shapes (jax.ShapeDtypeStruct will do). `dtype` is that of weights as
    they are read, None takes the model's. The state dict `fallback_state` fills in what the plan
    leaves out.
    """
    begun = time.monotonic()
    state = flatten_dict(train_state.state_dict(), sep="/", keep_empty_nodes=True)
    axes = flatten_dict(partitioner.get_mesh_axes(train_state).state_dict(), sep="/")
    abstract, args = {}, {}
    for name, leaf in plan.items():
        # Only weights are cast: a step of 12345 read as bfloat16 would be 12352.
        casts = dtype and _is_weight(name, state[name])
        read_dtype = np.dtype(dtype) if casts else state[name].dtype
        abstract[leaf.name] = jax.ShapeDtypeStruct(leaf.shape, read_dtype)
        args[leaf.name] = ocp.ArrayRestoreArgs(
            sharding=NamedSharding(partitioner.mesh, axes.get(name) or PartitionSpec()),
            global_shape=leaf.shape,
            dtype=read_dtype,
        )
    read = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path) / _STATE,
        args=ocp.args.PyTreeRestore(
            item=unflatten_dict(abstract, sep="/"),
            restore_args=unflatten_dict(args, sep="/"),
            partial_restore=True,
        ),
    )
    read = flatten_dict(read, sep="/")
    # a None, too, fills in: it says that the train state itself makes the leaf
    state |= flatten_dict(fallback_state or {}, sep="/")
    state |= {name: read[leaf.name] for name, leaf in plan.items()}
    logging.info("Read %s in %.1f s.", path, time.monotonic() - begun)
    return train_state.restore_state(unflatten_dict(state, sep="/"))


def saved_batches(path: str) -> int | None:
    """How many training batches the run had read at the checkpoint; None if it doesn't say."""
    item = epath.Path(path) / _DATASET
    # T5X saves the state of a tf.data iterator there, which is nothing like a count
    if not (item / _COUNT).is_file():
        return None
    return ocp.JsonCheckpointHandler().restore(item, args=ocp.args.JsonRestore()).get("batches")


def make_manager(directory: str, keep: int | None = None) -> ocp.CheckpointManager:
    """Makes the folder, and what writes checkpoints to it; `keep` is how many stay, None: all.

    Saving goes on in the background. `close` waits for it, and raises if it failed.
    """
    return ocp.CheckpointManager(
        os.path.abspath(directory),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, step_prefix=_PREFIX, cleanup_tmp_directories=True
        ),
        item_handlers={
            _STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True),
            _DATASET: ocp.JsonCheckpointHandler(),
        },
    )


def save(
    manager: ocp.CheckpointManager,
    train_state: Any,
    *,
    dtype: str | None = None,
    batches: int | None = None,
) -> bool:
    """Saves `train_state` under its step; False if that step is saved already.

    It returns once the arrays are copied to host memory, so that they may be donated. A save still
    under way is waited for. `dtype` is that of weights on disk, None keeps theirs; `batches`, how
    many training batches were read, None says nothing of it.
    """
    step = int(train_state.step)
    if step in manager.all_steps():
        return False
    # None and empty nodes can't be read back; `restore` takes them from the model instead.
    leaves = flatten(train_state.state_dict())
    args = {
        name: ocp.SaveArgs(dtype=np.dtype(dtype) if dtype and _is_weight(name, leaf) else None)
        for name, leaf in leaves.items()
    }
    state = ocp.args.PyTreeSave(
        unflatten_dict(leaves, sep="/"), save_args=unflatten_dict(args, sep="/")
    )
    items = {_STATE: state}
    if batches is not None:
        items[_DATASET] = ocp.args.JsonSave({"batches": batches})
    return bool(manager.save(step, args=ocp.args.Composite(**items), force=True))


def _is_weight(name: str, leaf: Any) -> bool:
    return name.startswith("target/") and jnp.issubdtype(leaf.dtype, jnp.floating)
