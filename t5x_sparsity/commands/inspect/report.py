"""What `t5x-sparsity inspect` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_sparsity.commands.inspect.weights import Comparison, Weight, total
from t5x_sparsity.commands.text import first_few, format_bytes
from t5x_sparsity.monitoring.text_table import text_table

_LAYOUTS = {"orbax": "Orbax", "t5x": "T5X's own"}
_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeBy:
    """Where a checkpoint is from.

    Attributes:
      path: its folder.
      step: of training.
      layout: 'orbax' or 't5x'.
      masks: how many it has.
      algorithms: names of those that made its masks, by sparsity.json.
      patterns: reprs of theirs.
      start_steps: the steps from which their mask updates count.
      configuration: macros of config.gin, each with its value as gin wrote it.
    """

    path: str
    step: int
    layout: str
    masks: int
    algorithms: Sequence[str]
    patterns: Sequence[str]
    start_steps: Sequence[int]
    configuration: Mapping[str, str]

    def as_text(self) -> str:
        """For a person."""
        head = f"{self.path}: step {self.step:,}, {_LAYOUTS[self.layout]} layout"
        rows = [
            ("method", ", ".join(self.algorithms)),
            ("pattern", ", ".join(self.patterns)),
            ("start step", ", ".join(f"{n:,}" for n in self.start_steps)),
            *self.configuration.items(),
        ]
        lines = [f"  {name:<24} {value}" for name, value in rows if value]
        return "\n".join([head, *lines])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A checkpoint.

    Attributes:
      made_by: where it is from.
      weights: all of them.
      bytes: by kind: 'weights', 'masks', 'method' (the slots), 'optimizer'.
      slots: name -> arrays and bytes of what the method keeps beside masks.
      notes: what a reader should know, a sentence each.
    """

    made_by: MadeBy
    weights: Sequence[Weight]
    bytes: Mapping[str, int]
    slots: Mapping[str, tuple[int, int]]
    notes: Sequence[str]

    @property
    def sparse(self) -> list[Weight]:
        """The weights with a mask, or with zeros that count as one."""
        return [w for w in self.weights if w.is_sparse]

    @property
    def target(self) -> float | None:
        """The sparsity that all sparse weights together are to have in the end, where known."""
        rows = self.sparse
        if not rows or any(w.target is None for w in rows):
            return None
        return sum(w.target * w.size for w in rows) / sum(w.size for w in rows)

    def as_dict(self) -> dict[str, Any]:
        """For programs: plain numbers, counts in weights, sizes in bytes."""
        return {
            **dataclasses.asdict(self.made_by),
            "is_sparse": bool(self.sparse),
            "weights": [_weight_dict(w) for w in self.weights],
            "total": {
                "sparse": {**_totals(self.sparse), "target": self.target},
                "all": _totals(self.weights),
            },
            "bytes": dict(self.bytes),
            "slots": {k: {"arrays": n, "bytes": size} for k, (n, size) in self.slots.items()},
            "notes": [*self.notes, *self._findings()],
        }

    def as_text(self, *, all_weights: bool) -> str:
        """For a person."""
        parts = [self.made_by.as_text(), self._table(all_weights), self._summary()]
        return "\n\n".join(parts)

    def _table(self, all_weights: bool) -> str:
        rows = [_weight_row(w) for w in self.weights if w.is_sparse or all_weights]
        dense = [w for w in self.weights if not w.is_sparse]
        if dense and not all_weights:
            size = f"{sum(w.size for w in dense):,}"
            rows.append((_count(len(dense), "dense weight"), "", size, size, "", "", "", "", ""))
        if self.sparse:
            rows.append(self._total_row("total, sparse", self.sparse, self.target))
        rows.append(self._total_row("total", self.weights, None))
        headers = (
            "weight", "shape", "weights", "kept", "sparsity", "target", "dead rows", "dead columns",
            "pattern found",
        )  # fmt: skip
        return text_table(rows, headers=headers, align="lrrrrrrrl")

    def _total_row(self, name: str, rows: Sequence[Weight], target: float | None) -> tuple:
        t = _totals(rows)
        return (
            name, "", f"{t['size']:,}", f"{t['kept']:,}", f"{t['sparsity']:.2%}",
            "" if target is None else f"{target:.2%}", f"{t['dead_rows']:,}",
            f"{t['dead_columns']:,}", "",
        )  # fmt: skip

    def _summary(self) -> str:
        lines = []
        if not self.sparse:
            lines.append(
                "The checkpoint is dense: it has no masks, and none of its matrices a zero."
            )
        elif not self.made_by.masks:
            lines.append(
                "The checkpoint has no masks, as of a dense run: what counts as kept is what isn't "
                "zero, in matrices only."
            )
        sizes = [f"weights {format_bytes(self.bytes['weights'])}"]
        if self.made_by.masks:
            sizes.append(f"masks {format_bytes(self.bytes['masks'])}")
        for name, (count, size) in self.slots.items():
            sizes.append(f"the method's {name} {format_bytes(size)} in {_count(count, 'array')}")
        if self.bytes["optimizer"]:
            sizes.append(f"optimizer {format_bytes(self.bytes['optimizer'])}")
        lines.append(f"Sizes: {', '.join(sizes)}.")
        return "\n".join([*lines, *self.notes, *self._findings()])

    def _findings(self) -> list[str]:
        """What is odd about the weights, a sentence each."""
        found = []
        broken = [w for w in self.weights if w.pruned_nonzeros]
        if broken:
            count = sum(w.pruned_nonzeros for w in broken)
            found.append(
                f"Inconsistent: not zero where the mask prunes: {_count(count, 'weight')} of "
                f"{first_few([w.path for w in broken], _SHOWN)}."
            )
        zeros = sum(w.kept_zeros for w in self.weights)
        if zeros:
            found.append(f"Kept but exactly zero, as weights are that were just grown: {zeros:,}.")
        others: dict[str, list[Weight]] = {}
        for w in self.weights:
            if w.found is not None and w.found.follows is False:
                others.setdefault(w.pattern, []).append(w)
        for pattern, weights in others.items():
            names = first_few([w.path for w in weights], _SHOWN)
            found.append(
                f"Not (yet) as sparsity.json says, {pattern}: {names}. Methods that prune by and "
                "by get there at the end."
            )
        return found


