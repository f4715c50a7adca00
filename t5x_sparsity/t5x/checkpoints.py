"""What a run starts from: checks of checkpoints before the host reads any array of them.

A checkpoint is a folder `checkpoint_<step>`, in T5X's own format or in Orbax's. `sparsity.json`
next to the checkpoints of a run says by which rules its masks were made.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from t5x_sparsity import host
from t5x_sparsity.artifacts import record
from t5x_sparsity.artifacts.checkpoint import absolute, layout_of
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray, flatten, saved_arrays
from t5x_sparsity.artifacts.record import RECORD, WeightRecord
from t5x_sparsity.core.contract import Plan
from t5x_sparsity.core.names import first_few
from t5x_sparsity.core.patterns import to_text
from t5x_sparsity.core.plan import update_schedules
from t5x_sparsity.core.train_step import EXPLORED

SPARSITY = "state/sparsity/"

OTHER_MODEL = "set MODEL to the checkpoint's"
OTHER_OPTIMIZER = (
    "set OPTIMIZER to the checkpoint's, or start the optimizer afresh by "
    "utils.RestoreCheckpointConfig.assignment_map = [('state/param_states/.*', None)]"
)


def check_sources(
    model_dir: str | None, checkpoint_cfg: Any, expected: Mapping[str, Any], plan: Plan
) -> None:
    """Checks the checkpoint that a run will start from.

    It is the last in the run's `model_dir`, where that is known, else what `restore` of T5X's
    CheckpointConfig names. `expected` has the run's leaves under state/sparsity, by name.

    Raises:
      ValueError: the checkpoint can't be read, has no masks, or was made with other rules.
    """
    own = _last_checkpoint(epath.Path(absolute(model_dir))) if model_dir else None
    if own is not None:
        found = _saved_sparsity(own, f"; move that folder away to go on from {_before(own)}")
        check_leaves(expected, found, f"the checkpoint {own}")
        _check_record(own.parent / RECORD, plan)
        if getattr(getattr(checkpoint_cfg, "save", None), "save_dataset", False):
            _check_data_position(own)
        return
    restore = getattr(checkpoint_cfg, "restore", None)
    if restore is None or not isinstance(restore.path, str):
        return
    path = epath.Path(absolute(restore.path))
    if epath.Path(f"{path}.index").exists():
        raise ValueError(
            f"{path} is a TensorFlow checkpoint, and T5X adds nothing to those as it reads them, "
            "masks neither; convert it by T5X's convert_tf_checkpoint first"
        )
    if restore.mode == "latest" and path.is_dir():
        path = _last_checkpoint(path)
        if path is None:
            return
    found = _saved_sparsity(path)
    # a transformation may well make one fit
    if not restore.state_transformation_fns:
        check_leaves(expected, found, f"the checkpoint {path}")
        _check_masks_will_fit(path, plan)


def write_record(model_dir: str, plan: Plan) -> None:
    """Writes by which rules the masks of a run are made to `sparsity.json`; all of it or none."""
    record.write_record(epath.Path(model_dir) / RECORD, _record(plan))


def from_dense(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any], *, is_resuming: bool = False
) -> Mapping[str, Any]:
    """A state transformation for RestoreCheckpointConfig: starts a sparse run from a dense one.

    It lets a checkpoint lack masks, which are then made from its weights, the whole state of the
    optimizer, which then starts afresh, and the step, which is then 0; but nothing else.

    Args:
      checkpoint: nested dict of what the checkpoint has.
      state: nested dict of what the run has.
      is_resuming: whether the checkpoint is the run's own.

    Raises:
      ValueError: the run is dense, or the checkpoint has masks, or lacks weights or part of the
        optimizer's state.
    """
    if is_resuming:
        return checkpoint
    saved, wanted = flatten(checkpoint), flatten(state)
    if not any(name.startswith(SPARSITY) for name in wanted):
        raise ValueError(
            "'sparsity/from_dense.gin' makes masks for a sparse run, and this run is dense; "
            "include a method's file, such as 'sparsity/rigl.gin', before it"
        )
    if has_masks(saved):
        raise ValueError(
            "INITIAL_CHECKPOINT_PATH is a sparse run's checkpoint, whose masks 'from_dense.gin' "
            "would throw away; leave that include out to go on with them"
        )
    for part, what, remedy in (
        ("target/", "weights of this model", OTHER_MODEL),
        ("flax_mutables/", "mutable variables of this model", OTHER_MODEL),
        ("state/param_states/", "leaves of the optimizer's state", OTHER_OPTIMIZER),
    ):
        names = [k for k in wanted if k.startswith(part) and wanted[k] is not None]
        missing = sorted(k for k in names if k not in saved)
        if missing == sorted(names) and part == "state/param_states/":
            if names:
                logging.warning("The checkpoint has no state of this optimizer; it starts afresh.")
        elif missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of {len(names)} {what}: "
                f"{first_few(missing, 6, '; ')}; {remedy}"
            )
    logging.info("The checkpoint is dense: masks are made from its weights.")
    return checkpoint


def checkpoint_step(path: str) -> int:
    """The step of a checkpoint by its name, `checkpoint_<step>`; nothing is read.

    Raises:
      ValueError: the name has no step.
    """
    match = re.search(r"checkpoint_(\d+)/*$", path) if isinstance(path, str) else None
    if match is None:
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH is {path!r}, whose step can't be told from its name; give "
            "the folder checkpoint_<step>, or bind t5x_sparsity.Periodic.start_step to the step"
        )
    return int(match[1])


def _last_checkpoint(folder: epath.Path) -> epath.Path | None:
    step = host.checkpoints.latest_step(str(folder)) if folder.is_dir() else None
    return None if step is None else folder / f"checkpoint_{step}"


def _before(checkpoint: epath.Path) -> str:
    """What a run would go on from without its last checkpoint."""
    *earlier, _ = sorted(host.checkpoints.all_steps(str(checkpoint.parent)))
    return f"checkpoint_{earlier[-1]}" if earlier else "the start"


def _saved_sparsity(path: epath.Path, remedy: str = "") -> dict[str, SavedArray]:
    """The arrays under state/sparsity of a checkpoint by name; none is read."""
    layout = layout_of(path)
    if layout is None:
        raise ValueError(
            f"{path} is no whole checkpoint: it holds neither 'state/' nor 'checkpoint'{remedy}"
        )
    try:
        # of masks and slots the shapes are asked for, and of weights nothing
        return saved_arrays(path, layout, prefix=SPARSITY, complete=False)
    except ImportError:
        raise
    except Exception as e:
        raise ValueError(
            f"the checkpoint {path} is damaged and can't be read ({type(e).__name__}: {e}){remedy}"
        ) from e


def _check_data_position(path: epath.Path) -> None:
    """Each process has saved its own place in the training data; no other number can read it."""
    if not (path / "state").is_dir():
        return
    folders = list((path / "dataset").glob("*"))
    counts = [int(m[1]) for f in folders if (m := re.fullmatch(r"process_\d+-of-(\d+)", f.name))]
    saved_by = max(counts, default=1) if folders else 0
    if saved_by != jax.process_count():
        raise ValueError(
            f"the checkpoint {path} has the position in the training data of {saved_by} "
            f"processes, and this run has {jax.process_count()}; set "
            "utils.SaveCheckpointConfig.save_dataset = False to read the data from its start"
        )


def _record(plan: Plan) -> dict[str, WeightRecord]:
    found = {}
    for path, layer in plan.items():
        axes = layer.axes
        if axes is not None:  # the last ones may have no name
            axes = (*axes, *[None] * (len(layer.shape) - len(axes)))
        found[path] = WeightRecord(
            shape=tuple(layer.shape),
            sparsity=layer.level,
            kept=layer.kept,
            pattern=to_text(layer.pattern),
            algorithm=type(layer.algorithm).__name__,
            start_step=getattr(layer.algorithm.updates, "start_step", 0),
            axes=axes,
            stack_axes=tuple(layer.stack_axes),
        )
    return found


def _read_record(path: epath.Path) -> dict[str, WeightRecord]:
    """The record at `path`; empty if there is none."""
    if not path.exists():
        return {}
    try:
        return record.read_record(path)
    except ValueError as e:
        raise ValueError(
            f"{path} is no record of a run's rules of sparsity ({type(e).__name__}: {e}); move it "
            "away to go on without it: then nothing checks that the run keeps its rules"
        ) from e


def _changes(before: Mapping[str, WeightRecord], plan: Plan, keys: tuple[str, ...]) -> list[str]:
    found = []
    for path, now in _record(plan).items():
        entry = before.get(path, WeightRecord())
        for key in keys:
            then, value = getattr(entry, key), getattr(now, key)
            if then not in (None, value):
                found.append(f"{key} of {path} was {then} and is {value}")
    return found


def _check_masks_will_fit(path: epath.Path, plan: Plan) -> None:
    """A sparse run may start from another's masks; what no update will change must fit as it is."""
    if not (match := re.search(r"checkpoint_(\d+)$", path.name)):
        return
    lasts = {p: layer.algorithm.updates.last for p, layer in plan.items()}
    stay = {p: plan[p] for p, last in lasts.items() if last is None or last < int(match[1])}
    changed = _changes(_read_record(path.parent / RECORD), stay, ("sparsity", "kept", "pattern"))
    if changed:
        raise ValueError(
            f"the masks of {path} were made by other rules of sparsity, and this run has no mask "
            f"update after step {match[1]} that would change them: "
            f"{first_few(changed, 6, '; ')}. Take the rules that made them, or a method and a "
            "schedule that update masks after that step"
        )


