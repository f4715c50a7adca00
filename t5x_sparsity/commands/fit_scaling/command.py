"""`t5x-sparsity fit-scaling`: the sparse scaling law of a table of runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.report import Report
from t5x_sparsity.commands.fit_scaling.table import Source, read
from t5x_sparsity.commands.output import check_page, spinner, write_page
from t5x_sparsity.commands.text import evenly_spaced
from t5x_sparsity.scaling import intervals as scaling_intervals
from t5x_sparsity.scaling import law as scaling
from t5x_sparsity.scaling.law import Law, Table
from t5x_sparsity.scaling.optimum import Optimum, optimum, training_flops

# what the file names columns of the table
_NAMES = {"nonzero": "nonzero_weights", "tokens": "tokens", "sparsity": "sparsity"}
_UNITS = {
    "a_s": "nats x weights^b_n",
    "c_s": "nats x weights^b_n",
    "a_d": "tokens x nats^(1/b_d)",
    "c": "nats a token",
}


def run(options: FitScalingOptions) -> int:
    """Prints the report; returns the exit code."""
    source = read(options.table)
    out = None if options.plots is None else check_page(options.plots, "--plots", "fit-scaling")
    with spinner("fitting"):
        report = _analyse(source, options)
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


def _analyse(source: Source, options: FitScalingOptions) -> Report:
    """Fits the law, and asks it what is best."""
    table, path = source.table, options.table
    settings = {"delta": options.delta, "seed": options.seed}
    try:
        fit = scaling.fit(table, starts=options.starts, **settings)
    except scaling.NotIdentifiable as e:
        text = str(e).replace("nonzero", _NAMES["nonzero"])
        raise CommandError(f"{path}: {text}") from e
    except RuntimeError as e:
        raise CommandError(f"{path}: {e}; look for wrong values among the losses") from e
    laws = scaling_intervals.bootstrap(table, fit, replicates=options.bootstrap, **settings)
    if options.bootstrap and not laws.laws:
        raise CommandError(
            f"{path}: no resampled table could be fitted; add runs, or --bootstrap=0"
        )
    interval = functools.partial(scaling_intervals.interval, level=options.level)
    settings["starts"] = max(5, options.starts // 3)
    held_out = {
        column: scaling_intervals.hold_out(table, name, **settings)
        for name, column in _NAMES.items()
    }
    return Report(
        options=options,
        source=source,
        fit=fit,
        bootstrap=laws,
        coefficients={
            name: {
                "value": value,
                "interval": interval(laws.values(name)),
                "unit": _UNITS.get(name, ""),
            }
            for name, value in vars(fit.law).items()
        },
        gains=_gains(table, fit.law, laws.laws, interval),
        held_out=[dataclasses.asdict(h) | {"column": column} for column, h in held_out.items()],
        optima=list(_optima(table, options, fit.law, laws.laws, interval)),
    )


@np.errstate(over="ignore", divide="ignore")
def _gains(
    table: Table, law: Law, resampled: Sequence[Law], interval: Callable
) -> list[dict[str, Any]]:
    sparsities = evenly_spaced(scaling.distinct(table.sparsity), 6)
    sized = [x for x in resampled if x.a_s + x.c_s]
    return [
        {
            "sparsity": float(s),
            "times": float(law.dense_equivalent(s)),
            "interval": interval([x.dense_equivalent(s) for x in sized]),
        }
        for s in sparsities
        if s and law.a_s + law.c_s
    ]


def _optima(
    table: Table,
    options: FitScalingOptions,
    law: Law,
    resampled: Sequence[Law],
    interval: Callable,
) -> Iterator[dict[str, Any]]:
    if not law.a_d or not law.a_s + law.c_s:
        return
    costs = training_flops(table.sparsity, table.nonzero, table.tokens, options.cost)
    least, most = costs.min(), costs.max()
    compute = options.compute or [float(x) for x in (least, np.sqrt(least * most), most)]
    sizes = scaling.distinct(table.nonzero)
    sizes = options.size or [float(sizes[len(sizes) // 2])]
    sparsest = float(table.sparsity.max())
    for flops, size in itertools.product(compute, (None, *sizes)):
        best_of = functools.partial(_best, compute=flops, nonzero=size, cost=options.cost)
        best = best_of(law, max_sparsity=sparsest)
        if best is None:
            weights = "" if size is None else f" and {size:g} weights"
            raise CommandError(
                f"{options.table}: the law has no finite loss for {flops:g} FLOPs{weights}; give "
                "--compute and --size nearer to the table's runs"
            )
        others = [best_of(x, max_sparsity=sparsest) for x in resampled]
        beyond = best_of(law) if best.at_limit else None
        yield dataclasses.asdict(best) | {
            "given_size": size is not None,
            "sparsity_interval": interval([x.sparsity for x in others if x]),
            "sparsity_beyond_table": beyond and beyond.sparsity,
            "outside": [
                _NAMES[name]
                for name in ("nonzero", "tokens")
                if not _within(getattr(best, name), getattr(table, name))
            ],
        }


@np.errstate(over="ignore")
def _best(law: Law, **asked) -> Optimum | None:
    """The optimum; None where there is none, or its loss isn't finite."""
    try:
        best = optimum(law, **asked)
    except (ArithmeticError, ValueError):  # too large, or a slope that has no sign
        return None
    return best if math.isfinite(best.loss) and math.isfinite(best.dense_loss) else None


def _within(value: float, values: np.ndarray) -> bool:
    return values.min() * (1 - 1e-6) <= value <= values.max() * (1 + 1e-6)
