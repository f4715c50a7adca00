"""The configuration of a sparse run, from which its plan is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from t5x_sparsity.core.contract import Algorithm, LayerPlan
from t5x_sparsity.core.distributions import check_distribution
from t5x_sparsity.core.patterns import Pattern
from t5x_sparsity.core.plan import Rule, check_embedding_level, check_level, make_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What is sparsified, to which level and by which algorithm.

    >>> import jax, t5x_sparsity as ts
    >>> config = SparsityConfig(algorithm=ts.Static(), sparsity=0.75)
    >>> plan = config.plan({"mlp/wi": jax.ShapeDtypeStruct((64, 128), "float32")})
    >>> plan["mlp/wi"].sparsity, plan["mlp/wi"].kept
    (0.75, 2048)

    Attributes:
      algorithm: decides which weights are kept.
      sparsity: the share of zeros among all weights in the shared budget, in [0, 1).
      distribution: how that is shared among layers: 'uniform', 'er', 'erk'.
      pattern: the shape that zeros come in, where no rule says otherwise. None: Unstructured.
      rules: levels, patterns and algorithms for some of the weights; the first that matches a path
        wins.
      embedding_sparsity: level of embeddings, 'auto' for 1 - sqrt(1 - sparsity), None for dense.
      seed: of the masks' random choices, a non-negative integer.
      pack_masks: store masks eight weights per byte where a weight's shape allows.
      track_explored: remember which weights have ever been kept, another bit per weight, for the
        explored share of In-Time Over-Parameterization (Liu et al. 2021, arXiv:2102.02887).

    Raises:
      ValueError: a level out of range, or an unknown distribution.
    """

    algorithm: Algorithm
    sparsity: float = 0.8
    distribution: str = "uniform"
    pattern: Pattern | None = None
    rules: Sequence[Rule] = ()
    embedding_sparsity: float | str | None = None
    seed: int = 0
    pack_masks: bool = True
    track_explored: bool = False

    def __post_init__(self) -> None:
        check_level(self.sparsity, "sparsity (SPARSITY)")
        object.__setattr__(self, "rules", tuple(self.rules))
        check_distribution(self.distribution)
        check_embedding_level(self.embedding_sparsity)

    def plan(
        self,
        shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
        axes: Mapping[str, Sequence[str | None] | None] | None = None,
    ) -> dict[str, LayerPlan]:
        """The plan of every sparse weight, by path; empty for a dense run. See `make_plan`."""
        return make_plan(
            shapes,
            sparsity=self.sparsity,
            distribution=self.distribution,
            pattern=self.pattern,
            algorithm=self.algorithm,
            rules=self.rules,
            embedding_sparsity=self.embedding_sparsity,
            axes=axes,
            pack_masks=self.pack_masks,
        )
