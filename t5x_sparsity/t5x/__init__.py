"""What T5X is given: an initializer and a trainer that make a run sparse."""

# first, since it says what to install where a package is missing
from t5x_sparsity import host  # noqa: F401
from t5x_sparsity.t5x import gin_checks
from t5x_sparsity.t5x.checkpoints import checkpoint_step, from_dense
from t5x_sparsity.t5x.fiddle import make_sparse
from t5x_sparsity.t5x.initializer import SparseTrainStateInitializer
from t5x_sparsity.t5x.optimizer import SparseOptimizer
from t5x_sparsity.t5x.trainer import sparse_trainer

gin_checks.register()

__all__ = [
    "SparseOptimizer",
    "SparseTrainStateInitializer",
    "checkpoint_step",
    "from_dense",
    "make_sparse",
    "sparse_trainer",
]
