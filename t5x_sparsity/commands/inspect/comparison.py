"""What `t5x-sparsity inspect --compare` prints of two checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from t5x_sparsity.artifacts.checkpoint import Checkpoint
from t5x_sparsity.commands.inspect.report import (
    LAYOUTS,
    SHOWN,
    count,
    made_by,
    shape_text,
    skipped,
)
from t5x_sparsity.commands.inspect.weights import Comparison, total
from t5x_sparsity.core.names import first_few
from t5x_sparsity.monitoring.text_table import text_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Two checkpoints, A and B.

    Attributes:
      checkpoint: A, as it was opened.
      other: B.
      weights: those that both have, in one shape.
    """

    checkpoint: Checkpoint
    other: Checkpoint
    weights: Sequence[Comparison]

    @property
    def sparse(self) -> list[Comparison]:
        """The weights of which either prunes some."""
        return [w for w in self.weights if w.is_sparse]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "checkpoint": made_by(self.checkpoint),
            "other": made_by(self.other),
            "weights": [_comparison_dict(w) for w in self.weights],
            "total": {
                "sparse": _comparison_dict(total(self.sparse)),
                "all": _comparison_dict(total(self.weights)),
            },
            "only_in_checkpoint": self._only_in(self.checkpoint),
            "only_in_other": self._only_in(self.other),
            "other_shape": {p: [list(a), list(b)] for p, (a, b) in self._other_shape().items()},
            "notes": self._notes(),
        }

    def as_text(self, *, all_weights: bool) -> str:
        """For a person."""
        head = "\n".join(
            f"{name}: {c.path}: step {c.step:,}, {LAYOUTS[c.layout]} layout, {_method(c)}"
            for name, c in (("A", self.checkpoint), ("B", self.other))
        )
        lines = []
        if not self.sparse:
            lines.append("Neither prunes any of the weights that both have.")
        for title, names in (
            ("Only in A", self._only_in(self.checkpoint)),
            ("Only in B", self._only_in(self.other)),
            (
                "Of another shape, and left out",
                [
                    f"{p} ({shape_text(a)}, {shape_text(b)})"
                    for p, (a, b) in self._other_shape().items()
                ],
            ),
        ):
            if names:
                lines.append(f"{title}: {first_few(names, SHOWN)}.")
        parts = [head, self._table(all_weights), "\n".join([*lines, *self._notes()])]
        return "\n\n".join(p for p in parts if p)

    def _only_in(self, checkpoint: Checkpoint) -> list[str]:
        other = self.other if checkpoint is self.checkpoint else self.checkpoint
        return sorted(checkpoint.weights.keys() - other.weights.keys())

    def _other_shape(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Path -> shapes in A and in B, of the weights whose shapes differ."""
        a, b = self.checkpoint.weights, self.other.weights
        shapes = {p: (a[p].array.shape, b[p].array.shape) for p in sorted(a.keys() & b.keys())}
        return {p: (here, there) for p, (here, there) in shapes.items() if here != there}

    def _notes(self) -> list[str]:
        return [*skipped(self.checkpoint), *skipped(self.other)]

    def _table(self, all_weights: bool) -> str:
        rows = [_comparison_row(w) for w in self.weights if w.is_sparse or all_weights]
        dense = [w for w in self.weights if not w.is_sparse]
        if dense and not all_weights:
            name = count(len(dense), "dense weight")
            rows.append(_comparison_row(total(dense), name))
        if self.sparse and dense:
            rows.append(_comparison_row(total(self.sparse), "total, sparse"))
        rows.append(_comparison_row(total(self.weights), "total"))
        headers = (
            "weight", "weights", "kept in A", "kept in B", "overlap", "kept of A", "churn", "moved",
        )  # fmt: skip
        return text_table(rows, headers=headers, align="lrrrrrrr")


def _comparison_row(w: Comparison, name: str | None = None) -> tuple[str, ...]:
    def share(x):
        return "-" if x is None else f"{x:.2%}"

    shares = (w.overlap, w.share_kept, w.churn)
    return (
        name or w.path,
        f"{w.size:,}",
        f"{w.kept:,}",
        f"{w.other_kept:,}",
        *(share(x) if w.is_sparse else "" for x in shares),
        "-" if w.change is None else f"{w.change:.4g}",
    )


def _method(checkpoint: Checkpoint) -> str:
    if not checkpoint.masked:
        return "no masks"
    return f"sparse by {', '.join(made_by(checkpoint)['algorithms']) or 'its masks'}"


_JSON = (
    "path", "shape", "size", "kept", "other_kept", "both", "overlap", "share_kept", "churn",
    "change", "is_sparse",
)  # fmt: skip


def _comparison_dict(w: Comparison) -> dict[str, Any]:
    return {name: getattr(w, name) for name in _JSON}
