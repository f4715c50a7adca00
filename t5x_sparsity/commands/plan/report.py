"""The text of `t5x-sparsity plan`, from the report that its JSON has."""

from collections.abc import Mapping
from typing import Any, TypeVar

from t5x_sparsity.ahead_of_time.program import COLLECTIVES
from t5x_sparsity.commands.text import format_bytes
from t5x_sparsity.monitoring.text_table import text_table

T = TypeVar("T")


def own_steps(steps: Mapping[str, T]) -> dict[str, T]:
    """The steps of the run itself; where it is sparse, the dense one is there to compare."""
    return {kind: step for kind, step in steps.items() if kind != "dense"} or dict(steps)


def as_text(report: Mapping[str, Any], all_weights: bool) -> str:
    """The tables and sentences of a report; dense weights are one row unless all are asked for."""
    parts = [_weights_text(report, all_weights), _summary_text(report)]
    if report["topology"]:
        parts.append(_topology_text(report["topology"]))
    return "\n\n".join(parts)


def _weights_text(report: Mapping[str, Any], all_weights: bool) -> str:
    totals = report["totals"]
    rows = [_row(w) for w in report["weights"] if w["is_sparse"] or all_weights]
    dense = sum(not w["is_sparse"] for w in report["weights"])
    if dense and not all_weights:
        size = f"{totals['weights'] - totals['sparse_weights']:,}"
        rows.append((f"{dense} dense weights", *[""] * 6, size, size, ""))
    rows.append(
        ("total", *[""] * 6, *(f"{totals[key]:,}" for key in ("weights", "kept", "mask_bytes")))
    )
    headers = (
        "weight", "shape", "logical axes", "PartitionSpec", "pattern", "algorithm", "sparsity",
        "weights", "kept", "mask bytes",
    )  # fmt: skip
    return text_table(rows, headers=headers, align="llllllrrrr")


def _row(weight: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        weight["path"],
        "x".join(map(str, weight["shape"])),
        ", ".join(map(str, weight["axes"] or ())),
        ", ".join(map(_mesh_axes, weight["spec"] or ())),
        weight["pattern"],
        weight["algorithm"],
        "" if weight["sparsity"] is None else f"{weight['sparsity']:.2%}",
        f"{weight['size']:,}",
        "" if weight["kept"] is None else f"{weight['kept']:,}",
        f"{weight['mask_bytes']:,}" if weight["is_sparse"] else "",
    )


def _mesh_axes(axes: Any) -> str:
    return "+".join(axes) if isinstance(axes, tuple) else str(axes or "-")


def _summary_text(report: Mapping[str, Any]) -> str:
    totals, flops = report["totals"], report["flops"]
    lines = []
    if report["missing_imports"]:
        names = ", ".join(sorted(set(report["missing_imports"])))
        lines.append(f"Passed over, not installed: {names}")
    if not report["is_sparse"]:
        lines.append("The run is dense: it includes none of sparsity/*.gin.")
    elif not totals["sparse_weights"]:
        lines.append("The run is dense: no weight is made sparse.")
    else:
        lines.append(
            f"Sparse: {totals['sparse_weights']:,} of {totals['weights']:,} weights, "
            f"{totals['sparsity']:.2%} of them zero in the end, "
            f"{1 - totals['kept'] / totals['weights']:.2%} of all."
        )
        lines.append(
            f"Masks: {format_bytes(totals['mask_bytes'])} in all, "
            f"{format_bytes(totals['mask_bytes_per_device'])} on each device of the mesh "
            f"({_mesh_text(report['mesh'])})."
        )
        if other := totals["other_state_bytes"]:
            lines.append(f"Other state of the method: {format_bytes(other)} in all.")
    lines.append(
        f"FLOPs against dense, were zeros skipped: training {flops['training_share']:.3f} over "
        f"{flops['total_steps']:,} steps, inference {flops['inference_share']:.3f}."
    )
    lines.append(
        f"Dense: {flops['dense_forward']:.4g} FLOPs a forward pass over a batch, "
        f"{flops['dense_training']:.4g} in training."
    )
    lines += [f"Beware: {warning}." for warning in report["warnings"]]
    return "\n".join(lines)


def _mesh_text(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{n} {axis}" for axis, n in mesh.items())


def _topology_text(topology: Mapping[str, Any]) -> str:
    steps = topology["steps"]
    programs = [s["per_chip"] for s in steps.values()]
    # those that were compiled; None is a step that was refused
    compiled = [p for p in programs if p]
    rows = [
        (name, *("" if p is None else format_bytes(p[f"{key}_bytes"]) for p in programs))
        for name, key in (
            ("arguments", "argument"),
            ("temporaries", "temp"),
            ("program", "code"),
            ("peak", "peak"),
        )
    ]
    rows.append(("GFLOPs", *("" if p is None else f"{p['flops'] / 1e9:,.1f}" for p in programs)))
    for kind in COLLECTIVES:
        if any(kind in p["collectives"] for p in compiled):
            rows.append((kind, *(_collective_text(kind, p) for p in programs)))
    rows.append(("compile seconds", *(f"{s['compile_seconds']:.1f}" for s in steps.values())))
    rows.append(("fits", *("yes" if s["fits"] else "no" for s in steps.values())))
    lines = [
        f"{topology['name']}: {topology['chips']} chips ({topology['chip']}), mesh "
        f"{_mesh_text(topology['mesh'])}. On each chip:",
        "",
        text_table(rows, headers=("", *steps), align="l" + "r" * len(steps)),
        "",
    ]
    if any(p["open_loops"] for p in compiled):
        lines.append("Collectives in loops that may end early, as a search does, are counted once.")
    for kind, step in steps.items():
        if not step["fits"]:
            lines.append(f"The {kind} step does not fit: {_memory(step)}.")
    if topology["fits"]:
        most = max(own_steps(steps).values(), key=lambda step: step["needed_bytes"])
        lines.append(f"It fits: {_memory(most)} a chip.")
    return "\n".join(lines)


def _collective_text(kind: str, program: Mapping[str, Any] | None) -> str:
    if program is None:
        return ""
    found = program["collectives"].get(kind)
    return f"{found['count']:,} x, {format_bytes(found['bytes'])}" if found else "-"


def _memory(step: Mapping[str, Any]) -> str:
    """What a step needs of a chip's memory."""
    if step["needed_bytes"] is None:
        return "libtpu refused it for memory"
    if step["available_bytes"] is None:
        return format_bytes(step["needed_bytes"])
    return f"{step['needed_bytes'] / 2**30:.2f} of {step['available_bytes'] / 2**30:.2f} GiB"