def _weight_row(w: Weight) -> tuple[str, ...]:
    dead = ("", "") if w.found is None else (f"{w.found.dead_rows:,}", f"{w.found.dead_columns:,}")
    differs = w.found is not None and w.found.follows is False
    return (
        w.path,
        _shape(w.shape),
        f"{w.size:,}",
        f"{w.kept:,}",
        f"{w.sparsity:.2%}" if w.is_sparse else "",
        "" if w.target is None else f"{w.target:.2%}",
        *dead,
        w.found_pattern + (f" (not {w.pattern})" if differs else ""),
    )


def _weight_dict(w: Weight) -> dict[str, Any]:
    found = w.found
    return {
        "path": w.path,
        "shape": list(w.shape),
        "dtype": w.dtype,
        "stack_axes": list(w.axes.stack),
        "input_axes": list(w.axes.inputs),
        "output_axes": list(w.axes.outputs),
        "has_mask": w.has_mask,
        "is_sparse": w.is_sparse,
        "size": w.size,
        "kept": w.kept,
        "nonzero": w.nonzero,
        "kept_zeros": w.kept_zeros,
        "pruned_nonzeros": w.pruned_nonzeros,
        "sparsity": w.sparsity,
        "target": w.target,
        "rows": found and found.rows,
        "columns": found and found.columns,
        "dead_rows": found and found.dead_rows,
        "dead_columns": found and found.dead_columns,
        "pattern": w.found_pattern,
        "channels": found and found.channels,
        "n_by_m_inputs": found and found.n_by_m_inputs,
        "n_by_m_outputs": found and found.n_by_m_outputs,
        "block": found and found.block,
        "fan_in": found and found.fan_in,
        "fan_out": found and found.fan_out,
        "at_most_2_4_inputs": found and found.at_most_2_4_inputs,
        "at_most_2_4_outputs": found and found.at_most_2_4_outputs,
        "recorded_pattern": w.pattern or None,
        "recorded_algorithm": w.algorithm or None,
        "follows_record": found and found.follows,
    }


