"""The report of `t5x-sparsity plan`, as text and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from t5x_sparsity.ahead_of_time.program import COLLECTIVES, CompiledStep
from t5x_sparsity.ahead_of_time.slices import Compilation, Slice
from t5x_sparsity.commands.text import format_bytes
from t5x_sparsity.monitoring.flops import RunFlops
from t5x_sparsity.monitoring.text_table import text_table

# The exit code of a plan whose steps don't fit the slice.
DOES_NOT_FIT = 3


class WeightRow(NamedTuple):
    """One weight of the model.

    Attributes:
      path: of the weight.
      shape: of the whole weight.
      axes: logical axis names, None where there are none.
      spec: the mesh axes that split it, None where replicated.
      pattern: the pattern of its zeros, '' for a dense weight.
      algorithm: what chooses its mask, '' for a dense weight.
      sparsity: its target, None where it is dense or only the total has one.
      kept: weights that aren't zero in the end, None where only the total is known.
      mask_bytes: of its stored mask, on all devices together; None for a dense weight.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...] | None
    spec: tuple[Any, ...] | None
    pattern: str
    algorithm: str
    sparsity: float | None
    kept: int | None
    mask_bytes: int | None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_sparse(self) -> bool:
        return self.mask_bytes is not None

    def as_dict(self) -> dict[str, Any]:
        found = {**self._asdict(), "is_sparse": self.is_sparse, "size": self.size}
        if not self.is_sparse:
            del found["mask_bytes"]
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceReport:
    """What the steps take on each chip of a TPU slice.

    Attributes:
      devices: of the slice.
      steps: 'dense', 'plain' and, where masks change, 'update'.
    """

    devices: Slice
    steps: Mapping[str, Compilation]

    @property
    def own(self) -> dict[str, Compilation]:
        """The steps of the run itself; the dense one is there to compare."""
        return {k: c for k, c in self.steps.items() if k != "dense"} or dict(self.steps)

    @property
    def fits(self) -> bool:
        """Whether all steps of the run itself fit."""
        return all(c.fits for c in self.own.values())


