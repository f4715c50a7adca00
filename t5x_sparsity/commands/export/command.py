"""`t5x-sparsity export`: a checkpoint's weights as one safetensors file."""

import json
from typing import Any

from t5x_sparsity.artifacts.checkpoint import open_checkpoint
from t5x_sparsity.artifacts.export import export, totals
from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.export.options import ExportOptions
from t5x_sparsity.commands.output import status
from t5x_sparsity.commands.text import count, fact_table, format_bytes, shape_text

_COLUMNS = (
    ("weight", "path", ""),
    ("shape", "shape", ""),
    ("dtype", "dtype", ""),
    ("encoding", "encoding", ""),
    ("sparsity", "sparsity", ".2%"),
    ("dense bytes", "dense_bytes", ","),
    ("exported bytes", "exported_bytes", ","),
    ("of dense", "of_dense", ".1%"),
    ("bound bytes", "bound_bytes", ","),
)


def run(options: ExportOptions) -> int:
    """Writes the file and prints the sizes; returns the exit code."""
    if not options.out.endswith(".safetensors"):
        raise CommandError(f"OUT must end in .safetensors, got {options.out!r}")
    if options.smallest and options.format == "dense":
        raise CommandError("--smallest is of --format=compressed; give both, or neither")
    try:
        checkpoint = open_checkpoint(options.checkpoint)
        with status("reading") as say:
            facts = export(
                checkpoint,
                options.out,
                format=options.format,
                dtype=options.dtype,
                include=options.include,
                smallest=options.smallest,
                overwrite=options.overwrite,
                on_weight=lambda path: say and say(f"exporting {path}"),
            )
    except FileExistsError as e:
        raise CommandError(f"{e}; give another OUT, or --overwrite to replace a file") from e
    except NotADirectoryError as e:
        raise CommandError(f"{e} to write OUT to; make it first") from e
    except ValueError as e:
        raise CommandError(str(e)) from e
    except OSError as e:
        raise CommandError(f"{options.out} can't be written: {e}") from e
    print(json.dumps(facts, indent=1) if options.json else _as_text(facts))
    return 0


def _as_text(facts: dict[str, Any]) -> str:
    dense = [w for w in facts["weights"] if w["kept"] == w["size"]]
    rows = [
        {**w, "shape": shape_text(w["shape"]), "encoding": _encoding(w)}
        for w in facts["weights"]
        if w["kept"] < w["size"]
    ]
    if dense:
        name = count(len(dense), "dense weight")
        rows.append({**totals(dense), "path": name, "sparsity": None})
    rows.append({**facts["totals"], "path": "total"})
    for row in rows:
        size = row["dense_bytes"]
        row["of_dense"] = row["exported_bytes"] / size if size else None
    parts = [fact_table(rows, _COLUMNS, align="llllrrrrr")]
    notes = [f"{w['path']}: {w['note']}." for w in facts["weights"] if w["note"]]
    if facts["passed_over"]:
        notes.append(f"Skipped, not complete: {', '.join(facts['passed_over'])}.")
    if not facts["has_masks"]:
        notes.append(
            "The checkpoint has no masks: what counts as kept is what isn't 0, in matrices only."
        )
    if notes:
        parts.append("\n".join(notes))
    parts.append(
        f"Wrote {facts['path']}: {format_bytes(facts['file_bytes'])}, {facts['format']}, step "
        f"{facts['step']:,} of {facts['checkpoint']}"
    )
    return "\n\n".join(parts)


def _encoding(w: dict[str, Any]) -> str:
    if w["encoding"] == "nm":
        return f"{w['n']}:{w['m']} along axis {w['axis']}"
    if w["encoding"] == "blocks":
        return f"blocks of {shape_text(w['block'])}"
    return w["encoding"]
