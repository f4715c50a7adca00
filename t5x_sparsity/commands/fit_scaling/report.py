"""The report of `t5x-sparsity fit-scaling`, as text and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.commands.fit_scaling.analysis import Analysis, show_range
from t5x_sparsity.commands.text import finite
from t5x_sparsity.monitoring.text_table import text_table

FORMULA = "L(S, N, D) = (a_s (1 - S)^b_s + c_s) N^-b_n + (a_d / D)^b_d + c"
# columns of text; those of numbers are right-aligned
_LEFT = ("coefficient", "unit", "largest", "size")


class Grid(NamedTuple):
    """A table of text; each row has a cell per header."""

    title: str
    rows: Sequence[Mapping[str, str]]

    @property
    def columns(self) -> dict[str, str]:
        """The side, 'l' or 'r', that each header and its cells are aligned to."""
        return {header: "l" if header in _LEFT else "r" for header in self.rows[0]}

    def as_text(self) -> str:
        """For a terminal."""
        rows, align = [list(row.values()) for row in self.rows], "".join(self.columns.values())
        return text_table(rows, headers=list(self.columns), align=align)


def as_dict(analysis: Analysis) -> dict[str, Any]:
    """For JSON; what isn't finite is None."""
    source, options, fit, laws = analysis.source, analysis.options, analysis.fit, analysis.bootstrap
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
            "runs": len(source.table),
            "size_column": source.size_column,
            "unused_columns": source.unused,
        },
        "coefficients": analysis.coefficients,
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
        "dense_equivalent": analysis.gains,
        "held_out": analysis.held_out,
        "cost": options.cost,
        "optima": analysis.optima,
        "warnings": list(analysis.warnings()),
    }
    return finite(found)


def as_text(analysis: Analysis) -> str:
    """For a person."""
    coefficients, *others = grids(analysis)
    parts = ["\n".join(table_lines(analysis)), FORMULA, coefficients.as_text()]
    parts.append("\n".join(fit_lines(analysis)))
    parts += [f"{grid.title}:\n\n{grid.as_text()}" for grid in others]
    if warnings := [f"- {text}" for text in analysis.warnings()]:
        parts.append("\n".join(["Beware:", *warnings]))
    return "\n\n".join(parts)


def table_lines(analysis: Analysis) -> Iterator[str]:
    """What was read, in sentences."""
    t, unused = analysis.source.table, analysis.source.unused
    yield (
        f"{len(t)} runs of {analysis.options.table}: sparsity {show_range(t.sparsity)}, "
        f"non-zero weights {show_range(t.nonzero)}, tokens {show_range(t.tokens)}, "
        f"loss {show_range(t.loss)}."
    )
    if unused:
        yield f"Columns passed over: {', '.join(unused)}."


def fit_lines(analysis: Analysis) -> Iterator[str]:
    """How good the fit is, in sentences."""
    options, fit, laws = analysis.options, analysis.fit, analysis.bootstrap
    yield (
        f"Fit: mean Huber loss {fit.objective:.5g} at delta {options.delta:g}; root mean square of "
        f"log residuals {fit.rmse:.3g}; largest error {fit.max_relative_error:.2%}."
    )
    yield (
        f"Starts: {fit.agreeing} of {fit.starts} end at the best objective, their coefficients "
        f"within {fit.spread:.0e} of each other; {fit.failed} didn't converge."
    )
    if laws.laws:
        yield (
            f"Bootstrap: {options.bootstrap} tables, {laws.failed} of them without a fit; "
            f"{laws.redrawn} drawn again as they varied too little."
        )
    if ties := [f"{a} and {b} {r:+.3f}" for (a, b), r in analysis.ties.items()]:
        yield f"Tied over the bootstrap, by rank correlation: {', '.join(ties)}."


def grids(analysis: Analysis) -> list[Grid]:
    """The coefficients, then what isn't empty: as good dense models, runs held out, optima."""
    interval = f"{100 * analysis.options.level:.4g}% interval"
    coefficients = [
        {
            "coefficient": name,
            "value": f"{c['value']:.5g}",
            interval: _show(c["interval"], ".4g"),
            "unit": c["unit"],
        }
        for name, c in analysis.coefficients.items()
    ]
    gains = [
        {
            "sparsity": f"{gain['sparsity']:.4g}",
            "times its size": f"{gain['times']:.3g}",
            interval: _show(gain["interval"], ".4g"),
        }
        for gain in analysis.gains
    ]
    held_out = [
        {
            "largest": f"{h['column']} {h['value']:.4g}",
            "runs": str(h["rows"]),
            "mean error": _show(h["mean_error"], "+.2%") or "too little remains",
            "largest error": _show(h["max_error"], ".2%"),
            "rms of the fit": _show(h["rmse"], ".2%"),
        }
        for h in analysis.held_out
    ]
    optima = [
        {
            "FLOPs": f"{r['compute']:.3g}",
            "size": "given" if r["given_size"] else "best",
            "non-zero": f"{r['nonzero']:.3g}",
            "tokens": f"{r['tokens']:.3g}",
            "sparsity": f"{r['sparsity']:.3f}"
            + (" *" if r["outside"] or r["sparsity_beyond_table"] else ""),
            interval: _show(r["sparsity_interval"], ".3f"),
            "loss": f"{r['loss']:.4f}",
            "dense loss": f"{r['dense_loss']:.4f}",
        }
        for r in analysis.optima
    ]
    equivalent = "A dense model of the same loss on the same data has this many times the weights"
    best = f"Best sparsity for training FLOPs, at {analysis.options.cost} cost"
    found = {
        "Coefficients": coefficients,
        equivalent: gains,
        "The largest runs, predicted from a fit without them": held_out,
        f"{best} (* outside the table)": optima,
    }
    return [Grid(title, rows) for title, rows in found.items() if rows]


def _show(value: float | tuple[float, float] | None, form: str) -> str:
    """A number, an interval, or nothing."""
    return "" if value is None else " to ".join(f"{x:{form}}" for x in np.atleast_1d(value))
