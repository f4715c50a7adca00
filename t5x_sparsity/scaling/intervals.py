"""How far a fit can be trusted: resampled tables, and held-out runs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from t5x_sparsity.scaling.law import COEFFICIENTS, Fit, Law, NotIdentifiable, Table, distinct, fit

_DRAWS = 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bootstrap:
    """Laws fitted to resampled tables.

    Attributes:
      laws: one for each table that was fitted.
      failed: tables whose fit didn't converge.
      redrawn: draws put back because they couldn't tell the coefficients apart.
    """

    laws: tuple[Law, ...]
    failed: int
    redrawn: int

    def values(self, name: str) -> np.ndarray:
        """A coefficient of every law, [laws]."""
        return np.array([getattr(law, name) for law in self.laws])

    def correlations(self) -> dict[tuple[str, str], float]:
        """Rank correlation of each pair of coefficients, in [-1, 1]; 0 for fewer than 3 laws."""
        if len(self.laws) > 2:
            r = np.corrcoef([self.values(n).argsort().argsort() for n in COEFFICIENTS])
        else:
            r = np.zeros([len(COEFFICIENTS)] * 2)
        return {
            (other, one): float(r[i, j])
            for i, one in enumerate(COEFFICIENTS)
            for j, other in enumerate(COEFFICIENTS[:i])
        }


def interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """The percentile interval that holds `level` of the values, in (0, 1); None without values."""
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    table: Table, best: Fit, *, replicates: int, delta: float = 1e-3, seed: int = 0, starts: int = 2
) -> Bootstrap:
    """Fits the law to tables of as many rows, drawn from this one with replacement.

    Rows are drawn from all rows, not within each sparsity: a sparsity with one row would otherwise
    never vary. A draw that can't tell the coefficients apart is repeated, up to 20 times. Each
    fit starts from the best one and from `starts` more. The order of rows doesn't matter.

    Args:
      table: that was fitted.
      best: its fit.
      replicates: tables to draw.
      delta: of the fit.
      seed: of the draws.
      starts: of each fit, next to the best one.
    """
    table = table.rows(np.lexsort((table.loss, table.tokens, table.nonzero, table.sparsity)))
    random = np.random.default_rng([seed, 1])
    laws, redrawn = [], 0
    for _ in range(replicates):
        for _ in range(_DRAWS):
            drawn = table.rows(random.integers(len(table), size=len(table)))
            own_seed = int(random.integers(2**31))
            try:
                found = fit(drawn, delta=delta, starts=starts, seed=own_seed, first=[best.law])
                laws.append(found.law)
            except NotIdentifiable:
                redrawn += 1
                continue
            except RuntimeError:
                pass
            break
    return Bootstrap(laws=tuple(laws), failed=replicates - len(laws), redrawn=redrawn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How a law fitted without the largest runs predicts them; errors are None without a fit.

    Attributes:
      column: 'nonzero', 'tokens' or 'sparsity', whose largest value was held out.
      value: the largest value.
      rows: held out.
      mean_error: mean of predicted / measured - 1 over them.
      max_error: the largest |predicted / measured - 1|.
      rmse: of the log residuals of the rows that were fitted.
    """

    column: str
    value: float
    rows: int
    mean_error: float | None = None
    max_error: float | None = None
    rmse: float | None = None


def hold_out(
    table: Table, column: str, *, delta: float = 1e-3, starts: int = 20, seed: int = 0
) -> HeldOut:
    """Fits without the rows that have the column's largest value, and predicts those."""
    values = getattr(table, column)
    largest = float(distinct(values)[-1])
    held = values >= largest * (1 - 1e-6)
    result = HeldOut(column=column, value=largest, rows=int(held.sum()))
    try:
        found = fit(table.rows(~held), delta=delta, starts=starts, seed=seed)
    except (NotIdentifiable, RuntimeError):
        return result
    out = table.rows(held)
    errors = found.law.loss(out.sparsity, out.nonzero, out.tokens) / out.loss - 1
    mean, most = float(errors.mean()), float(np.abs(errors).max())
    return dataclasses.replace(result, mean_error=mean, max_error=most, rmse=found.rmse)
