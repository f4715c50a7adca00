"""`t5x-sparsity inspect`: what a checkpoint's zeros look like, or how two checkpoints differ."""

import json
from collections import Counter

from t5x_sparsity.artifacts.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from t5x_sparsity.commands import CommandError, one_line
from t5x_sparsity.commands.inspect import comparison, report
from t5x_sparsity.commands.inspect.options import InspectOptions
from t5x_sparsity.commands.inspect.weights import compare, look_at_all
from t5x_sparsity.commands.output import progress


def run(options: InspectOptions) -> int:
    """Prints what was found; returns the exit code.

    Raises:
      CommandError: a checkpoint can't be read, or the two have nothing to compare.
    """
    try:
        checkpoint = open_checkpoint(options.checkpoint)
        if options.compare is None:
            facts = look_at_all(checkpoint.weights.values())
            found = report.describe(checkpoint, facts)
        else:
            other = open_checkpoint(options.compare)
            sums = _sums(checkpoint, other)
            found = comparison.describe(checkpoint, other, sums)
    except (CheckpointError, OSError) as e:
        raise CommandError(one_line(e)) from e
    if options.json:
        text = json.dumps(found, indent=1, allow_nan=False)
    elif options.compare is None:
        text = report.as_text(found, all_weights=options.all)
    else:
        text = comparison.as_text(found, sums, all_weights=options.all)
    print(text)
    return 0


def _sums(a: Checkpoint, b: Checkpoint) -> dict[str, Counter]:
    """Sums over each weight that both have, in one shape."""
    common = sorted(a.weights.keys() & b.weights.keys())
    pairs = [(a.weights[p], b.weights[p]) for p in common]
    fitting = [(x, y) for x, y in pairs if x.array.shape == y.array.shape]
    if not fitting:
        raise CommandError(_nothing_in_common(a, b, common))
    with progress("comparing", sum(x.array.nbytes for x, _ in fitting)) as done:
        return {x.path: compare(x, y, done) for x, y in fitting}


def _nothing_in_common(a: Checkpoint, b: Checkpoint, common: list[str]) -> str:
    if common:
        x, y = (c.weights[common[0]].array.shape for c in (a, b))
        return (
            f"{a.path} and {b.path} are of models of other sizes: each of the {len(common)} "
            f"weights that both have has another shape, such as {common[0]}: {x} and {y}; give "
            "checkpoints of one model"
        )
    return (
        f"{a.path} and {b.path} have no weight in common: the one has {min(a.weights)}, the other "
        f"{min(b.weights)}, for instance; give checkpoints of one model"
    )
