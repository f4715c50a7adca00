"""What T5X is given: an initializer and a trainer that make a run sparse."""

# first, since it says what to install where a package is missing
from t5x_sparsity import host  # noqa: F401
from t5x_sparsity.t5x import gin_checks  # noqa: F401  # registers its check with gin
from t5x_sparsity.t5x.checkpoints import checkpoint_step as checkpoint_step
from t5x_sparsity.t5x.checkpoints import from_dense as from_dense
from t5x_sparsity.t5x.fiddle import make_sparse as make_sparse
from t5x_sparsity.t5x.initializer import SparseTrainStateInitializer as SparseTrainStateInitializer
from t5x_sparsity.t5x.optimizer import SparseOptimizer as SparseOptimizer
from t5x_sparsity.t5x.trainer import sparse_trainer as sparse_trainer
