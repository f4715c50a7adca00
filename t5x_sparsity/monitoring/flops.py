"""The FLOPs of sparse training if zeros were skipped (Evci et al. 2020, arXiv:1911.11134, H).

A weight that each token meets once takes 2 FLOPs per token in the forward pass if it is kept, 2
more for the gradient of the layer's input, and 2 for its own gradient, which some algorithms also
need for pruned weights: see `Algorithm.densities`. Dense kernels skip nothing; these figures say
what a sparse machine could save.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from t5x_sparsity.core.contract import Plan
from t5x_sparsity.core.plan import by_algorithm
from t5x_sparsity.core.schedules import Periodic, last_update
from t5x_sparsity.monitoring.matrix_products import Products

# A ramp of fewer updates than this is not smooth.
_FEW_UPDATES = 5
# Of more steps than this, so many are computed, evenly spaced.
_SAMPLES = 512


def forward_flops(plan: Plan, densities: Mapping[str, float], step: int) -> float:
    """FLOPs per token of one forward pass through the sparse weights at `step`.

    densities: path -> share of the weight that its mask keeps, in [0, 1].
    """
    return sum(
        2 * layer.size * layer.algorithm.densities(densities[p], step)[0]
        for p, layer in plan.items()
    )


def train_step_flops(plan: Plan, densities: Mapping[str, float], step: int) -> float:
    """FLOPs per token of the train step at `step`, of the sparse weights; see `forward_flops`."""
    total = 0.0
    for path, layer in plan.items():
        forward, gradient = layer.algorithm.densities(densities[path], step)
        total += 2 * layer.size * (2 * forward + gradient)
    return total


def dense_forward_flops(plan: Plan) -> float:
    """FLOPs per token of one forward pass through the same weights if they were dense."""
    return 2.0 * sum(layer.size for layer in plan.values())


class RunFlops(NamedTuple):
    """FLOPs of a run's matrix products if zeros were skipped, with dense weights and attention.

    Attributes:
      dense_forward: of one forward pass of the dense model over a batch.
      forward: of one forward pass over a batch with the last masks.
      dense_training: of all train steps of a dense run.
      training: of all train steps of this one.
    """

    dense_forward: float
    forward: float
    dense_training: float
    training: float


def run_flops(plan: Plan, products: Products, total_steps: int) -> RunFlops:
    """FLOPs of a run of `total_steps`, from its schedules; see `Algorithm.mask_densities`.

    products: of the loss of one batch.
    """
    return FlopsSoFar(plan, products).advance(total_steps)


class FlopsSoFar:
    """Counts a run's FLOPs while it runs, on the host, from `Algorithm.mask_densities`."""

    def __init__(self, plan: Plan, products: Products, first_step: int = 0):
        """Starts at 0 FLOPs before `first_step`. products: of the loss of one batch."""
        self._sparse = {p: products.of_weights[p] for p in plan}
        self._dense = products.total
        self._rest = self._dense - sum(self._sparse.values())
        self._groups = by_algorithm(plan)
        # of each group, the last update before the next step
        lasts = [last_update(a.updates, first_step) for a, _ in self._groups]
        self._updates = [[] if t is None else [t] for t in lasts]
        # of each group, the densities of its masks after an update
        self._densities = [{} for _ in self._groups]
        self._first = self._step = first_step
        self._spent = 0.0

    def advance(self, step: int) -> RunFlops:
        """The FLOPs of all steps before `step`, and of a forward pass with the masks at `step`.

        Raises:
          ValueError: `step` is before one that has been counted.
        """
        if step < self._step:
            raise ValueError(f"steps are counted up to {self._step} already, got {step}")
        self._spent += 3 * self._rest * (step - self._step)
        forward = self._rest
        for i, (algorithm, _) in enumerate(self._groups):
            new = [t for t in range(self._step, step) if algorithm.updates.is_update(t)]
            updates = np.asarray(self._updates[i] + new, np.int64)
            is_update = np.zeros(step - self._step, bool)
            is_update[np.asarray(new, np.int64) - self._step] = True
            # update steps are counted separately: they may need gradients of all weights
            for steps in (np.flatnonzero(is_update), np.flatnonzero(~is_update)):
                chosen = _evenly(steps)
                spent = [self._of_step(i, updates, int(t) + self._step) for t in chosen]
                self._spent += sum(spent) * len(steps) / max(len(chosen), 1)
            self._updates[i] = updates[-1:].tolist()
            last = self._updates[i][0] if len(updates) else None
            for path, density in self._mask_densities(i, last).items():
                forward += self._sparse[path] * algorithm.densities(density, step)[0]
            self._densities[i] = {last: self._mask_densities(i, last)}  # others are past
        self._step = step
        steps = step - self._first
        return RunFlops(self._dense, float(forward), 3 * self._dense * steps, float(self._spent))

    def _of_step(self, group: int, updates: np.ndarray, step: int) -> float:
        """FLOPs of the train step at `step` through the weights of a group."""
        before = int(np.searchsorted(updates, step))
        last = int(updates[before - 1]) if before else None
        algorithm = self._groups[group][0]
        total, computed = 0.0, {}
        for path, density in self._mask_densities(group, last).items():
            if density not in computed:
                forward, gradient = algorithm.densities(density, step)
                computed[density] = float(2 * forward + gradient)
            total += self._sparse[path] * computed[density]
        return total

    def _mask_densities(self, group: int, updated: int | None) -> Mapping[str, float]:
        known = self._densities[group]
        if updated not in known:
            algorithm, part = self._groups[group]
            known[updated] = algorithm.mask_densities(part, updated)
        return known[updated]


def _evenly(steps: np.ndarray) -> np.ndarray:
    if len(steps) <= _SAMPLES:
        return steps
    return steps[((np.arange(_SAMPLES) + 0.5) * len(steps) / _SAMPLES).astype(int)]


def ramp_warnings(plan: Plan) -> list[str]:
    """Warnings about algorithms that ramp up their level in too few updates to be smooth."""
    found = []
    for algorithm, part in by_algorithm(plan):
        updates, path = algorithm.updates, next(iter(part))
        if not isinstance(updates, Periodic):
            continue
        if updates.end - updates.begin >= _FEW_UPDATES * updates.period:
            continue
        steps = [t for t in range(updates.begin, updates.end + 1) if updates.is_update(t)]
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
