"""What T5X is given: an initializer and a trainer that make a run sparse."""

from t5x_sparsity.plugin import gin_checks
from t5x_sparsity.plugin.checkpoints import checkpoint_step, from_dense
from t5x_sparsity.plugin.fiddle import make_sparse
from t5x_sparsity.plugin.initializer import SparseTrainStateInitializer
from t5x_sparsity.plugin.optimizer import SparseOptimizer
from t5x_sparsity.plugin.trainer import sparse_trainer

gin_checks.register()

__all__ = [
    "SparseOptimizer",
    "SparseTrainStateInitializer",
    "checkpoint_step",
    "from_dense",
    "make_sparse",
    "sparse_trainer",
]
