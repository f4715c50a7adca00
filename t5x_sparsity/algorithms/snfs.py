"""Sparse networks from scratch: growth by the momentum of dense gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from t5x_sparsity.algorithms.common import magnitudes
from t5x_sparsity.algorithms.drop_and_grow import DropAndGrow
from t5x_sparsity.core.checks import check_share
from t5x_sparsity.core.contract import Arrays, Need, Plan, Slots, Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNFS(DropAndGrow):
    """Sparse networks from scratch: grows where the momentum of the gradient is largest.

    Dettmers & Zettlemoyer 2019, arXiv:1907.04840, section 3. m <- momentum m + (1 - momentum) g is
    stored dense, one float32 per weight, separately from the optimizer's momentum. The paper also
    moves weights between layers, by their mean momentum. Here, as in RigL's comparison, the number
    of weights of each layer is constant.

    Attributes:
      momentum: of the running mean, in [0, 1).

    Raises:
      ValueError: a momentum out of range.
    """

    momentum: float = 0.9

    dense_gradients = Need.ALWAYS

    def __post_init__(self) -> None:
        check_share("momentum (MOMENTUM)", self.momentum, closed=False)

    def initial_slots(self, plan: Plan, weights: Arrays, masks: Arrays) -> dict[str, Arrays]:
        return {"momentum": {p: jnp.zeros(x.shape, jnp.float32) for p, x in plan.items()}}

    def observe(self, plan: Plan, update: Update) -> Slots:
        def moved(mean: jax.Array, grad: jax.Array) -> jax.Array:
            grad = grad.astype(jnp.float32)
            # a single gradient that is not finite would stay in the mean forever
            grad = jnp.where(jnp.isfinite(grad), grad, mean)
            return self.momentum * mean + (1 - self.momentum) * grad

        mean = update.slots["momentum"]
        return {"momentum": {p: moved(mean[p], update.grads[p]) for p in plan}}

    def grow_scores(self, plan: Plan, update: Update) -> dict[str, jax.Array]:
        return magnitudes(plan, update.slots["momentum"])
