"""What `t5x-sparsity inspect` prints of one checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from t5x_sparsity.artifacts.checkpoint import Checkpoint
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray
from t5x_sparsity.artifacts.gin_values import macros_in
from t5x_sparsity.artifacts.macros import shown_macros
from t5x_sparsity.artifacts.record import WeightRecord
from t5x_sparsity.commands import one_line
from t5x_sparsity.commands.inspect.weights import WeightFacts
from t5x_sparsity.commands.text import format_bytes
from t5x_sparsity.core.names import first_few
from t5x_sparsity.monitoring.text_table import text_table

LAYOUTS = {"orbax": "Orbax", "t5x": "T5X's own"}
SHOWN = 12

# what JSON says of the zeros found; null where nothing was looked for
_SIZES = ("rows", "columns", "dead_rows", "dead_columns")
_STRUCTURE = (
    "channels", "n_by_m_inputs", "n_by_m_outputs", "block", "fan_in", "fan_out",
    "at_most_2_4_inputs", "at_most_2_4_outputs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A checkpoint.

    Attributes:
      checkpoint: as it was opened.
      weights: what was found out about all of its weights.
    """

    checkpoint: Checkpoint
    weights: Sequence[WeightFacts]

    @property
    def sparse(self) -> list[WeightFacts]:
        """The weights with a mask, or with zeros that count as one."""
        return [w for w in self.weights if w.is_sparse]

    @property
    def target(self) -> float | None:
        """The sparsity that all sparse weights together are to have in the end, where known."""
        targets = [(w.weight.record.sparsity, w.size) for w in self.sparse]
        if not targets or any(target is None for target, _ in targets):
            return None
        return sum(target * size for target, size in targets) / sum(size for _, size in targets)

    def as_dict(self) -> dict[str, Any]:
        """For programs: plain numbers, counts in weights, sizes in bytes."""
        slots = sorted(self.checkpoint.slots.items())
        return {
            **made_by(self.checkpoint),
            "is_sparse": bool(self.sparse),
            "weights": [_weight_dict(w) for w in self.weights],
            "total": {
                "sparse": {**_totals(self.sparse), "target": self.target},
                "all": _totals(self.weights),
            },
            "bytes": self._bytes(),
            "slots": {k: {"arrays": len(x), "bytes": _nbytes(x)} for k, x in slots},
            "notes": self._notes(),
        }

    def as_text(self, *, all_weights: bool) -> str:
        """For a person."""
        made = made_by(self.checkpoint)
        head = f"{made['path']}: step {made['step']:,}, {LAYOUTS[made['layout']]} layout"
        rows = [
            ("method", ", ".join(made["algorithms"])),
            ("pattern", ", ".join(made["patterns"])),
            ("start step", ", ".join(f"{n:,}" for n in made["start_steps"])),
            *made["configuration"].items(),
        ]
        lines = [f"  {name:<24} {value}" for name, value in rows if value]
        parts = ["\n".join([head, *lines]), self._table(all_weights), self._summary()]
        return "\n\n".join(parts)

    def _bytes(self) -> dict[str, int]:
        return {
            "weights": _nbytes([w.weight.array for w in self.weights]),
            "masks": _nbytes([w.mask for w in self.checkpoint.masked]),
            "method": sum(map(_nbytes, self.checkpoint.slots.values())),
            "optimizer": _nbytes(self.checkpoint.under("state/param_states/").values()),
        }

    def _table(self, all_weights: bool) -> str:
        rows = [_weight_row(w) for w in self.weights if w.is_sparse or all_weights]
        dense = [w for w in self.weights if not w.is_sparse]
        if dense and not all_weights:
            size = f"{sum(w.size for w in dense):,}"
            rows.append((count(len(dense), "dense weight"), "", size, size, "", "", "", "", ""))
        if self.sparse:
            rows.append(self._total_row("total, sparse", self.sparse, self.target))
        rows.append(self._total_row("total", self.weights, None))
        headers = (
            "weight", "shape", "weights", "kept", "sparsity", "target", "dead rows", "dead columns",
            "pattern found",
        )  # fmt: skip
        return text_table(rows, headers=headers, align="lrrrrrrrl")

    def _total_row(self, name: str, rows: Sequence[WeightFacts], target: float | None) -> tuple:
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
        elif not self.checkpoint.masked:
            lines.append(
                "The checkpoint has no masks, as of a dense run: what counts as kept is what isn't "
                "zero, in matrices only."
            )
        nbytes = self._bytes()
        sizes = [f"weights {format_bytes(nbytes['weights'])}"]
        if self.checkpoint.masked:
            sizes.append(f"masks {format_bytes(nbytes['masks'])}")
        for name, arrays in sorted(self.checkpoint.slots.items()):
            size = format_bytes(_nbytes(arrays))
            sizes.append(f"the method's {name} {size} in {count(len(arrays), 'array')}")
        if nbytes["optimizer"]:
            sizes.append(f"optimizer {format_bytes(nbytes['optimizer'])}")
        lines.append(f"Sizes: {', '.join(sizes)}.")
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        """What a reader should know, one sentence each."""
        checkpoint = self.checkpoint
        found = skipped(checkpoint)
        if checkpoint.masked and not checkpoint.record:
            found.append(
                "There is no sparsity.json next to the checkpoint: targets, patterns asked for and "
                "stacked axes are not known."
            )
        fitting = {w.path for w in checkpoint.masked if w.record != WeightRecord()}
        strange = [p for p in checkpoint.record if p not in fitting]
        if strange:
            found.append(
                f"sparsity.json next to the checkpoint is not of its masks: {first_few(strange)} "
                "there without a mask of that shape here."
            )
        assumed = [
            w.path
            for w in self.sparse
            if len(w.weight.array.shape) > 2 and w.weight.record.stack_axes is None
        ]
        if assumed:
            found.append(
                f"Which axes are stacked is not known for {first_few(assumed)}: each is taken as "
                "one matrix, its last axis the outputs."
            )
        broken = [w for w in self.weights if w.pruned_nonzeros]
        if broken:
            total = sum(w.pruned_nonzeros for w in broken)
            found.append(
                f"Inconsistent: not zero where the mask prunes: {count(total, 'weight')} of "
                f"{first_few([w.path for w in broken], SHOWN)}."
            )
        zeros = sum(w.kept_zeros for w in self.weights)
        if zeros:
            found.append(f"Kept but exactly zero, as weights are that were just grown: {zeros:,}.")
        others: dict[str, list[WeightFacts]] = {}
        for w in self.weights:
            if w.differs:
                others.setdefault(w.weight.record.pattern or "", []).append(w)
        for pattern, weights in others.items():
            names = first_few([w.path for w in weights], SHOWN)
            found.append(
                f"Not (yet) as sparsity.json says, {pattern}: {names}. Methods that prune by and "
                "by get there at the end."
            )
        return found


