"""The train state initializer that T5X is given."""

import math
import re
from typing import Any

from t5x_sparsity import host
from t5x_sparsity.core.plan import SparsityConfig
from t5x_sparsity.t5x.checkpoints import check_sources
from t5x_sparsity.t5x.optimizer import (
    SparseOptimizer,
    optimizer_of,
    sparsity_leaves,
    with_optimizer,
)


class SparseTrainStateInitializer(host.utils.TrainStateInitializer):
    """T5X's initializer, over the run's optimizer made sparse.

    Where there is no optimizer (evaluation, inference), nothing changes: the weights of a sparse
    checkpoint are masked already.
    """

    def __init__(
        self,
        optimizer_def,
        init_fn,
        input_shapes,
        partitioner,
        input_types=None,
        *,
        config: SparsityConfig | None = None,
        model_dir: str | None = None,
        checkpoint_cfg: Any = None,
    ):
        """Takes what T5X's takes, and more.

        Args:
          config: what is made sparse, and how.
          model_dir: the run's folder; its last checkpoint is checked before T5X reads it.
          checkpoint_cfg: the run's; what its `restore` names is checked likewise.

        Raises:
          ValueError: there is no config, a mask can't be split over the mesh, or the checkpoint to
            start from doesn't fit.
        """
        if optimizer_def is not None:
            if config is None:
                raise ValueError(
                    "SparseTrainStateInitializer has no config; include one of sparsity/*.gin, or "
                    "bind SparseTrainStateInitializer.config = @t5x_sparsity.SparsityConfig()"
                )
            _name_expert_state(partitioner, optimizer_def)
            optimizer_def = SparseOptimizer(optimizer_def, config)
        super().__init__(optimizer_def, init_fn, input_shapes, partitioner, input_types)
        if optimizer_def is not None:
            self._check_masks_divide()
            shape = self.global_train_state_shape
            leaves = sparsity_leaves(shape._optimizer.state.sparsity)
            check_sources(model_dir, checkpoint_cfg, leaves, optimizer_def.plan(shape.params))

    def from_scratch(self, init_rng):
        state = super().from_scratch(init_rng)
        optimizer = optimizer_of(state)
        return state if optimizer is None else with_optimizer(state, optimizer.filling_in())

    def _check_masks_divide(self) -> None:
        """A packed mask is an eighth as long as its weight; a very wide mesh may not divide it."""
        sparsity = self.global_train_state_shape._optimizer.state.sparsity
        axes = self.train_state_axes._optimizer.state.sparsity.masks
        sizes = dict(self._partitioner.mesh.shape)
        for path, mask in sparsity.masks.items():
            for dim, names in zip(mask.shape, axes[path] or (), strict=False):
                names = (names,) if isinstance(names, str) else names or ()
                ways = math.prod(sizes[n] for n in names)
                if dim % ways:
                    raise ValueError(
                        f"the packed mask of {path!r} has shape {mask.shape}, and the mesh splits "
                        f"its axis of {dim} in {ways}; store masks a byte a weight by "
                        "--gin.t5x_sparsity.SparsityConfig.pack_masks=False"
                    )


def _name_expert_state(partitioner, optimizer) -> None:
    """Says to T5X's MoE partitioner which leaves of the optimizer's state lie along experts.

    It tells by the optimizer's class, unless it has `state_filter_fn`, and only T5X's own classes
    will do. They are the factored moments of Adafactor; all others have their weight's axes.
    """
    if getattr(partitioner, "_state_filter_fn", optimizer) is not None:
        return
    parts = getattr(optimizer, "sub_optimizers", (optimizer,))
    factored = {bool(getattr(part.hyper_params, "factored", False)) for part in parts}
    if len(factored) == 1:
        pattern = ".*expert.*/kernel/v_(row|col)" if factored.pop() else "$."
        partitioner._state_filter_fn = re.compile(pattern).match
