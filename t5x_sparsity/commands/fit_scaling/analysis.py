"""What `t5x-sparsity fit-scaling` finds: the law, how far to trust it, and what is best by it."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.table import Source
from t5x_sparsity.commands.text import evenly_spaced
from t5x_sparsity.scaling import intervals as scaling_intervals
from t5x_sparsity.scaling import law as scaling
from t5x_sparsity.scaling.intervals import Bootstrap
from t5x_sparsity.scaling.law import Fit, Law
from t5x_sparsity.scaling.optimum import MAX_SPARSITY, Optimum, optimum, training_flops

# what the file names columns of the table
_NAMES = {"nonzero": "nonzero_weights", "tokens": "tokens", "sparsity": "sparsity"}
_UNITS = {
    "a_s": "nats x weights^b_n",
    "c_s": "nats x weights^b_n",
    "a_d": "tokens x nats^(1/b_d)",
    "c": "nats a token",
}
_TIED = 0.9
_ILL_CONDITIONED = 1e4
# what a held-out prediction may be off, whatever the fit's own errors are
_GOOD = 1e-3

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """All that the command finds, each computed when it is first asked for.

    Rows have the keys that they have in JSON.
    """

    source: Source
    options: FitScalingOptions

    @functools.cached_property
    def fit(self) -> Fit:
        """The law, fitted to the table."""
        path = self.options.table
        try:
            return scaling.fit(self.source.table, starts=self.options.starts, **self._settings)
        except scaling.NotIdentifiable as e:
            text = str(e).replace("nonzero", _NAMES["nonzero"])
            raise CommandError(f"{path}: {text}") from e
        except RuntimeError as e:
            raise CommandError(f"{path}: {e}; look for wrong values among the losses") from e

    @functools.cached_property
    def bootstrap(self) -> Bootstrap:
        """Laws fitted to resampled tables; none with --bootstrap=0."""
        path, replicates = self.options.table, self.options.bootstrap
        found = scaling_intervals.bootstrap(
            self.source.table, self.fit, replicates=replicates, **self._settings
        )
        if replicates and not found.laws:
            raise CommandError(
                f"{path}: no resampled table could be fitted; add runs, or --bootstrap=0"
            )
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        return {"delta": self.options.delta, "seed": self.options.seed}

    def _interval(self, values: Sequence[float]) -> tuple[float, float] | None:
        return scaling_intervals.interval(values, self.options.level)

    @functools.cached_property
    def coefficients(self) -> dict[str, Row]:
        """Value, interval and unit, by name."""
        return {
            name: {
                "value": value,
                "interval": self._interval(self.bootstrap.values(name)),
                "unit": _UNITS.get(name, ""),
            }
            for name, value in vars(self.fit.law).items()
        }

    @functools.cached_property
    def ties(self) -> dict[tuple[str, str], float]:
        """Coefficients that make up for each other over the bootstrap, by rank correlation."""
        return {pair: r for pair, r in self.bootstrap.correlations().items() if abs(r) > _TIED}

    @functools.cached_property
    def gains(self) -> list[Row]:
        """How many times its non-zero weights a dense model has that is as good as a sparse one."""
        if not _depends_on_size(self.fit.law):
            return []
        laws = [law for law in self.bootstrap.laws if _depends_on_size(law)]
        with np.errstate(over="ignore", divide="ignore"):
            return [
                {
                    "sparsity": float(s),
                    "times": float(self.fit.law.dense_equivalent(s)),
                    "interval": self._interval([law.dense_equivalent(s) for law in laws]),
                }
                for s in evenly_spaced(scaling.distinct(self.source.table.sparsity), 6)
                if s
            ]

    @functools.cached_property
    def held_out(self) -> list[Row]:
        """How the largest runs are predicted from a fit without them."""
        settings = {**self._settings, "starts": max(5, self.options.starts // 3)}
        return [
            dataclasses.asdict(scaling_intervals.hold_out(self.source.table, name, **settings))
            | {"column": column}
            for name, column in _NAMES.items()
        ]

    @functools.cached_property
    def optima(self) -> list[Row]:
        """The best runs for compute, and size.

        They are no sparser than the table's sparsest; `sparsity_beyond_table` is the law's own
        optimum where that is sparser, `outside` names columns in which they leave its range.
        """
        table, law, options = self.source.table, self.fit.law, self.options
        if not law.a_d or not _depends_on_size(law):
            return []
        costs = training_flops(table.sparsity, table.nonzero, table.tokens, options.cost)
        least, most = costs.min(), costs.max()
        compute = options.compute or [float(x) for x in (least, np.sqrt(least * most), most)]
        sizes = scaling.distinct(table.nonzero)
        sizes = options.size or [float(sizes[len(sizes) // 2])]
        return [self._best_run(*asked) for asked in itertools.product(compute, (None, *sizes))]

    def _best_run(self, compute: float, size: float | None) -> Row:
        table, law, options = self.source.table, self.fit.law, self.options
        best_of = functools.partial(_best, compute=compute, nonzero=size, cost=options.cost)
        sparsest = float(table.sparsity.max())
        best = best_of(law, max_sparsity=sparsest)
        if best is None:
            weights = "" if size is None else f" and {size:g} weights"
            raise CommandError(
                f"{options.table}: the law has no finite loss for {compute:g} FLOPs{weights}; give "
                "--compute and --size nearer to the table's runs"
            )
        resampled = [best_of(x, max_sparsity=sparsest) for x in self.bootstrap.laws]
        beyond = best_of(law) if best.at_limit else None
        return dataclasses.asdict(best) | {
            "given_size": size is not None,
            "sparsity_interval": self._interval([x.sparsity for x in resampled if x]),
            "sparsity_beyond_table": beyond and beyond.sparsity,
            "outside": [
                _NAMES[name]
                for name in ("nonzero", "tokens")
                if not _within(getattr(best, name), getattr(table, name))
            ],
        }

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
        if laws.failed > 0.05 * self.options.bootstrap:
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
                end = f"{show_range(beyond)} by the law itself, which no run supports"
            yield (
                f"{len(beyond)} of the best sparsities are at the edge of the table's range: {end}."
            )
        if outside := sorted({name for r in optima for name in r["outside"]}):
            columns = " or ".join(outside)
            yield f"Marked rows have {columns} outside the table's range: extrapolated."


def show_range(values: Sequence[float]) -> str:
    """The least and the most of them."""
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _depends_on_size(law: Law) -> bool:
    return law.a_s + law.c_s > 0


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
