"""`t5x-sparsity inspect`: what a checkpoint's zeros look like, or how two checkpoints differ."""

from __future__ import annotations

import json

from t5x_sparsity.artifacts.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from t5x_sparsity.artifacts.gin_values import macros_in
from t5x_sparsity.artifacts.macros import shown_macros
from t5x_sparsity.artifacts.record import WeightRecord
from t5x_sparsity.commands import CommandError, one_line
from t5x_sparsity.commands.inspect.options import InspectOptions
from t5x_sparsity.commands.inspect.report import ComparisonReport, MadeBy, Report
from t5x_sparsity.commands.inspect.weights import Weight, compare_weight, read_weight
from t5x_sparsity.commands.output import progress
from t5x_sparsity.commands.text import first_few


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
    with progress("reading", sum(x.nbytes for x in checkpoint.weights.values())) as done:
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
    with progress("comparing", sum(a.weights[p].nbytes for p in fitting)) as done:
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
    shown = shown_macros()
    return {name: one_line(v) for name, v in macros_in(text).items() if name in shown}


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
            f"sparsity.json beside the checkpoint is not of its masks: {first_few(strange)} there "
            "without a mask of that shape here."
        )
    assumed = [
        w.path
        for w in weights
        if w.is_sparse and len(w.shape) > 2 and not checkpoint.knows_stack_axes(w.path)
    ]
    if assumed:
        notes.append(
            f"Which axes are stacked is not known for {first_few(assumed)}: each is taken as one "
            "matrix, its last axis the outputs."
        )
    return notes


def _passed_over(checkpoint: Checkpoint) -> list[str]:
    if not checkpoint.passed_over:
        return []
    names = first_few(checkpoint.passed_over)
    return [f"{checkpoint.path} is the last complete one; passed over as half-written: {names}."]
