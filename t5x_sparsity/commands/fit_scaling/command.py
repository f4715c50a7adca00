"""`t5x-sparsity fit-scaling`: the sparse scaling law of a table of runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence

import numpy as np

from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.report import BestRun, Report, column_name, show_range
from t5x_sparsity.commands.fit_scaling.table import Source, read
from t5x_sparsity.commands.output import check_page, spinner, write_page
from t5x_sparsity.commands.text import evenly_spaced
from t5x_sparsity.scaling import intervals as scaling_intervals
from t5x_sparsity.scaling import law as scaling
from t5x_sparsity.scaling.intervals import Bootstrap, HeldOut
from t5x_sparsity.scaling.law import COEFFICIENTS, Fit, Law
from t5x_sparsity.scaling.optimum import MAX_SPARSITY, Optimum, optimum, training_flops

_ILL_CONDITIONED = 1e4
# what a held-out prediction may be off, whatever the fit's own errors are
_GOOD = 1e-3


def run(options: FitScalingOptions) -> int:
    """Prints the report; returns the exit code."""
    source = read(options.table)
    out = None if options.plots is None else check_page(options.plots, "--plots", "fit-scaling")
    with spinner("fitting"):
        report = analyse(source, options)
        if out:
            from t5x_sparsity.commands.fit_scaling.page import page

            write_page(out, page(report), "--plots")
    if options.json:
        print(json.dumps(report.as_dict(), indent=1, allow_nan=False))
    else:
        print(report.as_text())
    if out:
        print(f"wrote {out}", file=sys.stderr)
    return 0


def analyse(source: Source, options: FitScalingOptions) -> Report:
    """Fits the law, and asks it what is best.

    Raises:
      CommandError: the table can't tell the coefficients apart, or nothing is best that a float64
        holds.
    """
    table, delta, seed = source.table, options.delta, options.seed
    try:
        fit = scaling.fit(table, delta=delta, starts=options.starts, seed=seed)
    except scaling.NotIdentifiable as e:
        name = e.column.replace("nonzero", "nonzero_weights")
        if e.column == "rows":
            raise CommandError(f"{source.path} has {e}") from e
        if " and " in name:
            text = str(e).replace("nonzero", "nonzero_weights")
            raise CommandError(f"{source.path}: {text}") from e
        raise CommandError(f"{source.path}, column {name}: {e}") from e
    except RuntimeError as e:
        raise CommandError(f"{source.path}: {e}; look for wrong values among the losses") from e
    laws, intervals = None, {}
    if options.bootstrap:
        laws = scaling_intervals.bootstrap(
            table, fit, replicates=options.bootstrap, delta=delta, seed=seed
        )
        if not laws.laws:
            raise CommandError(
                f"{source.path}: no resampled table could be fitted; add runs, or --bootstrap=0"
            )
        intervals = {
            n: scaling_intervals.interval(laws.values(n), options.level) for n in COEFFICIENTS
        }
    held_out = [
        scaling_intervals.hold_out(
            table, name, delta=delta, starts=max(5, options.starts // 3), seed=seed
        )
        for name in ("nonzero", "tokens", "sparsity")
    ]
    gains = {}
    sized = [law for law in laws.laws if _has_size(law)] if laws else []
    for s in evenly_spaced(scaling.distinct(table.sparsity), 6):
        if s and _has_size(fit.law):
            with np.errstate(over="ignore", divide="ignore"):
                values = [law.dense_equivalent(s) for law in sized]
                gain = float(fit.law.dense_equivalent(s))
            interval = scaling_intervals.interval(values, options.level) if values else None
            gains[float(s)] = gain, interval
    optima = _optima(source, options, fit.law, laws)
    return Report(
        options=options,
        source=source,
        fit=fit,
        bootstrap=laws,
        intervals=intervals,
        gains=gains,
        held_out=held_out,
        optima=optima,
        warnings=_warnings(fit, laws, held_out, optima, options),
    )


def _optima(
    source: Source, options: FitScalingOptions, law: Law, laws: Bootstrap | None
) -> list[BestRun]:
    table = source.table
    if not law.a_d or not _has_size(law):
        return []
    costs = training_flops(table.sparsity, table.nonzero, table.tokens, options.cost)
    least, most = costs.min(), costs.max()
    compute = options.compute or [float(x) for x in (least, np.sqrt(least * most), most)]
    sizes = scaling.distinct(table.nonzero)
    sizes = options.size or [float(sizes[len(sizes) // 2])]
    sparsest = float(table.sparsity.max())
    found = []
    for flops in compute:
        for size in (None, *sizes):
            asked = {"nonzero": size, "cost": options.cost}
            best = _best(law, flops, max_sparsity=sparsest, **asked)
            if best is None:
                weights = "" if size is None else f" and {size:g} weights"
                raise CommandError(
                    f"{source.path}: the law has no finite loss for {flops:g} FLOPs{weights}; give "
                    "--compute and --size nearer to the table's runs"
                )
            interval = None
            # a law without one of these terms has no optimum
            usable = [x for x in laws.laws if x.a_d and _has_size(x)] if laws else []
            values = [_best(x, flops, max_sparsity=sparsest, **asked) for x in usable]
            values = [x.sparsity for x in values if x is not None]
            if values:
                interval = scaling_intervals.interval(values, options.level)
            beyond = _best(law, flops, **asked) if best.at_limit else None
            outside = [
                column_name(name)
                for name in ("nonzero", "tokens")
                if not _within(getattr(best, name), getattr(table, name))
            ]
            found.append(
                BestRun(
                    best=best,
                    given_size=size is not None,
                    interval=interval,
                    beyond=beyond and beyond.sparsity,
                    outside=tuple(outside),
                )
            )
    return found


def _has_size(law: Law) -> bool:
    """Whether the loss depends on weights."""
    return law.a_s + law.c_s > 0


def _best(law: Law, flops: float, **asked) -> Optimum | None:
    """The optimum of a law that depends on data and weights; None if its loss isn't finite."""
    try:
        with np.errstate(over="ignore"):
            best = optimum(law, flops, **asked)
    except (ArithmeticError, ValueError):  # too large, or a slope that has no sign
        return None
    return best if math.isfinite(best.loss) and math.isfinite(best.dense_loss) else None


