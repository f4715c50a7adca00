"""A run as `t5x-sparsity report` shows it: what was planned, and the numbers it reached."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_sparsity.artifacts.events import Run, Series, resolve
from t5x_sparsity.commands.text import finite, short

TOTAL = "total"

# the names that hosts and models give the loss, the preferred one first
_LOSSES = ("loss_per_nonpadding_target_token", "loss_per_all_target_tokens", "loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportRun(Run):
    """What a run's folder holds, and how a page shows it."""

    name: str
    index: int  # of the run on the page, from 0; determines its colour

    @property
    def short_name(self) -> str:
        """The name with its middle left out where it is long."""
        return short(self.name, 32)

    @property
    def description(self) -> str:
        """Method, sparsity and patterns in one line."""
        if not self.is_sparse:
            return "Dense: no weight was made sparse"
        level = ""
        if self.record:
            level = sum(self.size(p) * v.get("sparsity", 0) for p, v in self.record.items())
            level = f"{round(100 * level / max(self.sparse_weights, 1), 2):g}% sparse"
            level += f", {self.distribution}" if self.distribution else ""
        methods, patterns = self.by_weights("algorithm"), self.by_weights("pattern")
        found = [" + ".join(methods) or "Sparse", level, " + ".join(patterns)]
        return " · ".join(part for part in found if part)

    @property
    def is_sparse(self) -> bool:
        return bool(self.record or self.group("sparsity"))

    def by_weights(self, key: str) -> list[str]:
        """The values that the record has of a key, the one with the most weights first."""
        sizes: dict[str, int] = {}
        for path, values in self.record.items():
            name = str(values.get(key, "")).removesuffix("()")
            sizes[name] = sizes.get(name, 0) + self.size(path)
        return [name for name in sorted(sizes, key=lambda n: (-sizes[n], n)) if name]

    def size(self, path: str) -> int:
        """Weights at a path, 0 where unknown."""
        return math.prod(self.record.get(path, {}).get("shape", [0]))

    @property
    def distribution(self) -> str | None:
        found = resolve(self.bindings, "SparsityConfig.distribution")
        return None if found is None else str(found)

    @property
    def total_steps(self) -> int | None:
        """Steps that the run was to have."""
        names = ("TRAIN_STEPS", "train.total_steps")
        found = (resolve(self.bindings, name) for name in names)
        return next((steps for steps in found if isinstance(steps, int)), None)

    @functools.cached_property
    def last_step(self) -> int:
        """The last step that there are events of."""
        series = [self.train, *self.evals.values()]
        return max(int(s.steps[-1]) for tags in series for s in tags.values())

    @property
    def sparse_weights(self) -> int:
        return sum(self.size(p) for p in self.record)

    @property
    def train_loss(self) -> Series | None:
        return _loss(self.train)

    @property
    def eval_losses(self) -> dict[str, Series]:
        """Validation loss by task."""
        found = {task: _loss(tags) for task, tags in self.evals.items()}
        return {task: loss for task, loss in found.items() if loss}

    def actual(self) -> dict[str, float]:
        """Path -> the sparsity at the last step."""
        return {p: s.last for p, s in self.group("sparsity").items() if p != TOTAL}

    def targets(self) -> dict[str, float]:
        """Path -> the target at the last step; absent where only the total has one.

        Older versions wrote no targets: for their events, those planned for the end.
        """
        if found := self.group("sparsity_target"):
            return {p: s.last for p, s in found.items() if p != TOTAL}
        return {p: v["sparsity"] for p, v in self.record.items() if "sparsity" in v}

    def last(self, tag: str) -> float | None:
        """The last value of a series of training, None where there is none."""
        series = self.train.get(tag)
        return None if series is None else series.last

    def key_numbers(self) -> dict[str, Any]:
        """For JSON; what is unknown or not finite is None."""
        loss, churn = self.train_loss, self.train.get("mask_churn/total")
        sparsity = self.last("sparsity/total")
        kept = None
        if sparsity is not None and self.weights and self.record:
            kept = self.weights - round(sparsity * self.sparse_weights)
        flops = ("training", "training_dense", "training_share", "inference_share")
        found = {
            "name": self.name,
            "folder": self.folder,
            "methods": self.by_weights("algorithm"),
            "patterns": self.by_weights("pattern"),
            "distribution": self.distribution,
            "weights": self.weights,
            "sparse_weights": self.sparse_weights,
            "weights_kept": kept,
            "sparsity": sparsity,
            "sparsity_target": self.last("sparsity_target/total"),
            "steps": self.last_step,
            "total_steps": self.total_steps,
            "train_loss": None if loss is None else float(smoothed(loss).last),
            "validation": {t: _validation(s) for t, s in self.eval_losses.items()},
            "churn": self.last("mask_churn/total"),
            "churn_mean": None if churn is None else _mean(churn),
            "explored": self.last("mask_explored/total"),
            **{f"flops_{name}": self.last(f"flops/{name}") for name in flops},
            "remarks": list(self.remarks),
        }
        return finite(found)


def _loss(tags: Mapping[str, Series]) -> Series | None:
    return next((tags[name] for name in _LOSSES if name in tags), None)


def _validation(series: Series) -> dict[str, Any]:
    finite = np.isfinite(series.values)
    best = int(np.argmin(np.where(finite, series.values, np.inf))) if finite.any() else None
    return {
        "step": int(series.steps[-1]),
        "loss": series.last,
        "best_step": None if best is None else int(series.steps[best]),
        "best_loss": None if best is None else float(series.values[best]),
    }


def _mean(series: Series) -> float | None:
    """The mean of the finite values; None where there are none."""
    finite = series.values[np.isfinite(series.values)]
    return float(finite.mean()) if finite.size else None


def window(series: Series) -> int:
    """The number of points to average over: one in 30 of the series, at least 1."""
    return max(1, len(series.steps) // 30)


def smoothed(series: Series) -> Series:
    """The exponential mean of the finite values, over about `window(series)` points."""
    span = window(series)
    keep = 1 - 2 / (span + 1)
    mean = weight = 0.0
    values = np.full(series.values.shape, np.nan)
    for i, x in enumerate(series.values):
        if math.isfinite(x):
            mean, weight = keep * mean + (1 - keep) * x, keep * weight + 1 - keep
            values[i] = mean / weight
    return Series(series.steps, values)