def _check_record(path: epath.Path, plan: Plan) -> None:
    if not path.exists():
        logging.warning("%s is missing: nothing checks that the run keeps its rules.", path)
    before = _read_record(path)
    started = _changes(before, plan, ("start_step",))
    if started:
        raise ValueError(
            f"{path.parent} holds a run whose mask updates count from another step: "
            f"{first_few(started, 1)}. A run that began with 'sparsity/from_dense.gin' is resumed "
            "with it, and with the INITIAL_CHECKPOINT_PATH that it began with; another run without"
        )
    changed = _changes(before, plan, ("sparsity", "kept", "pattern", "algorithm"))
    if changed:
        raise ValueError(
            f"{path.parent} holds a run with other rules of sparsity: "
            f"{first_few(changed, 2, '; ')}. To start afresh, set another MODEL_DIR; to resume, "
            "take the configuration that made it; to go on from its weights and masks with "
            "another, train in another MODEL_DIR with utils.RestoreCheckpointConfig.path set to "
            "its checkpoint"
        )


def has_masks(names: Iterable[str]) -> bool:
    """Whether a state with leaves of these names has masks."""
    return any(name.startswith(f"{SPARSITY}masks/") for name in names)


def check_leaves(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Compares the leaves under state/sparsity that a run has with those of a checkpoint.

    Raises:
      ValueError: they are others, or have other shapes.
    """
    # a run by sparsity/dense.gin has left a key, but no masks
    if expected and not found or has_masks(expected) and not has_masks(found):
        raise ValueError(
            f"{where} has no masks: a dense run made it, or one without sparsity/*.gin. To make "
            "masks from its weights, include 'sparsity/from_dense.gin' with its path in "
            "INITIAL_CHECKPOINT_PATH and train in another MODEL_DIR; to train sparse from scratch, "
            "set another MODEL_DIR"
        )

    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    other = _other_shapes(expected, found)
    explored = f"{SPARSITY}{EXPLORED}/"
    if (missing or unexpected) and all(n.startswith(explored) for n in missing + unexpected):
        now, then = ("tracks", "doesn't have") if missing else ("doesn't track", "has")
        raise ValueError(
            f"this run {now} which weights have ever been kept, which {where} {then}; resume with "
            f"t5x_sparsity.SparsityConfig.track_explored = {not missing}, as it began"
        )
    if missing or unexpected or other:
        differences = [
            f"{title} {first_few(names, 6, '; ')}"
            for title, names in (("missing", missing), ("unexpected", unexpected), ("and", other))
            if names
        ]
        raise ValueError(
            f"{where} was made with other rules of sparsity or by another algorithm: "
            f"{', '.join(differences)}. Resume with the configuration that made it, or start in "
            "another MODEL_DIR"
        )


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError where leaves differ in shape; the host reads one as it was saved."""
    other = _other_shapes(expected, found)
    if other:
        raise ValueError(f"in the checkpoint, {first_few(other, 6, '; ')}; {remedy}")


def _other_shapes(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    other = []
    for name, leaf in expected.items():
        # a state of axes has no shapes
        was, now = getattr(found.get(name), "shape", None), getattr(leaf, "shape", None)
        if None not in (was, now) and tuple(was) != tuple(now):
            other.append(f"{name} has shape {tuple(was)} where this run has {tuple(now)}")
    return other


def check_masks_will_change(plan: Plan, step: int) -> None:
    """Raises ValueError where a run that starts at `step` comes too late for its mask updates."""
    late = [s.last for s in update_schedules(plan) if s.last < step]
    if late:
        raise ValueError(
            f"the checkpoint is at step {step}, after the last mask update at step {max(late)}: "
            "the masks would never change. TRAIN_STEPS counts the steps before the checkpoint too, "
            "and shares such as MASK_UPDATE_END = 0.75 are of the steps from "
            "t5x_sparsity.Periodic.start_step to TRAIN_STEPS; set them so that updates come after "
            f"step {step}"
        )


def check_start_step(plan: Plan, step: int) -> None:
    """Raises ValueError where mask updates count from a step that a run at `step` is yet to reach.

    The step is then not the checkpoint's: it wasn't read, or not its step.
    """
    start = max((getattr(s, "start_step", 0) for s in update_schedules(plan)), default=0)
    if start > step:
        raise ValueError(
            f"the run starts at step {step}, but its mask updates count from step {start} "
            "(t5x_sparsity.Periodic.start_step, by 'sparsity/from_dense.gin' the step in the name "
            "of INITIAL_CHECKPOINT_PATH). If the checkpoint wasn't read, leave "
            "utils.RestoreCheckpointConfig.mode at 'specific'; if it was, and steps are to count "
            "anew, bind t5x_sparsity.Periodic.start_step and t5x_sparsity.OneShot.start_step to "
            f"{step}"
        )
