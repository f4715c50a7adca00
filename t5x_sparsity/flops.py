"""What sparse training costs in multiply-adds, were zeros skipped (RigL's appendix H).

Evci et al. 2020, arXiv:1911.11134. A weight that each token meets once takes 2 FLOPs a token in the
forward pass if it is kept, 2 more for the gradient of the layer's input, and 2 for its own
gradient, which some algorithms need of pruned weights too: see `Algorithm.densities`. Dense
kernels skip nothing; these figures say what a sparse machine could save.
"""

from __future__ import annotations

from collections.abc import Mapping

from t5x_sparsity.plan import Plan


def forward_flops(plan: Plan, densities: Mapping[str, float], step: int) -> float:
    """FLOPs a token of one forward pass through the sparse weights at `step`.

    densities: path -> share of the weight's entries that its mask keeps, in [0, 1].
    """
    return sum(
        2 * layer.size * layer.algorithm.densities(densities[p], step)[0]
        for p, layer in plan.items()
    )


def train_step_flops(plan: Plan, densities: Mapping[str, float], step: int) -> float:
    """FLOPs a token of the train step at `step`, of the sparse weights."""
    total = 0.0
    for path, layer in plan.items():
        forward, gradient = layer.algorithm.densities(densities[path], step)
        total += 2 * layer.size * (2 * forward + gradient)
    return total


def dense_forward_flops(plan: Plan) -> float:
    """FLOPs a token of one forward pass through the same weights, were they dense."""
    return 2.0 * sum(layer.size for layer in plan.values())
