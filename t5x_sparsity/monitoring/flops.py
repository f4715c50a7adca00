"""The FLOPs of sparse training if zeros were skipped (Evci et al. 2020, arXiv:1911.11134, H).

A weight that each token meets once takes 2 FLOPs per token in the forward pass if it is kept, 2
more for the gradient of the layer's input, and 2 for its own gradient, which some algorithms also
need for pruned weights: see `Algorithm.densities`. Dense kernels skip nothing; these figures say
what a sparse machine could save.
"""

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5x_sparsity.core.contract import Plan
from t5x_sparsity.core.plan import by_algorithm
from t5x_sparsity.core.schedules import Periodic, last_update
from t5x_sparsity.monitoring.matrix_products import Products

# A ramp of fewer updates than this is not smooth.
_FEW_UPDATES = 5
# Of more steps than this, so many are computed, evenly spaced.
_SAMPLES = 512


def flops_per_token(plan: Plan, densities: Mapping[str, float], step: int) -> tuple[float, float]:
    """FLOPs through the sparse weights at `step`: of a forward pass, and of the train step.

    densities: path -> share of the weight that its mask keeps, in [0, 1].
    """
    forward = training = 0.0
    for path, layer in plan.items():
        used, gradient = layer.algorithm.densities(densities[path], step)
        forward += 2 * layer.size * used
        training += 2 * layer.size * (2 * used + gradient)
    return forward, training


class RunFlops(NamedTuple):
    """FLOPs of a run's matrix products if zeros were skipped, with dense weights and attention.

    Of a forward pass over a batch, here with the last masks, and of all train steps; the dense
    ones are those of the same run without masks.
    """

    dense_forward: float
    forward: float
    dense_training: float
    training: float


class FlopsSoFar:
    """Counts a run's FLOPs while it runs, on the host, from `Algorithm.mask_densities`."""

    def __init__(self, plan: Plan, products: Products, first_step: int = 0):
        """Starts at 0 FLOPs before `first_step`. products: of the loss of one batch."""
        self._sparse = {p: products.of_weights[p] for p in plan}
        self._dense = products.total
        self._rest = self._dense - sum(self._sparse.values())
        self._groups = by_algorithm(plan)
        self._updated = [last_update(a.updates, first_step) for a, _ in self._groups]
        # of a group after an update, for as many as `advance` asks for at once
        self._mask_densities = functools.lru_cache(2 * _SAMPLES)(
            lambda i, updated: self._groups[i][0].mask_densities(self._groups[i][1], updated)
        )
        self._first = self._step = first_step
        self._spent = 0.0

    def advance(self, step: int) -> RunFlops:
        """The FLOPs of all steps before `step`, and of a forward pass with the masks at `step`.

        Raises:
          ValueError: `step` is before one that has been counted.
        """
        if step < self._step:
            raise ValueError(f"steps are counted up to {self._step} already, got {step}")
        new = range(self._step, step)
        self._spent += 3 * self._rest * len(new)
        forward = self._rest
        for i, (algorithm, _) in enumerate(self._groups):
            updates = [t for t in new if algorithm.updates.is_update(t)]
            # update steps are counted separately: they may need gradients of all weights
            for steps in (updates, sorted(set(new).difference(updates))):
                chosen = _evenly(steps)
                spent = [self._of_step(i, updates, t) for t in chosen]
                self._spent += sum(spent) * len(steps) / max(len(chosen), 1)
            self._updated[i] = updates[-1] if updates else self._updated[i]
            for path, density in self._mask_densities(i, self._updated[i]).items():
                forward += self._sparse[path] * algorithm.densities(density, step)[0]
        self._mask_densities.cache_clear()
        self._step = step
        steps = step - self._first
        return RunFlops(self._dense, float(forward), 3 * self._dense * steps, float(self._spent))

    def _of_step(self, group: int, updates: Sequence[int], step: int) -> float:
        """FLOPs of the train step at `step` through the weights of a group."""
        before = bisect.bisect_left(updates, step)
        masks = self._mask_densities(group, updates[before - 1] if before else self._updated[group])
        # weights often share a density
        densities = functools.cache(lambda density: self._groups[group][0].densities(density, step))
        total = 0.0
        for path, density in masks.items():
            forward, gradient = densities(density)
            total += self._sparse[path] * float(2 * forward + gradient)
        return total


def _evenly(steps: Sequence[int]) -> Sequence[int]:
    if len(steps) <= _SAMPLES:
        return steps
    return [steps[int((i + 0.5) * len(steps) / _SAMPLES)] for i in range(_SAMPLES)]


def ramp_warnings(plan: Plan) -> list[str]:
    """Warnings about algorithms that ramp up their level in too few updates to be smooth."""
    found = []
    for algorithm, part in by_algorithm(plan):
        updates, path = algorithm.updates, next(iter(part))
        if not isinstance(updates, Periodic):
            continue
        due = (t for t in range(updates.begin, updates.end + 1) if updates.is_update(t))
        steps = list(itertools.islice(due, _FEW_UPDATES))
        levels = [1 - algorithm.mask_densities(part, t)[path] for t in steps]
        # levels of other algorithms go up and down by design
        rises = levels == sorted(levels) and levels[0] < levels[-1]
        if rises and len(steps) < _FEW_UPDATES:
            found.append(
                f"the level of {type(algorithm).__name__} rises in {len(steps)} mask updates only, "
                f"at steps {', '.join(map(str, steps))}; for a smooth ramp lower "
                f"MASK_UPDATE_PERIOD, which is {updates.period}"
            )
    return found
