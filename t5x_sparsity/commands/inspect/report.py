"""What `t5x-sparsity inspect` says of one checkpoint."""

from collections.abc import Iterable, Sequence
from typing import Any

from t5x_sparsity.artifacts.checkpoint import Checkpoint, sparsity
from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray
from t5x_sparsity.artifacts.macros import macros_in, shown_macros
from t5x_sparsity.artifacts.record import WeightRecord
from t5x_sparsity.commands import one_line
from t5x_sparsity.commands.inspect.weights import Facts
from t5x_sparsity.commands.text import count, fact_table, format_bytes, shape_text
from t5x_sparsity.core.names import first_few

LAYOUTS = {"orbax": "Orbax", "t5x": "T5X's own"}
SHOWN = 12

_COLUMNS = (
    ("weight", "path", ""),
    ("shape", "shape", ""),
    ("weights", "size", ","),
    ("kept", "kept", ","),
    ("sparsity", "sparsity", ".2%"),
    ("target", "target", ".2%"),
    ("dead rows", "dead_rows", ","),
    ("dead columns", "dead_columns", ","),
    ("pattern found", "pattern", ""),
)


def describe(checkpoint: Checkpoint, weights: Sequence[Facts]) -> Facts:
    """All that is said of a checkpoint, from the facts of all its weights."""
    sparse = [w for w in weights if w["is_sparse"]]
    slots = sorted(checkpoint.slots.items())
    return {
        **made_by(checkpoint),
        "is_sparse": bool(sparse),
        "weights": weights,
        "total": {"sparse": {**_total(sparse), "target": _target(sparse)}, "all": _total(weights)},
        "bytes": {
            "weights": _nbytes(w.array for w in checkpoint.weights.values()),
            "masks": _nbytes(w.mask for w in checkpoint.masked),
            "method": sum(_nbytes(arrays) for _, arrays in slots),
            "optimizer": _nbytes(checkpoint.under("state/param_states/").values()),
        },
        "slots": {k: {"arrays": len(x), "bytes": _nbytes(x)} for k, x in slots},
        "notes": _notes(checkpoint, weights),
    }


def as_text(found: Facts, *, all_weights: bool) -> str:
    """The report for a person."""
    head = f"{found['path']}: step {found['step']:,}, {LAYOUTS[found['layout']]} layout"
    rows = {
        "method": ", ".join(found["algorithms"]),
        "pattern": ", ".join(found["patterns"]),
        "start step": ", ".join(f"{n:,}" for n in found["start_steps"]),
        **found["configuration"],
    }
    lines = [f"  {name:<24} {value}" for name, value in rows.items() if value]
    return "\n\n".join(["\n".join([head, *lines]), _table(found, all_weights), _summary(found)])


def _table(found: Facts, all_weights: bool) -> str:
    rows = [_row(w) for w in found["weights"] if w["is_sparse"] or all_weights]
    dense = [w for w in found["weights"] if not w["is_sparse"]]
    if dense and not all_weights:
        size = sum(w["size"] for w in dense)
        rows.append({"path": count(len(dense), "dense weight"), "size": size, "kept": size})
    if found["is_sparse"]:
        rows.append({**found["total"]["sparse"], "path": "total, sparse"})
    rows.append({**found["total"]["all"], "path": "total"})
    return fact_table(rows, _COLUMNS, align="lrrrrrrrl")


def _row(w: Facts) -> Facts:
    differs = f" (not {w['recorded_pattern']})" if w["follows_record"] is False else ""
    return {
        **w,
        "shape": shape_text(w["shape"]),
        "sparsity": w["sparsity"] if w["is_sparse"] else None,
        "pattern": w["pattern"] + differs,
    }


def _summary(found: Facts) -> str:
    lines = []
    if not found["is_sparse"]:
        lines.append("The checkpoint is dense: it has no masks, and none of its matrices a zero.")
    elif not found["masks"]:
        lines.append(
            "The checkpoint has no masks, as of a dense run: what counts as kept is what isn't "
            "zero, in matrices only."
        )
    nbytes = {name: format_bytes(n) for name, n in found["bytes"].items()}
    sizes = [f"weights {nbytes['weights']}"]
    if found["masks"]:
        sizes.append(f"masks {nbytes['masks']}")
    for name, slot in found["slots"].items():
        size, arrays = format_bytes(slot["bytes"]), count(slot["arrays"], "array")
        sizes.append(f"the method's {name} {size} in {arrays}")
    if found["bytes"]["optimizer"]:
        sizes.append(f"optimizer {nbytes['optimizer']}")
    return "\n".join([*lines, f"Sizes: {', '.join(sizes)}.", *found["notes"]])


def _notes(checkpoint: Checkpoint, weights: Sequence[Facts]) -> list[str]:
    """What a reader should know, one sentence each."""
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
    deep = [w["path"] for w in weights if w["is_sparse"] and len(w["shape"]) > 2]
    assumed = [p for p in deep if checkpoint.weights[p].record.stack_axes is None]
    if assumed:
        found.append(
            f"Which axes are stacked is not known for {first_few(assumed)}: each is taken as "
            "one matrix, its last axis the outputs."
        )
    broken = {w["path"]: w["pruned_nonzeros"] for w in weights if w["pruned_nonzeros"]}
    if broken:
        found.append(
            "Inconsistent: not zero where the mask prunes: "
            f"{count(sum(broken.values()), 'weight')} of {first_few([*broken], SHOWN)}."
        )
    zeros = sum(w["kept_zeros"] for w in weights)
    if zeros:
        found.append(f"Kept but exactly zero, as weights are that were just grown: {zeros:,}.")
    others: dict[str, list[str]] = {}
    for w in weights:
        if w["follows_record"] is False:
            others.setdefault(w["recorded_pattern"], []).append(w["path"])
    for pattern, paths in others.items():
        found.append(
            f"Not (yet) as sparsity.json says, {pattern}: {first_few(paths, SHOWN)}. Methods that "
            "prune by and by get there at the end."
        )
    return found


def made_by(checkpoint: Checkpoint) -> Facts:
    """Where a checkpoint is from; the method is that of the weights with a mask."""
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


def _total(weights: Sequence[Facts]) -> dict[str, Any]:
    size, kept = sum(w["size"] for w in weights), sum(w["kept"] for w in weights)
    return {
        "weights": len(weights),
        "size": size,
        "kept": kept,
        "sparsity": sparsity(kept, size),
        "dead_rows": sum(w["dead_rows"] or 0 for w in weights),
        "dead_columns": sum(w["dead_columns"] or 0 for w in weights),
    }


def _target(sparse: Sequence[Facts]) -> float | None:
    """The sparsity that the weights together are to have in the end, where known."""
    if not sparse or any(w["target"] is None for w in sparse):
        return None
    return sum(w["target"] * w["size"] for w in sparse) / sum(w["size"] for w in sparse)


def _nbytes(arrays: Iterable[SavedArray]) -> int:
    return sum(x.nbytes for x in arrays)