def made_by(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where a checkpoint is from, for JSON; the method is that of the weights with a mask."""
    records = [w.record for w in checkpoint.masked]

    def distinct(key: str) -> list:
        return sorted({getattr(r, key) for r in records} - {None})

    return {
        "path": checkpoint.path,
        "step": checkpoint.step,
        "layout": checkpoint.layout,
        "masks": len(checkpoint.masked),
        "algorithms": distinct("algorithm"),
        "patterns": distinct("pattern"),
        "start_steps": distinct("start_step"),
        "configuration": _macros(checkpoint.config_gin),
    }


def _macros(path: str | None) -> dict[str, str]:
    """The macros of a config.gin that matter here, each with its value as gin wrote it."""
    if path is None:
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    shown = shown_macros()
    return {name: one_line(v) for name, v in macros_in(text).items() if name in shown}


def skipped(checkpoint: Checkpoint) -> list[str]:
    """A sentence on newer folders that hold no complete checkpoint, if there are any."""
    names = first_few(checkpoint.skipped)
    says = f"{checkpoint.path} is the last complete one; skipped as half-written: {names}."
    return [says] if names else []


def _weight_row(w: WeightFacts) -> tuple[str, ...]:
    record, found = w.weight.record, w.found
    return (
        w.path,
        shape_text(w.weight.array.shape),
        f"{w.size:,}",
        f"{w.kept:,}",
        f"{w.sparsity:.2%}" if w.is_sparse else "",
        "" if record.sparsity is None else f"{record.sparsity:.2%}",
        *(("", "") if found is None else (f"{found.dead_rows:,}", f"{found.dead_columns:,}")),
        w.pattern + (f" (not {record.pattern})" if w.differs else ""),
    )


def _weight_dict(w: WeightFacts) -> dict[str, Any]:
    weight, record = w.weight, w.weight.record
    return {
        "path": w.path,
        "shape": list(weight.array.shape),
        "dtype": weight.array.dtype.name,
        "stack_axes": list(weight.axes.stack),
        "input_axes": list(weight.axes.inputs),
        "output_axes": list(weight.axes.outputs),
        "has_mask": weight.mask is not None,
        "is_sparse": w.is_sparse,
        "size": w.size,
        "kept": w.kept,
        "nonzero": w.nonzero,
        "kept_zeros": w.kept_zeros,
        "pruned_nonzeros": w.pruned_nonzeros,
        "sparsity": w.sparsity,
        "target": record.sparsity,
        **{name: getattr(w.found, name, None) for name in _SIZES},
        "pattern": w.pattern,
        **{name: getattr(w.found, name, None) for name in _STRUCTURE},
        "recorded_pattern": record.pattern or None,
        "recorded_algorithm": record.algorithm or None,
        "follows_record": w.found and w.found.follows,
    }


def _totals(rows: Sequence[WeightFacts]) -> dict[str, Any]:
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


def _nbytes(arrays: Iterable[SavedArray]) -> int:
    return sum(x.nbytes for x in arrays)


def shape_text(shape: Sequence[int]) -> str:
    """A shape, such as 2x3."""
    return "x".join(map(str, shape))


def count(n: int, what: str) -> str:
    """How many there are, such as '2 arrays'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
