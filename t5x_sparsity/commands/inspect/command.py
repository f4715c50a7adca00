"""`t5x-sparsity inspect`: what a checkpoint's zeros look like, or how two checkpoints differ."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator

from t5x_sparsity.artifacts.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from t5x_sparsity.artifacts.record import WeightRecord
from t5x_sparsity.commands import CommandError, one_line
from t5x_sparsity.commands.inspect.options import InspectOptions
from t5x_sparsity.commands.inspect.report import ComparisonReport, MadeBy, Report
from t5x_sparsity.commands.inspect.weights import Weight, compare_weight, read_weight

# Macros of config.gin that say how a run was made sparse, and what it was.
_SHOWN = re.compile(
    r"SPARSITY|SPARSITY_\w+|\w+_SPARSITY(_\w+)?|MASK_UPDATE_\w+|NM_[NM]|DROP_FRACTION|NORMALIZATION"
    r"|GRADIENT_\w+|ABLATION_THRESHOLD|RESET_OPTIMIZER|REGULARIZER|PRUNED_WEIGHT_DECAY"
    r"|INITIAL_CHECKPOINT_PATH|TRAIN_STEPS|OPTIMIZER|LEARNING_RATE\w*|BATCH_SIZE|MODEL"
    r"|MIXTURE_OR_TASK_NAME|RANDOM_SEED"
)
_FEW = 3


def run(options: InspectOptions) -> int:
    """Prints what was found; returns the exit code.

    Raises:
      CommandError: a checkpoint can't be read, or the two have nothing to compare.
    """
    try:
        report = _compare(options) if options.compare is not None else _inspect(options)
    except (CheckpointError, OSError) as e:
        raise CommandError(one_line(e)) from e
    if options.json:
        print(json.dumps(report.as_dict(), indent=1, allow_nan=False))
    else:
        print(report.as_text(all_weights=options.all))
    return 0


def _inspect(options: InspectOptions) -> Report:
    checkpoint = open_checkpoint(options.checkpoint)
    paths = sorted(checkpoint.weights)
    with _progress("reading", sum(x.nbytes for x in checkpoint.weights.values())) as done:
        weights = [read_weight(checkpoint, p, done) for p in paths]
    return Report(
        made_by=_made_by(checkpoint),
        weights=weights,
        bytes={
            "weights": sum(x.nbytes for x in checkpoint.weights.values()),
            "masks": sum(x.nbytes for x in checkpoint.masks.values()),
            "method": sum(x.nbytes for arrays in checkpoint.slots.values() for x in arrays),
            "optimizer": sum(
                x.nbytes
                for name, x in checkpoint.leaves.items()
                if name.startswith("state/param_states/")
            ),
        },
        slots={
            name: (len(arrays), sum(x.nbytes for x in arrays))
            for name, arrays in sorted(checkpoint.slots.items())
        },
        notes=_notes(checkpoint, weights),
    )


def _compare(options: InspectOptions) -> ComparisonReport:
    a, b = open_checkpoint(options.checkpoint), open_checkpoint(options.compare)
    common = sorted(a.weights.keys() & b.weights.keys())
    fitting = [p for p in common if a.weights[p].shape == b.weights[p].shape]
    if not fitting:
        raise CommandError(_nothing_in_common(a, b, common))
    with _progress("comparing", sum(a.weights[p].nbytes for p in fitting)) as done:
        weights = [compare_weight(a, b, p, done) for p in fitting]
    return ComparisonReport(
        made_by=_made_by(a),
        other_made_by=_made_by(b),
        weights=weights,
        only_here=sorted(a.weights.keys() - b.weights.keys()),
        only_there=sorted(b.weights.keys() - a.weights.keys()),
        other_shape={
            p: (a.weights[p].shape, b.weights[p].shape) for p in common if p not in set(fitting)
        },
        notes=[*_passed_over(a), *_passed_over(b)],
    )


def _nothing_in_common(a: Checkpoint, b: Checkpoint, common: list[str]) -> str:
    if common:
        shapes = f"{a.weights[common[0]].shape} and {b.weights[common[0]].shape}"
        return (
            f"{a.path} and {b.path} are of models of other sizes: each of the {len(common)} "
            f"weights that both have has another shape, such as {common[0]}: {shapes}; give "
            "checkpoints of one model"
        )
    return (
        f"{a.path} and {b.path} have no weight in common: the one has {min(a.weights)}, the other "
        f"{min(b.weights)}, for instance; give checkpoints of one model"
    )


def _made_by(checkpoint: Checkpoint) -> MadeBy:
    entries = [checkpoint.record_of(p) for p in checkpoint.masks]
    return MadeBy(
        path=checkpoint.path,
        step=checkpoint.step,
        layout=checkpoint.layout,
        masks=len(checkpoint.masks),
        algorithms=_distinct(entries, "algorithm"),
        patterns=_distinct(entries, "pattern"),
        start_steps=_distinct(entries, "start_step"),
        configuration=_macros(checkpoint.config_gin),
    )


def _distinct(entries: list[WeightRecord], key: str) -> list:
    return sorted({getattr(e, key) for e in entries} - {None})


def _macros(path: str | None) -> dict[str, str]:
    """The macros of a config.gin that matter here, each with its value as gin wrote it."""
    if path is None:
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    # gin breaks a long value after a backslash, and indents the rest
    text = re.sub(r"\\\n\s+", "", text)
    found = re.findall(r"^([A-Z][A-Z0-9_]*) = (.*(?:\n[ \t]+.*)*)", text, re.MULTILINE)
    return {name: one_line(value) for name, value in found if _SHOWN.fullmatch(name)}


def _notes(checkpoint: Checkpoint, weights: list[Weight]) -> list[str]:
    notes = _passed_over(checkpoint)
    if checkpoint.masks and not checkpoint.record:
        notes.append(
            "There is no sparsity.json beside the checkpoint: targets, patterns asked for and "
            "stacked axes are not known."
        )
    strange = [
        p
        for p in checkpoint.record
        if p not in checkpoint.masks or checkpoint.record_of(p) == WeightRecord()
    ]
    if strange:
        notes.append(
            f"sparsity.json beside the checkpoint is not of its masks: {_few(strange)} there "
            "without a mask of that shape here."
        )
    assumed = [
        w.path
        for w in weights
        if w.is_sparse and len(w.shape) > 2 and not checkpoint.knows_stack_axes(w.path)
    ]
    if assumed:
        notes.append(
            f"Which axes are stacked is not known for {_few(assumed)}: each is taken as one "
            "matrix, its last axis the outputs."
        )
    return notes


def _passed_over(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.passed_over:
        return []
    names = _few(checkpoint.passed_over)
    return [f"{checkpoint.path} is the last complete one; passed over as half-written: {names}."]


def _few(names) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(list(names)[:_FEW]) + more


@contextlib.contextmanager
def _progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how far it is; gives what is to be told of bytes as they are read."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=size)
        yield lambda n: bar.advance(task, n)
