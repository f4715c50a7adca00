"""The sparse scaling law: loss from sparsity, weights and data, and its fit to a table of runs.

The law is that of Frantar, Riquelme, Houlsby, Alistarh and Evci, "Scaling Laws for
Sparsely-Connected Foundation Models", 2023, https://arxiv.org/abs/2309.08520:

    L(S, N, D) = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c

of the sparsity S in [0, 1), the N weights that aren't zero, and the D tokens trained on. It is
fitted as theirs for language models: the mean Huber loss of log(predicted) - log(measured).
Everything is float64, in numpy.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, least_squares, minimize, nnls
from scipy.special import huber

COEFFICIENTS = ("a_s", "b_s", "c_s", "b_n", "a_d", "b_d", "c")
# with smaller ones, a_d of a term that matters would be no float64
MIN_EXPONENT, MAX_EXPONENT = 0.02, 10.0

# Starts whose objective is as close to the best one, relative to it, agree with it.
_AGREES = 1e-3
# Of loss / its geometric mean: less than this is none at all.
_NOTHING = 1e-6
_LOW = np.array([0.0] * 4 + [math.log(MIN_EXPONENT)] * 3)
_HIGH = np.array([np.inf] * 4 + [math.log(MAX_EXPONENT)] * 3)
# Where a method that works inside its bounds starts at the least; a loss of 0 has no logarithm.
_FIRST_LOW = np.maximum(_LOW + 1e-9, [1e-6] * 4 + [-np.inf] * 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """The seven coefficients of the law, none below zero.

    Attributes:
      a_s: what sparsity can take off, nats x weights^b_n.
      b_s: the exponent of 1 - sparsity.
      c_s: what sparsity can't take off, nats x weights^b_n.
      b_n: the exponent of non-zero weights.
      a_d: tokens x nats^(1 / b_d).
      b_d: the exponent of tokens.
      c: the loss that neither weights nor tokens take off, nats per token.
    """

    a_s: float
    b_s: float
    c_s: float
    b_n: float
    a_d: float
    b_d: float
    c: float

    def loss(self, sparsity, nonzero, tokens):
        """The loss, nats per token; arrays broadcast."""
        data = (self.a_d / np.asarray(tokens, float)) ** self.b_d
        return self._size(sparsity) * np.asarray(nonzero, float) ** -self.b_n + data + self.c

    def dense_equivalent(self, sparsity):
        """How many times its non-zero weights a dense model of the same loss has, 1 or more.

        It depends on neither the size nor the data, which are the same for both.
        """
        return ((self.a_s + self.c_s) / self._size(sparsity)) ** (1 / self.b_n)

    def _size(self, sparsity):
        return self.a_s * (1 - np.asarray(sparsity)) ** self.b_s + self.c_s


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Runs, one per row; four arrays [rows] of float64.

    Attributes:
      sparsity: the share of the counted weights that is zero, in [0, 1).
      nonzero: counted weights that aren't zero, above 0.
      tokens: trained on, above 0.
      loss: in the end, nats per token, above 0.
    """

    sparsity: np.ndarray
    nonzero: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def rows(self, index) -> Table:
        """The rows of an index or mask."""
        return Table(**{k: x[index] for k, x in vars(self).items()})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A fitted law.

    Attributes:
      law: of the best start.
      objective: the mean Huber loss of its log residuals.
      residuals: [rows] log(predicted) - log(measured).
      starts: the fits that were started.
      agreeing: starts that ended within 0.1% of the best objective.
      failed: starts that didn't converge.
      spread: the largest relative difference of a coefficient between agreeing starts.
      condition: condition number of the residuals' slopes, each scaled to length 1: large where
        coefficients can make up for each other.
      bounds: coefficients at their bound: 0, or 0.02 or 10 for exponents.
    """

    law: Law
    objective: float
    residuals: np.ndarray
    starts: int
    agreeing: int
    failed: int
    spread: float
    condition: float
    bounds: tuple[str, ...]

    @property
    def rmse(self) -> float:
        """Root mean square of the log residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def max_relative_error(self) -> float:
        """The largest |predicted / measured - 1|."""
        return float(np.abs(np.expm1(self.residuals)).max())


class NotIdentifiable(ValueError):
    """The table can't tell the coefficients apart; the message names the columns to blame."""


