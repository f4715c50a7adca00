"""What `t5x-sparsity inspect --compare` says of two checkpoints, A and B."""

from collections import Counter
from collections.abc import Mapping

from t5x_sparsity.artifacts.checkpoint import Checkpoint
from t5x_sparsity.commands.inspect.report import LAYOUTS, SHOWN, made_by, skipped
from t5x_sparsity.commands.inspect.weights import Facts, comparison
from t5x_sparsity.commands.text import count, fact_table, shape_text
from t5x_sparsity.core.names import first_few

_COLUMNS = (
    ("weight", "path", ""),
    ("weights", "size", ","),
    ("kept in A", "kept", ","),
    ("kept in B", "other_kept", ","),
    ("overlap", "overlap", ".2%"),
    ("kept of A", "share_kept", ".2%"),
    ("churn", "churn", ".2%"),
    ("moved", "change", ".4g"),
)


def describe(a: Checkpoint, b: Checkpoint, sums: Mapping[str, Counter]) -> Facts:
    """All that is said of two checkpoints, from the sums of the weights that fit, by path."""
    weights = [comparison(p, a.weights[p].array.shape, [s]) for p, s in sums.items()]
    sparse = [sums[w["path"]] for w in weights if w["is_sparse"]]
    shapes = {
        p: [list(c.weights[p].array.shape) for c in (a, b)]
        for p in sorted(a.weights.keys() & b.weights.keys())
    }
    return {
        "checkpoint": made_by(a),
        "other": made_by(b),
        "weights": weights,
        "total": {
            "sparse": comparison("total", (), sparse),
            "all": comparison("total", (), sums.values()),
        },
        "only_in_checkpoint": sorted(a.weights.keys() - b.weights.keys()),
        "only_in_other": sorted(b.weights.keys() - a.weights.keys()),
        "other_shape": {p: [x, y] for p, (x, y) in shapes.items() if x != y},
        "notes": [*skipped(a), *skipped(b)],
    }


def as_text(found: Facts, sums: Mapping[str, Counter], *, all_weights: bool) -> str:
    """The report for a person."""
    head = "\n".join(
        f"{name}: {c['path']}: step {c['step']:,}, {LAYOUTS[c['layout']]} layout, {_method(c)}"
        for name, c in (("A", found["checkpoint"]), ("B", found["other"]))
    )
    lines = []
    if not any(w["is_sparse"] for w in found["weights"]):
        lines.append("Neither prunes any of the weights that both have.")
    reshaped = [
        f"{path} ({', '.join(map(shape_text, shapes))})"
        for path, shapes in found["other_shape"].items()
    ]
    for title, names in (
        ("Only in A", found["only_in_checkpoint"]),
        ("Only in B", found["only_in_other"]),
        ("Of another shape, and left out", reshaped),
    ):
        if names:
            lines.append(f"{title}: {first_few(names, SHOWN)}.")
    parts = [head, _table(found, sums, all_weights), "\n".join([*lines, *found["notes"]])]
    return "\n\n".join(p for p in parts if p)


def _table(found: Facts, sums: Mapping[str, Counter], all_weights: bool) -> str:
    weights, total = found["weights"], found["total"]
    rows = [w for w in weights if w["is_sparse"] or all_weights]
    dense = [sums[w["path"]] for w in weights if not w["is_sparse"]]
    if dense and not all_weights:
        rows.append(comparison(count(len(dense), "dense weight"), (), dense))
    if 0 < len(dense) < len(weights):
        rows.append({**total["sparse"], "path": "total, sparse"})
    rows.append(total["all"])
    return fact_table(map(_row, rows), _COLUMNS, align="lrrrrrrr")


def _row(w: Facts) -> Facts:
    """What is no number is '-', and masks are compared only where there are any."""
    shown = {key: "-" if value is None else value for key, value in w.items()}
    hidden = () if w["is_sparse"] else ("overlap", "share_kept", "churn")
    return shown | dict.fromkeys(hidden)


def _method(made: Facts) -> str:
    if not made["masks"]:
        return "no masks"
    return f"sparse by {', '.join(made['algorithms']) or 'its masks'}"
