"""`t5x-sparsity export`: a checkpoint's weights as one safetensors file."""

from __future__ import annotations

import json
from typing import Any

from t5x_sparsity.artifacts.checkpoint import Checkpoint, open_checkpoint
from t5x_sparsity.artifacts.encodings import NM, Blocks
from t5x_sparsity.artifacts.export import Exported, ExportedWeight, export
from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.export.options import ExportOptions
from t5x_sparsity.commands.output import status
from t5x_sparsity.commands.text import format_bytes
from t5x_sparsity.monitoring.text_table import text_table

_SUFFIX = ".safetensors"


def run(options: ExportOptions) -> int:
    """Writes the file and prints the sizes; returns the exit code."""
    if not options.out.endswith(_SUFFIX):
        raise CommandError(f"OUT must end in {_SUFFIX}, got {options.out!r}")
    if options.smallest and options.format == "dense":
        raise CommandError("--smallest is of --format=compressed; give both, or neither")
    try:
        checkpoint = open_checkpoint(options.checkpoint)
        with status("reading") as say:
            exported = export(
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
    if options.json:
        print(json.dumps(_as_dict(exported, checkpoint), indent=1))
    else:
        print(_as_text(exported, checkpoint))
    return 0


def _totals(weights: list[ExportedWeight]) -> dict[str, Any]:
    size, kept = sum(w.size for w in weights), sum(w.kept for w in weights)
    return {
        "weights": size,
        "kept": kept,
        "sparsity": 1 - kept / size if size else 0.0,
        "dense_bytes": sum(w.dense_bytes for w in weights),
        "exported_bytes": sum(w.exported_bytes for w in weights),
        "bound_bytes": sum(w.bound_bytes for w in weights),
    }


def _as_dict(exported: Exported, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": exported.path,
        "format": exported.format,
        "checkpoint": checkpoint.path,
        "step": exported.step,
        "passed_over": list(checkpoint.skipped),
        "has_masks": bool(checkpoint.masked),
        "file_bytes": exported.file_bytes,
        "totals": _totals(list(exported.weights)),
        "weights": [
            {
                "path": w.path,
                **w.as_dict(),
                "size": w.size,
                "dense_bytes": w.dense_bytes,
                "exported_bytes": w.exported_bytes,
                "bound_bytes": w.bound_bytes,
                "note": w.note,
            }
            for w in exported.weights
        ],
    }


def _as_text(exported: Exported, checkpoint: Checkpoint) -> str:
    sparse = [w for w in exported.weights if w.kept < w.size]
    dense = [w for w in exported.weights if w.kept == w.size]
    rows = [
        (
            w.path,
            "x".join(map(str, w.shape)),
            w.dtype,
            _encoding(w),
            f"{w.sparsity:.2%}",
            *_sizes(w.dense_bytes, w.exported_bytes, w.bound_bytes),
        )
        for w in sparse
    ]
    if dense:
        totals = _totals(dense)
        name = f"{len(dense)} dense weight{'s' if len(dense) > 1 else ''}"
        rows.append((name, "", "", "", "", *_total_sizes(totals)))
    totals = _totals(list(exported.weights))
    rows.append(("total", "", "", "", f"{totals['sparsity']:.2%}", *_total_sizes(totals)))
    headers = (
        "weight", "shape", "dtype", "encoding", "sparsity", "dense bytes", "exported bytes",
        "of dense", "bound bytes",
    )  # fmt: skip
    parts = [text_table(rows, headers=headers, align="llllrrrrr")]
    notes = [f"{w.path}: {w.note}." for w in exported.weights if w.note]
    if checkpoint.skipped:
        notes.append(f"Skipped, not complete: {', '.join(checkpoint.skipped)}.")
    if not checkpoint.masked:
        notes.append(
            "The checkpoint has no masks: what counts as kept is what isn't 0, in matrices only."
        )
    if notes:
        parts.append("\n".join(notes))
    parts.append(
        f"Wrote {exported.path}: {format_bytes(exported.file_bytes)}, {exported.format}, step "
        f"{exported.step:,} of {checkpoint.path}"
    )
    return "\n\n".join(parts)


def _sizes(dense: int, exported: int, bound: int) -> tuple[str, ...]:
    share = f"{exported / dense:.1%}" if dense else ""
    return f"{dense:,}", f"{exported:,}", share, f"{bound:,}"


def _total_sizes(totals: dict[str, Any]) -> tuple[str, ...]:
    return _sizes(*(totals[f"{k}_bytes"] for k in ("dense", "exported", "bound")))


def _encoding(weight: ExportedWeight) -> str:
    encoding = weight.encoding
    if isinstance(encoding, NM):
        return f"{encoding.n}:{encoding.m} along axis {encoding.axis}"
    if isinstance(encoding, Blocks):
        return f"blocks of {'x'.join(map(str, encoding.block))}"
    return encoding.name