def check(table: Table) -> None:
    """Raises NotIdentifiable unless the table varies in what is to be fitted.

    Needed are 8 rows, for 7 coefficients, 3 values each of sparsity, non-zero weights and tokens,
    and that no two of them, nor all three, vary together, as tokens = 20 x weights would.
    """
    rows, needed = len(table), len(COEFFICIENTS) + 1
    if rows < needed:
        raise NotIdentifiable(
            f"the table has {rows} rows for {len(COEFFICIENTS)} coefficients; at least {needed}"
        )
    for name in ("sparsity", "nonzero", "tokens"):
        found = distinct(getattr(table, name))
        if len(found) < 3:
            values = ", ".join(f"{x:.6g}" for x in found)
            raise NotIdentifiable(f"column {name}: too few different values, {values}; at least 3")
    scaled = _Scaled(table)
    columns = {"sparsity": scaled.u, "nonzero": scaled.n, "tokens": scaled.d}
    for together in (*itertools.combinations(columns, 2), tuple(columns)):
        x = np.stack([columns[n] - columns[n].mean() for n in together], 1)
        singular = np.linalg.svd(x / np.linalg.norm(x, axis=0), compute_uv=False)
        if singular[-1] < 1e-2 * singular[0]:
            raise NotIdentifiable(
                f"the columns {' and '.join(together)} vary together, so no fit can tell apart "
                "what each does; add runs in which one changes and the other doesn't"
            )


def fit(
    table: Table, *, delta: float = 1e-3, starts: int = 50, seed: int = 0, first: Sequence[Law] = ()
) -> Fit:
    """Fits the law from many starts; the best is kept.

    A start draws the exponents at random, log-uniform in [0.05, 2], and takes the other
    coefficients, which are linear then, by non-negative least squares. From there a trust-region
    method with exact slopes and bounds minimises least squares, then the Huber loss; sequential
    quadratic programming takes over where that is slow.

    Args:
      table: see `check` for what it must have.
      delta: where the Huber loss turns from square to linear, in log residuals, above 0.
      starts: 1 or more.
      seed: of the starts; the same seed and table give the same fit.
      first: laws to start from, next to the drawn ones.

    Raises:
      NotIdentifiable: see `check`.
      RuntimeError: no start converged to coefficients that float64 holds.
    """
    check(table)
    random, scaled = np.random.default_rng(seed), _Scaled(table)
    begin = [scaled.vector(law) for law in first] + [scaled.draw(random) for _ in range(starts)]
    ends = [x for x in (scaled.minimize(x, delta) for x in begin) if x is not None]
    ends = [x for x in ends if np.isfinite(dataclasses.astuple(scaled.law(x))).all()]
    if not ends:
        raise RuntimeError(f"none of {len(begin)} starts converged")
    objectives = np.array([huber(delta, scaled.residuals(x)).mean() for x in ends])
    best = int(objectives.argmin())
    # without noise the objective is 0 but for rounding
    agreeing = objectives <= objectives[best] * (1 + _AGREES) + 1e-12 * delta**2
    same = np.array([dataclasses.astuple(scaled.law(x)) for x in np.array(ends)[agreeing]])
    most, law = same.max(0), scaled.law(ends[best])
    return Fit(
        law=law,
        objective=float(objectives[best]),
        residuals=scaled.residuals(ends[best]),
        starts=len(begin),
        agreeing=len(same),
        failed=len(begin) - len(ends),
        spread=float(((most - same.min(0)) / np.where(most > 0, most, 1)).max()),
        condition=scaled.condition(ends[best]),
        bounds=tuple(n for n, x in vars(law).items() if _at_bound(n, x)),
    )


def distinct(values: np.ndarray) -> np.ndarray:
    """The different values, in order; those within a millionth of each other are the same."""
    found = np.unique(values)
    return found[np.diff(found, prepend=-np.inf) > 1e-6 * np.abs(found)]


