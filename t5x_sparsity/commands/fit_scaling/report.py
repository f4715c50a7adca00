"""The report of `t5x-sparsity fit-scaling`, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.table import Source
from t5x_sparsity.commands.text import finite
from t5x_sparsity.monitoring.text_table import text_table
from t5x_sparsity.scaling.intervals import Bootstrap, HeldOut
from t5x_sparsity.scaling.law import COEFFICIENTS, Fit
from t5x_sparsity.scaling.optimum import Optimum

UNITS = {
    "a_s": "nats x weights^b_n",
    "b_s": "",
    "c_s": "nats x weights^b_n",
    "b_n": "",
    "a_d": "tokens x nats^(1/b_d)",
    "b_d": "",
    "c": "nats a token",
}
FORMULA = "L(S, N, D) = (a_s (1 - S)^b_s + c_s) N^-b_n + (a_d / D)^b_d + c"
_TIED = 0.9

Interval = tuple[float, float]


class Grid(NamedTuple):
    """Rows of text under headers; `align` has an l or r for each column."""

    title: str
    headers: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        return text_table(self.rows, headers=self.headers, align=self.align)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestRun:
    """An optimum, and how far to trust it.

    Attributes:
      best: the optimum, no sparser than the table's sparsest runs.
      given_size: whether its size was given, rather than found.
      interval: of its sparsity over the bootstrap; None without one.
      beyond: the law's own optimum, where that is sparser than any run of the table.
      outside: columns in which it is outside the table's range.
    """

    best: Optimum
    given_size: bool
    interval: Interval | None
    beyond: float | None
    outside: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that the command found.

    Attributes:
      options: that were asked for.
      source: the table.
      fit: of the law.
      bootstrap: laws of resampled tables; None where there are none.
      intervals: of each coefficient; empty without a bootstrap.
      gains: sparsity -> size of the dense model of the same loss over non-zero weights, interval.
      held_out: how the largest runs are predicted without them.
      optima: best runs for compute, and size.
      warnings: one sentence each.
    """

    options: FitScalingOptions
    source: Source
    fit: Fit
    bootstrap: Bootstrap | None
    intervals: Mapping[str, Interval]
    gains: Mapping[float, tuple[float, Interval | None]]
    held_out: Sequence[HeldOut]
    optima: Sequence[BestRun]
    warnings: Sequence[str]

    @property
    def ties(self) -> dict[tuple[str, str], float]:
        """Coefficients that make up for each other over the bootstrap."""
        found = self.bootstrap.correlations() if self.bootstrap else {}
        return {pair: r for pair, r in found.items() if abs(r) > _TIED}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what isn't finite is None."""
        found = {
            "table": {
                "path": self.source.path,
                "runs": len(self.source.table),
                "size_column": self.source.size_column,
                "unused_columns": list(self.source.unused),
            },
            "coefficients": {
                n: {
                    "value": getattr(self.fit.law, n),
                    "interval": self.intervals.get(n),
                    "unit": UNITS[n],
                }
                for n in COEFFICIENTS
            },
            "fit": {
                "objective": self.fit.objective,
                "delta": self.options.delta,
                "rmse": self.fit.rmse,
                "max_relative_error": self.fit.max_relative_error,
                "condition": self.fit.condition,
                "at_bounds": list(self.fit.bounds),
                "residuals": self.fit.residuals.tolist(),
            },
            "starts": {
                "number": self.fit.starts,
                "agreeing": self.fit.agreeing,
                "failed": self.fit.failed,
                "spread": self.fit.spread,
                "seed": self.options.seed,
            },
            "bootstrap": self.bootstrap
            and {
                "tables": self.options.bootstrap,
                "failed": self.bootstrap.failed,
                "redrawn": self.bootstrap.redrawn,
                "level": self.options.level,
                "rank_correlations": {
                    " ".join(pair): r for pair, r in self.bootstrap.correlations().items()
                },
            },
            "dense_equivalent": [
                {"sparsity": s, "times": gain, "interval": interval}
                for s, (gain, interval) in self.gains.items()
            ],
            "held_out": [
                dataclasses.asdict(h) | {"column": column_name(h.column)} for h in self.held_out
            ],
            "cost": self.options.cost,
            "optima": [
                dataclasses.asdict(r.best)
                | {
                    "given_size": r.given_size,
                    "sparsity_interval": r.interval,
                    "sparsity_beyond_table": r.beyond,
                    "outside": list(r.outside),
                }
                for r in self.optima
            ],
            "warnings": list(self.warnings),
        }
        return finite(found)

    def as_text(self) -> str:
        """For a person."""
        parts = ["\n".join(self.table_lines()), FORMULA, self.coefficients().as_text()]
        parts.append("\n".join(self.fit_lines()))
        for grid in (self.gains_grid(), self.held_out_grid(), self.optima_grid()):
            if grid.rows:
                parts.append(f"{grid.title}:\n\n{grid.as_text()}")
        if self.warnings:
            parts.append("\n".join(["Beware:", *(f"- {w}" for w in self.warnings)]))
        return "\n\n".join(parts)

    def table_lines(self) -> list[str]:
        """What was read, in sentences."""
        t = self.source.table
        lines = [
            f"{len(t)} runs of {self.source.path}: sparsity {show_range(t.sparsity)}, "
            f"non-zero weights {show_range(t.nonzero)}, tokens {show_range(t.tokens)}, "
            f"loss {show_range(t.loss)}."
        ]
        if self.source.unused:
            lines.append(f"Columns passed over: {', '.join(self.source.unused)}.")
        return lines

    def fit_lines(self) -> list[str]:
        """How good the fit is, in sentences."""
        fit = self.fit
        lines = [
            f"Fit: mean Huber loss {fit.objective:.5g} at delta {self.options.delta:g}; root mean "
            f"square of log residuals {fit.rmse:.3g}; largest error {fit.max_relative_error:.2%}.",
            f"Starts: {fit.agreeing} of {fit.starts} end at the best objective, their coefficients "
            f"within {fit.spread:.0e} of each other; {fit.failed} didn't converge.",
        ]
        if self.bootstrap:
            lines.append(
                f"Bootstrap: {self.options.bootstrap} tables, {self.bootstrap.failed} of them "
                f"without a fit; {self.bootstrap.redrawn} drawn again as they varied too little."
            )
        if self.ties:
            ties = ", ".join(f"{a} and {b} {r:+.3f}" for (a, b), r in self.ties.items())
            lines.append(f"Tied over the bootstrap, by rank correlation: {ties}.")
        return lines

    @property
    def _interval(self) -> str:
        return f"{100 * self.options.level:.4g}% interval"

    def coefficients(self) -> Grid:
        """The coefficients."""
        law = self.fit.law
        return Grid(
            title="Coefficients",
            headers=("coefficient", "value", self._interval, "unit"),
            align="lrrl",
            rows=[
                (n, f"{getattr(law, n):.5g}", show_interval(self.intervals.get(n)), UNITS[n])
                for n in COEFFICIENTS
            ],
        )

    def gains_grid(self) -> Grid:
        """The dense models that sparse ones are as good as."""
        return Grid(
            title="A dense model of the same loss on the same data has this many times the weights",
            headers=("sparsity", "times its size", self._interval),
            align="rrr",
            rows=[(f"{s:.4g}", f"{g:.3g}", show_interval(i)) for s, (g, i) in self.gains.items()],
        )

    def held_out_grid(self) -> Grid:
        """The runs held out."""
        rows = []
        for h in self.held_out:
            name, errors = f"{column_name(h.column)} {h.value:.4g}", ("too little remains", "", "")
            if h.rmse is not None:
                errors = f"{h.mean_error:+.2%}", f"{h.max_error:.2%}", f"{h.rmse:.2%}"
            rows.append((name, str(h.rows), *errors))
        return Grid(
            title="The largest runs, predicted from a fit without them",
            headers=("largest", "runs", "mean error", "largest error", "rms of the fit"),
            align="lrrrr",
            rows=rows,
        )

    def optima_grid(self) -> Grid:
        """The best runs."""
        rows = []
        for r in self.optima:
            b, mark = r.best, "" if not r.outside and r.beyond is None else " *"
            rows.append(
                (
                    f"{b.compute:.3g}",
                    "given" if r.given_size else "best",
                    f"{b.nonzero:.3g}",
                    f"{b.tokens:.3g}",
                    f"{b.sparsity:.3f}{mark}",
                    show_interval(r.interval, ".3f"),
                    f"{b.loss:.4f}",
                    f"{b.dense_loss:.4f}",
                )
            )
        cost = self.options.cost
        return Grid(
            title=f"Best sparsity for training FLOPs, at {cost} cost (* outside the table)",
            headers=("FLOPs", "size", "non-zero", "tokens", "sparsity", self._interval, "loss",
                     "dense loss"),
            align="rlrrrrrr",
            rows=rows,
        )  # fmt: skip


def column_name(name: str) -> str:
    """The column of the file."""
    return "nonzero_weights" if name == "nonzero" else name


def show_interval(interval: Interval | None, form: str = ".4g") -> str:
    """An interval, or nothing."""
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def show_range(values: np.ndarray) -> str:
    """The least and the most of them."""
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"
