"""The train state initializer that T5X is given."""

from __future__ import annotations

import math

from t5x_sparsity import host
from t5x_sparsity.core import SparsityConfig
from t5x_sparsity.plugin.optimizer import SparseOptimizer


class SparseTrainStateInitializer(host.TrainStateInitializer):
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
    ):
        if optimizer_def is not None:
            if config is None:
                raise ValueError(
                    "SparseTrainStateInitializer has no config; include one of sparsity/*.gin, or "
                    "bind SparseTrainStateInitializer.config = @t5x_sparsity.SparsityConfig()"
                )
            optimizer_def = SparseOptimizer(optimizer_def, config)
        super().__init__(optimizer_def, init_fn, input_shapes, partitioner, input_types)
        if optimizer_def is not None:
            self._check_masks_divide()

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
