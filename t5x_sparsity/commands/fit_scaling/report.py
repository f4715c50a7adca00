"""The report of `t5x-sparsity fit-scaling`, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.table import Source
from t5x_sparsity.commands.text import finite
from t5x_sparsity.monitoring.text_table import text_table
from t5x_sparsity.scaling.intervals import Bootstrap
from t5x_sparsity.scaling.law import Fit
from t5x_sparsity.scaling.optimum import MAX_SPARSITY

FORMULA = "L(S, N, D) = (a_s (1 - S)^b_s + c_s) N^-b_n + (a_d / D)^b_d + c"
_TIED = 0.9
_ILL_CONDITIONED = 1e4
# what a held-out prediction may be off, whatever the fit's own errors are
_GOOD = 1e-3
# columns of text; those of numbers are right-aligned
_LEFT = ("coefficient", "unit", "largest", "size")

Row = Mapping[str, Any]


class Grid(NamedTuple):
    """A table of text; each row has a cell per header."""

    title: str
    rows: Sequence[Mapping[str, str]]

    @property
    def columns(self) -> dict[str, str]:
        """The side, 'l' or 'r', that each header and its cells are aligned to."""
        return {header: "l" if header in _LEFT else "r" for header in self.rows[0]}

    def as_text(self) -> str:
        """For a person."""
        rows, align = [list(row.values()) for row in self.rows], "".join(self.columns.values())
        return text_table(rows, headers=list(self.columns), align=align)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that the command found; rows have the keys that JSON has.

    Attributes:
      options: that were asked for.
      source: what was read.
      fit: of the law.
      bootstrap: its resampled laws, none with --bootstrap=0.
      coefficients: value, interval and unit, by name.
      gains: how many times its non-zero weights a dense model has that is as good as a sparse one.
      held_out: how the largest runs are predicted without them.
      optima: best runs for compute, and size, no sparser than the table's sparsest; the law's own
        best sparsity where that is sparser; and columns in which it is outside the table's range.
    """

    options: FitScalingOptions
    source: Source
    fit: Fit
    bootstrap: Bootstrap
    coefficients: Mapping[str, Row]
    gains: Sequence[Row]
    held_out: Sequence[Row]
    optima: Sequence[Row]

    def ties(self) -> dict[tuple[str, str], float]:
        """Coefficients that make up for each other over the bootstrap."""
        return {pair: r for pair, r in self.bootstrap.correlations().items() if abs(r) > _TIED}

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what isn't finite is None."""
        options, fit, laws = self.options, self.fit, self.bootstrap
        bootstrap = {
            "tables": options.bootstrap,
            "failed": laws.failed,
            "redrawn": laws.redrawn,
            "level": options.level,
            "rank_correlations": {" ".join(pair): r for pair, r in laws.correlations().items()},
        }
        found = {
            "table": {
                "path": options.table,
                "runs": len(self.source.table),
                "size_column": self.source.size_column,
                "unused_columns": self.source.unused,
            },
            "coefficients": self.coefficients,
            "fit": {
                "objective": fit.objective,
                "delta": options.delta,
                "rmse": fit.rmse,
                "max_relative_error": fit.max_relative_error,
                "condition": fit.condition,
                "at_bounds": fit.bounds,
                "residuals": fit.residuals.tolist(),
            },
            "starts": {
                "number": fit.starts,
                "agreeing": fit.agreeing,
                "failed": fit.failed,
                "spread": fit.spread,
                "seed": options.seed,
            },
            "bootstrap": bootstrap if laws.laws else None,
            "dense_equivalent": self.gains,
            "held_out": self.held_out,
            "cost": options.cost,
            "optima": self.optima,
            "warnings": list(self.warnings()),
        }
        return finite(found)

    def as_text(self) -> str:
        """For a person."""
        coefficients, *others = self.grids()
        parts = ["\n".join(self.table_lines()), FORMULA, coefficients.as_text()]
        parts.append("\n".join(self.fit_lines()))
        parts += [f"{grid.title}:\n\n{grid.as_text()}" for grid in others]
        if warnings := [f"- {text}" for text in self.warnings()]:
            parts.append("\n".join(["Beware:", *warnings]))
        return "\n\n".join(parts)

    def table_lines(self) -> Iterator[str]:
        """What was read, in sentences."""
        t = self.source.table
        yield (
            f"{len(t)} runs of {self.options.table}: sparsity {_range(t.sparsity)}, "
            f"non-zero weights {_range(t.nonzero)}, tokens {_range(t.tokens)}, "
            f"loss {_range(t.loss)}."
        )
        if self.source.unused:
            yield f"Columns passed over: {', '.join(self.source.unused)}."

    def fit_lines(self) -> Iterator[str]:
        """How good the fit is, in sentences."""
        fit, laws = self.fit, self.bootstrap
        yield (
            f"Fit: mean Huber loss {fit.objective:.5g} at delta {self.options.delta:g}; root mean "
            f"square of log residuals {fit.rmse:.3g}; largest error {fit.max_relative_error:.2%}."
        )
        yield (
            f"Starts: {fit.agreeing} of {fit.starts} end at the best objective, their coefficients "
            f"within {fit.spread:.0e} of each other; {fit.failed} didn't converge."
        )
        if laws.laws:
            yield (
                f"Bootstrap: {self.options.bootstrap} tables, {laws.failed} of them without a fit; "
                f"{laws.redrawn} drawn again as they varied too little."
            )
        if ties := [f"{a} and {b} {r:+.3f}" for (a, b), r in self.ties().items()]:
            yield f"Tied over the bootstrap, by rank correlation: {', '.join(ties)}."

    def warnings(self) -> Iterator[str]:
        """What to beware of, in sentences."""
        fit, laws, optima = self.fit, self.bootstrap, self.optima
        if fit.agreeing < fit.starts / 2:
            yield (
                f"Only {fit.agreeing} of {fit.starts} starts end at the best objective; there may "
                "be a better one, so raise --starts."
            )
        if fit.spread > 0.01:
            yield (
                f"The objective is flat: coefficients {fit.spread:.0%} apart are as good as each "
                "other."
            )
        if fit.condition > _ILL_CONDITIONED:
            yield (
                "The table hardly tells coefficients apart (condition number "
                f"{fit.condition:.0e}); trust predictions inside its range, not the coefficients."
            )
        for name in fit.bounds:
            yield f"The coefficient {name} ends at its bound, {getattr(fit.law, name):.3g}."
        if laws.laws and laws.failed > 0.05 * self.options.bootstrap:
            yield f"{laws.failed} resampled tables have no fit; the intervals leave them out."
        for h in self.held_out:
            if h["rmse"] is not None and abs(h["mean_error"]) > max(3 * h["rmse"], _GOOD):
                yield (
                    f"Runs of the largest {h['column']} are {h['mean_error']:+.1%} off when "
                    f"predicted from the others, which the fit has within {h['rmse']:.1%}: it "
                    "extrapolates badly there."
                )
        if not optima:
            yield "The fit doesn't depend on data, or on weights, so no sparsity is best."
        if beyond := [x for r in optima if (x := r["sparsity_beyond_table"])]:
            end = "the more the better"
            if min(beyond) < MAX_SPARSITY:
                end = f"{_range(np.array(beyond))} by the law itself, which no run supports"
            yield (
                f"{len(beyond)} of the best sparsities are at the edge of the table's range: {end}."
            )
        if outside := sorted({name for r in optima for name in r["outside"]}):
            columns = " or ".join(outside)
            yield f"Marked rows have {columns} outside the table's range: extrapolated."

    def grids(self) -> list[Grid]:
        """The coefficients, then what isn't empty: as good dense models, runs held out, optima."""
        interval = f"{100 * self.options.level:.4g}% interval"
        coefficients = [
            {
                "coefficient": name,
                "value": f"{c['value']:.5g}",
                interval: _show(c["interval"], ".4g"),
                "unit": c["unit"],
            }
            for name, c in self.coefficients.items()
        ]
        gains = [
            {
                "sparsity": f"{gain['sparsity']:.4g}",
                "times its size": f"{gain['times']:.3g}",
                interval: _show(gain["interval"], ".4g"),
            }
            for gain in self.gains
        ]
        held_out = [
            {
                "largest": f"{h['column']} {h['value']:.4g}",
                "runs": str(h["rows"]),
                "mean error": _show(h["mean_error"], "+.2%") or "too little remains",
                "largest error": _show(h["max_error"], ".2%"),
                "rms of the fit": _show(h["rmse"], ".2%"),
            }
            for h in self.held_out
        ]
        optima = []
        for r in self.optima:
            mark = " *" if r["outside"] or r["sparsity_beyond_table"] else ""
            cells = {
                "FLOPs": f"{r['compute']:.3g}",
                "size": "given" if r["given_size"] else "best",
                "non-zero": f"{r['nonzero']:.3g}",
                "tokens": f"{r['tokens']:.3g}",
                "sparsity": f"{r['sparsity']:.3f}{mark}",
                interval: _show(r["sparsity_interval"], ".3f"),
                "loss": f"{r['loss']:.4f}",
                "dense loss": f"{r['dense_loss']:.4f}",
            }
            optima.append(cells)
        equivalent = (
            "A dense model of the same loss on the same data has this many times the weights"
        )
        cost = self.options.cost
        grids = {
            "Coefficients": coefficients,
            equivalent: gains,
            "The largest runs, predicted from a fit without them": held_out,
            f"Best sparsity for training FLOPs, at {cost} cost (* outside the table)": optima,
        }
        return [Grid(title, rows) for title, rows in grids.items() if rows]


def _show(value: float | tuple[float, float] | None, form: str) -> str:
    """A number, an interval, or nothing."""
    return "" if value is None else " to ".join(f"{x:{form}}" for x in np.atleast_1d(value))


def _range(values: np.ndarray) -> str:
    """The least and the most of them."""
    low, high = f"{values.min():.4g}", f"{values.max():.4g}"
    return low if low == high else f"{low} to {high}"