def _warnings(
    fit: Fit,
    laws: Bootstrap | None,
    held_out: Sequence[HeldOut],
    optima: Sequence[BestRun],
    options: FitScalingOptions,
) -> list[str]:
    found = []
    if fit.agreeing < fit.starts / 2:
        found.append(
            f"Only {fit.agreeing} of {fit.starts} starts end at the best objective; there may be a "
            "better one, so raise --starts."
        )
    if fit.spread > 0.01:
        found.append(
            f"The objective is flat: coefficients {fit.spread:.0%} apart are as good as each other."
        )
    if fit.condition > _ILL_CONDITIONED:
        found.append(
            f"The table hardly tells coefficients apart (condition number {fit.condition:.0e}); "
            "trust predictions inside its range, not the coefficients."
        )
    for name in fit.bounds:
        found.append(f"The coefficient {name} ends at its bound, {getattr(fit.law, name):.3g}.")
    if laws and laws.failed > 0.05 * options.bootstrap:
        found.append(f"{laws.failed} resampled tables have no fit; the intervals leave them out.")
    for h in held_out:
        if h.rmse is not None and abs(h.mean_error) > max(3 * h.rmse, _GOOD):
            name = column_name(h.column)
            found.append(
                f"Runs of the largest {name} are {h.mean_error:+.1%} off when predicted from the "
                f"others, which the fit has within {h.rmse:.1%}: it extrapolates badly there."
            )
    if not optima:
        found.append("The fit doesn't depend on data, or on weights, so no sparsity is best.")
    beyond = [r for r in optima if r.beyond is not None]
    if beyond:
        own = [r.beyond for r in beyond]
        end = (
            "the more the better"
            if min(own) >= MAX_SPARSITY
            else f"{show_range(np.array(own))} by the law itself, which no run supports"
        )
        found.append(
            f"{len(beyond)} of the best sparsities are at the edge of the table's range: {end}."
        )
    outside = sorted({name for r in optima for name in r.outside})
    if outside:
        found.append(
            f"Marked rows have {' or '.join(outside)} outside the table's range: extrapolated."
        )
    return found


def _within(value: float, values: np.ndarray) -> bool:
    return values.min() * (1 - 1e-6) <= value <= values.max() * (1 + 1e-6)