def _totals(rows: Sequence[Weight]) -> dict[str, Any]:
    size, kept = sum(w.size for w in rows), sum(w.kept for w in rows)
    found = [w.found for w in rows if w.found is not None]
    return {
        "weights": len(rows),
        "size": size,
        "kept": kept,
        "sparsity": 1 - kept / size if size else 0.0,
        "dead_rows": sum(f.dead_rows for f in found),
        "dead_columns": sum(f.dead_columns for f in found),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Two checkpoints, A and B.

    Attributes:
      made_by: where A is from.
      other_made_by: where B is from.
      weights: those that both have, in one shape.
      only_here: paths of weights that only A has.
      only_there: paths of weights that only B has.
      other_shape: path -> shapes in A and in B, where they differ.
      notes: what a reader should know, a sentence each.
    """

    made_by: MadeBy
    other_made_by: MadeBy
    weights: Sequence[Comparison]
    only_here: Sequence[str]
    only_there: Sequence[str]
    other_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    notes: Sequence[str]

    @property
    def sparse(self) -> list[Comparison]:
        """The weights of which either prunes some."""
        return [w for w in self.weights if w.is_sparse]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "checkpoint": dataclasses.asdict(self.made_by),
            "other": dataclasses.asdict(self.other_made_by),
            "weights": [_comparison_dict(w) for w in self.weights],
            "total": {
                "sparse": _comparison_dict(total(self.sparse)),
                "all": _comparison_dict(total(self.weights)),
            },
            "only_in_checkpoint": list(self.only_here),
            "only_in_other": list(self.only_there),
            "other_shape": {p: [list(a), list(b)] for p, (a, b) in self.other_shape.items()},
            "notes": list(self.notes),
        }

    def as_text(self, *, all_weights: bool) -> str:
        """For a person."""
        head = "\n".join(
            f"{name}: {m.path}: step {m.step:,}, {_LAYOUTS[m.layout]} layout, "
            + (f"sparse by {', '.join(m.algorithms) or 'its masks'}" if m.masks else "no masks")
            for name, m in (("A", self.made_by), ("B", self.other_made_by))
        )
        lines = []
        if not self.sparse:
            lines.append("Neither prunes any of the weights that both have.")
        for title, names in (
            ("Only in A", self.only_here),
            ("Only in B", self.only_there),
            (
                "Of another shape, and left out",
                [f"{p} ({_shape(a)}, {_shape(b)})" for p, (a, b) in self.other_shape.items()],
            ),
        ):
            if names:
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"{title}: {', '.join(names[:_SHOWN])}{more}.")
        parts = [head, self._table(all_weights), "\n".join([*lines, *self.notes])]
        return "\n\n".join(p for p in parts if p)

    def _table(self, all_weights: bool) -> str:
        rows = [_comparison_row(w) for w in self.weights if w.is_sparse or all_weights]
        dense = [w for w in self.weights if not w.is_sparse]
        if dense and not all_weights:
            name = _count(len(dense), "dense weight")
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


def _comparison_dict(w: Comparison) -> dict[str, Any]:
    return {
        "path": w.path,
        "shape": list(w.shape),
        "size": w.size,
        "kept": w.kept,
        "other_kept": w.other_kept,
        "both": w.both,
        "overlap": w.overlap,
        "share_kept": w.share_kept,
        "churn": w.churn,
        "change": w.change,
        "is_sparse": w.is_sparse,
    }


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