@dataclasses.dataclass(kw_only=True)
class Report:
    """A run's plan.

    Attributes:
      host: 't5x' or 'embedded'.
      is_sparse: whether the run includes sparsity at all.
      weights: of the model.
      target: the sparsity of all sparse weights together; None where there are none.
      kept: weights of the model that aren't zero in the end.
      total_steps: of the run.
      flops: of the run, sparse and dense.
      other_state_bytes: what the algorithms keep next to masks.
      mask_bytes_per_device: on the mesh.
      mesh: axis -> size.
      missing_imports: modules that gin files name and that aren't installed.
      warnings: one sentence per oddity.
      slice: None where none was asked for.
    """

    host: str
    is_sparse: bool
    weights: Sequence[WeightRow]
    target: float | None
    kept: int
    total_steps: int
    flops: RunFlops
    other_state_bytes: int
    mask_bytes_per_device: int
    mesh: Mapping[str, int]
    missing_imports: Sequence[str] = ()
    warnings: Sequence[str] = ()
    slice: SliceReport | None = None

    @property
    def sparse(self) -> list[WeightRow]:
        return [r for r in self.weights if r.is_sparse]

    @property
    def dense(self) -> list[WeightRow]:
        return [r for r in self.weights if not r.is_sparse]

    @property
    def mask_bytes(self) -> int:
        return sum(r.mask_bytes for r in self.sparse)

    @property
    def size(self) -> int:
        return sum(r.size for r in self.weights)

    @property
    def sparse_size(self) -> int:
        return sum(r.size for r in self.sparse)

    @property
    def training_share(self) -> float:
        return self.flops.training / self.flops.dense_training

    @property
    def inference_share(self) -> float:
        return self.flops.forward / self.flops.dense_forward

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "host": self.host,
            "is_sparse": self.is_sparse,
            "missing_imports": list(self.missing_imports),
            "warnings": list(self.warnings),
            "weights": [r.as_dict() for r in self.weights],
            "totals": {
                "weights": self.size,
                "sparse_weights": self.sparse_size,
                "sparsity": self.target,
                "kept": self.kept,
                "mask_bytes": self.mask_bytes,
                "mask_bytes_per_device": self.mask_bytes_per_device,
                "other_state_bytes": self.other_state_bytes,
            },
            "flops": {
                "total_steps": self.total_steps,
                "training_share": self.training_share,
                "inference_share": self.inference_share,
                **self.flops._asdict(),
            },
            "mesh": dict(self.mesh),
            "topology": None if self.slice is None else self._slice_dict(self.slice),
        }

    def as_text(self, *, all_weights: bool) -> str:
        """For a person."""
        parts = [self._weights_text(all_weights), self._summary_text()]
        if self.slice is not None:
            parts.append(self._slice_text(self.slice))
        return "\n\n".join(parts)

    def _weights_text(self, all_weights: bool) -> str:
        rows = [_row(r) for r in self.weights if r.is_sparse or all_weights]
        if self.dense and not all_weights:
            size = f"{self.size - self.sparse_size:,}"
            rows.append((f"{len(self.dense)} dense weights", *[""] * 6, size, size, ""))
        total = f"{self.size:,}", f"{self.kept:,}", f"{self.mask_bytes:,}"
        rows.append(("total", *[""] * 6, *total))
        headers = (
            "weight", "shape", "logical axes", "PartitionSpec", "pattern", "algorithm", "sparsity",
            "weights", "kept", "mask bytes",
        )  # fmt: skip
        return text_table(rows, headers=headers, align="llllllrrrr")

    def _summary_text(self) -> str:
        lines = []
        if self.missing_imports:
            names = ", ".join(sorted(set(self.missing_imports)))
            lines.append(f"Passed over, not installed: {names}")
        if not self.is_sparse:
            lines.append("The run is dense: it includes none of sparsity/*.gin.")
        elif not self.sparse:
            lines.append("The run is dense: no weight is made sparse.")
        else:
            lines.append(
                f"Sparse: {self.sparse_size:,} of {self.size:,} weights, {self.target:.2%} of them "
                f"zero in the end, {1 - self.kept / self.size:.2%} of all."
            )
            lines.append(
                f"Masks: {format_bytes(self.mask_bytes)} in all, "
                f"{format_bytes(self.mask_bytes_per_device)} on each device of the mesh "
                f"({self._mesh})."
            )
            if self.other_state_bytes:
                lines.append(
                    f"Other state of the method: {format_bytes(self.other_state_bytes)} in all."
                )
        lines.append(
            f"FLOPs against dense, were zeros skipped: training {self.training_share:.3f} over "
            f"{self.total_steps:,} steps, inference {self.inference_share:.3f}."
        )
        lines.append(
            f"Dense: {self.flops.dense_forward:.4g} FLOPs a forward pass over a batch, "
            f"{self.flops.dense_training:.4g} in training."
        )
        lines += [f"Beware: {warning}." for warning in self.warnings]
        return "\n".join(lines)

    @property
    def _mesh(self) -> str:
        return " x ".join(f"{n} {axis}" for axis, n in self.mesh.items())

    def _slice_dict(self, found: SliceReport) -> dict[str, Any]:
        return {
            "name": found.devices.name,
            "chip": found.devices.kind,
            "chips": len(found.devices.devices),
            "mesh": dict(self.mesh),
            "usable_bytes_per_chip": found.devices.hbm_bytes,
            "fits": found.fits,
            "steps": {kind: _compilation_dict(c) for kind, c in found.steps.items()},
        }

    def _slice_text(self, found: SliceReport) -> str:
        devices, steps = found.devices, [c.step for c in found.steps.values()]

        def row(name: str, show: Callable[[CompiledStep], str]) -> tuple[str, ...]:
            return (name, *("" if s is None else show(s) for s in steps))

        def collective(kind: str) -> Callable[[CompiledStep], str]:
            def show(s: CompiledStep) -> str:
                c = s.collectives.get(kind)
                return "-" if c is None else f"{c.count:,} x, {format_bytes(c.bytes)}"

            return show

        kinds = [k for k in COLLECTIVES if any(s and k in s.collectives for s in steps)]
        rows = [
            row("arguments", lambda s: format_bytes(s.argument_bytes)),
            row("temporaries", lambda s: format_bytes(s.temp_bytes)),
            row("program", lambda s: format_bytes(s.code_bytes)),
            row("peak", lambda s: format_bytes(s.peak_bytes)),
            row("GFLOPs", lambda s: f"{s.flops / 1e9:,.1f}"),
            *(row(kind, collective(kind)) for kind in kinds),
            ("compile seconds", *(f"{c.seconds:.1f}" for c in found.steps.values())),
            ("fits", *("yes" if c.fits else "no" for c in found.steps.values())),
        ]
        lines = [
            f"{devices.name}: {len(devices.devices)} chips ({devices.kind}), mesh {self._mesh}. "
            "On each chip:",
            "",
            text_table(rows, headers=("", *found.steps), align="l" + "r" * len(steps)),
            "",
        ]
        if any(s and s.open_loops for s in steps):
            lines.append(
                "Collectives in loops that may end early, as a search does, are counted once."
            )
        for kind, c in found.steps.items():
            if not c.fits:
                lines.append(f"The {kind} step does not fit: {_memory(c)}.")
        if found.fits:
            most = max(found.own.values(), key=lambda c: c.needed_bytes)
            lines.append(f"It fits: {_memory(most)} a chip.")
        return "\n".join(lines)


def _row(r: WeightRow) -> tuple[str, ...]:
    return (
        r.path,
        "x".join(map(str, r.shape)),
        "" if r.axes is None else ", ".join(str(a) for a in r.axes),
        "" if r.spec is None else ", ".join(_axis(a) for a in r.spec),
        r.pattern,
        r.algorithm,
        "" if r.sparsity is None else f"{r.sparsity:.2%}",
        f"{r.size:,}",
        "" if r.kept is None else f"{r.kept:,}",
        f"{r.mask_bytes:,}" if r.is_sparse else "",
    )


def _axis(axis: Any) -> str:
    return "+".join(axis) if isinstance(axis, tuple) else "-" if axis is None else str(axis)


def _compilation_dict(c: Compilation) -> dict[str, Any]:
    step = None
    if c.step is not None:
        step = dataclasses.asdict(c.step)
        step["collectives"] = {k: x._asdict() for k, x in c.step.collectives.items()}
    return {
        "fits": c.fits,
        "compile_seconds": c.seconds,
        "needed_bytes": c.needed_bytes,
        "available_bytes": c.available_bytes,
        "per_chip": step,
    }


def _memory(c: Compilation) -> str:
    """What a step needs of a chip's memory."""
    if c.needed_bytes is None:
        return "libtpu refused it for memory"
    if c.available_bytes is None:
        return format_bytes(c.needed_bytes)
    return f"{c.needed_bytes / 2**30:.2f} of {c.available_bytes / 2**30:.2f} GiB"
