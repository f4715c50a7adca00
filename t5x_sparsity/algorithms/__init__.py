"""Sparse training algorithms: which weights live, from the first step to the last."""

from t5x_sparsity.algorithms.base import Algorithm, Update
from t5x_sparsity.algorithms.drop_and_grow import SET, DropAndGrow, RigL
from t5x_sparsity.algorithms.fixed import Dense, Static
from t5x_sparsity.algorithms.magnitude import Magnitude

__all__ = ["Algorithm", "Dense", "DropAndGrow", "Magnitude", "RigL", "SET", "Static", "Update"]
