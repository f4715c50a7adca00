"""The sparsity that is best for given compute, by the law of `t5x_sparsity.scaling`.

Training costs 6 N D times a multiplier, in FLOPs: N weights that aren't zero in the end, D tokens,
2 FLOPs per weight and token forward and 4 backward. The multiplier is what weights that are pruned
later add:

- gradual: dense for the first quarter, sparsity rising as the cube of Zhu and Gupta (2017,
  https://arxiv.org/abs/1710.01878) up to three quarters, sparse from there. Dense weights are
  N / (1 - S), the average density while it rises is 1 - 3 S / 4, so
  (1/4 + 1/2 (1 - 3 S / 4)) / (1 - S) + 1/4 = 5/8 + 3/8 / (1 - S).
- dense: every step costs what a dense model does, as on hardware that skips no zeros: 1 / (1 - S).
- sparse: every step costs what the sparse model does: 1, as for RigL or SET with sparse updates.

The loss at given compute is convex in u = log(1 - S) and log N, as a sum of exponentials of linear
functions, some to the power b_D of such sums: it is least where its slope is zero.
"""

import dataclasses
import math

from scipy.optimize import brentq

from t5x_sparsity.scaling.law import Law

# multiplier = first + second / (1 - S)
COSTS = {"gradual": (5 / 8, 3 / 8), "dense": (0.0, 1.0), "sparse": (1.0, 0.0)}
FLOPS_PER_WEIGHT_AND_TOKEN = 6
MAX_SPARSITY = 0.999
# No model has more weights; a law fitted to noise may ask for more.
MAX_SIZE = 1e18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best run for the compute.

    Attributes:
      compute: FLOPs of training.
      sparsity: in [0, 1).
      nonzero: weights that aren't zero.
      tokens: that the compute pays for.
      loss: predicted, nats per token.
      dense_loss: of the best dense run: of as many weights, where those are given.
      at_limit: whether more sparsity than was allowed would be better.
    """

    compute: float
    sparsity: float
    nonzero: float
    tokens: float
    loss: float
    dense_loss: float
    at_limit: bool


def multiplier(sparsity, cost: str):
    """Training FLOPs over 6 x non-zero weights x tokens; cost is 'gradual', 'dense' or 'sparse'."""
    first, second = COSTS[cost]
    return first + second / (1 - sparsity)


def training_flops(sparsity, nonzero, tokens, cost: str):
    """FLOPs of training; arrays broadcast."""
    return FLOPS_PER_WEIGHT_AND_TOKEN * nonzero * tokens * multiplier(sparsity, cost)


def optimum(
    law: Law,
    compute: float,
    *,
    nonzero: float | None = None,
    cost: str = "gradual",
    max_sparsity: float = MAX_SPARSITY,
) -> Optimum:
    """The run of lowest loss among those that cost `compute` FLOPs.

    Args:
      law: whose a_d, and a_s or c_s, aren't zero.
      compute: FLOPs of training, above 0.
      nonzero: weights that aren't zero in the end; None finds the best number too, in [1, 1e18].
      cost: 'gradual', 'dense' or 'sparse'.
      max_sparsity: the most to consider, in [0, 1).

    Raises:
      ValueError: the law's loss doesn't depend on weights, or on tokens.
      OverflowError: its loss at this compute and size is beyond float64.
    """
    if not law.a_d or not law.a_s + law.c_s:
        raise ValueError("the law has no optimum: its loss doesn't depend on data, or on weights")

    def run(u: float) -> tuple[float, float]:
        n = nonzero if nonzero is not None else _best_size(law, compute, u, cost)
        return n, compute / training_flops(-math.expm1(u), n, 1.0, cost)

    def slope(u: float) -> float:
        # with N at its best, the loss doesn't change with N, so this is all there is
        n, tokens = run(u)
        _, second = COSTS[cost]
        dense = second * math.exp(-u) / multiplier(-math.expm1(u), cost)
        by_size = law.a_s * law.b_s * math.exp(law.b_s * u) * n**-law.b_n
        return by_size - law.b_d * (law.a_d / tokens) ** law.b_d * dense

    lowest = math.log1p(-max_sparsity)
    at_limit = slope(lowest) > 0
    if at_limit:
        u = lowest
    elif slope(0.0) <= 0:
        u = 0.0
    else:
        u = brentq(slope, lowest, 0.0, xtol=1e-13)
    n, tokens = run(u)
    dense_n, dense_tokens = run(0.0)
    sparsity = abs(math.expm1(u))
    return Optimum(
        compute=float(compute),
        sparsity=sparsity,
        nonzero=float(n),
        tokens=float(tokens),
        loss=float(law.loss(sparsity, n, tokens)),
        dense_loss=float(law.loss(0.0, dense_n, dense_tokens)),
        at_limit=at_limit,
    )


def _best_size(law: Law, compute: float, u: float, cost: str) -> float:
    """N at which A N^-b_N + B N^b_D, the loss at this sparsity and compute, is lowest."""
    a = law.a_s * math.exp(law.b_s * u) + law.c_s
    log_per_weight = math.log(training_flops(-math.expm1(u), 1.0, 1.0, cost))
    log_per_weight += math.log(law.a_d) - math.log(compute)
    log_ratio = math.log(law.b_n * a / law.b_d) - law.b_d * log_per_weight
    log_n = log_ratio / (law.b_n + law.b_d)
    return math.exp(min(max(log_n, 0.0), math.log(MAX_SIZE)))