class _Scaled:
    """A table in units in which all numbers are of order 1: logarithms less their means.

    Four of the coefficients enter linearly then. They are fitted as they are, none below zero, the
    exponents as logarithms: x is (a, k, e, c, log b_s, log b_n, log b_d) throughout, of
    (a exp(b_s u) + k) exp(-b_n n) + e exp(-b_d d) + c.
    """

    def __init__(self, table: Table):
        log_n, log_d, log_l = np.log(table.nonzero), np.log(table.tokens), np.log(table.loss)
        self.n0, self.d0, self.l0 = log_n.mean(), log_d.mean(), log_l.mean()
        self.u = np.log1p(-table.sparsity)
        self.n, self.d, self.log_loss = log_n - self.n0, log_d - self.d0, log_l - self.l0

    def model(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses [rows], and their slopes [rows, 7]."""
        a, k, e, c = x[:4]
        b_s, b_n, b_d = np.exp(x[4:])
        by_s, by_n, by_d = np.exp(b_s * self.u), np.exp(-b_n * self.n), np.exp(-b_d * self.d)
        slopes = (
            by_s * by_n,
            by_n,
            by_d,
            np.ones_like(by_n),
            a * by_s * by_n * self.u * b_s,
            -(a * by_s + k) * by_n * self.n * b_n,
            -e * by_d * self.d * b_d,
        )
        return (a * by_s + k) * by_n + e * by_d + c, np.stack(slopes, 1)

    def residuals(self, x: np.ndarray) -> np.ndarray:
        return np.log(self.model(x)[0]) - self.log_loss

    def slopes(self, x: np.ndarray) -> np.ndarray:
        loss, slopes = self.model(x)
        return slopes / loss[:, None]

    def condition(self, x: np.ndarray) -> float:
        slopes = self.slopes(x)
        norms = np.linalg.norm(slopes, axis=0)
        return float(np.linalg.cond(slopes / norms)) if norms.all() else math.inf

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """A start."""
        x = np.concatenate([np.ones(4), random.uniform(math.log(0.05), math.log(2), 3)])
        # errors relative to the loss are what the objective has
        linear = self.model(x)[1][:, :4] * np.exp(-self.log_loss)[:, None]
        x[:4] = nnls(linear, np.ones(len(linear)))[0]
        return x

    def minimize(self, x: np.ndarray, delta: float) -> np.ndarray | None:
        """The minimum that is found from x; None if none is."""
        for loss, scale in (("linear", 1.0), ("huber", delta)):
            try:
                found = least_squares(
                    self.residuals, np.clip(x, _FIRST_LOW, _HIGH - 1e-9), self.slopes,
                    bounds=(_LOW, _HIGH), loss=loss, f_scale=scale,
                    x_scale="jac", ftol=1e-12, xtol=1e-12, gtol=1e-14, max_nfev=100,
                )  # fmt: skip
            except (ValueError, np.linalg.LinAlgError):
                return None
            x = found.x
        return x if found.status > 0 else self._polish(x, delta)

    def _polish(self, x: np.ndarray, delta: float) -> np.ndarray | None:
        """The same by another method; residuals beyond delta, without curvature, slow the first."""

        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            residuals = self.residuals(x)
            pull = np.clip(residuals, -delta, delta) / len(residuals)
            return huber(delta, residuals).mean() / delta**2, pull @ self.slopes(x) / delta**2

        low = _LOW + 1e-9
        with warnings.catch_warnings():
            # SLSQP warns of steps that it clips to the bounds
            warnings.simplefilter("ignore", RuntimeWarning)
            found = minimize(
                objective, np.maximum(x, low), jac=True, method="SLSQP", bounds=Bounds(low, _HIGH),
                options={"maxiter": 1000, "ftol": 1e-13},
            )  # fmt: skip
        return found.x if found.success and found.fun <= objective(x)[0] else None

    def law(self, x: np.ndarray) -> Law:
        a, k, e, c = np.where(x[:4] < _NOTHING, 0, x[:4]) * math.exp(self.l0)
        b_s, b_n, b_d = np.exp(x[4:])
        with np.errstate(over="ignore"):  # of losses or weights that no run has
            to_n = np.exp(self.n0 * b_n)
            a_d = np.exp(self.d0 + math.log(e) / b_d) if e else 0.0
            found = (a * to_n, b_s, k * to_n, b_n, a_d, b_d, c)
        return Law(**dict(zip(COEFFICIENTS, map(float, found), strict=True)))

    def vector(self, law: Law) -> np.ndarray:
        """The x of a law."""
        with np.errstate(over="ignore", invalid="ignore"):  # of such losses; no start then
            to_n = np.exp(-self.n0 * law.b_n)
            e = np.exp((math.log(law.a_d) - self.d0) * law.b_d) if law.a_d else 0.0
            linear = np.array([law.a_s * to_n, law.c_s * to_n, e, law.c]) / math.exp(self.l0)
        return np.concatenate([linear, np.log([law.b_s, law.b_n, law.b_d])])


def _at_bound(name: str, value: float) -> bool:
    if not name.startswith("b_"):
        return value == 0
    return not MIN_EXPONENT * 1.001 <= value <= MAX_EXPONENT / 1.001
