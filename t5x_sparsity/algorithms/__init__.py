"""Sparse training algorithms: which weights live, from the first step to the last."""

from t5x_sparsity.algorithms.acdc import ACDC
from t5x_sparsity.algorithms.adam_fisher import AdamFisher
from t5x_sparsity.algorithms.common import (
    choose,
    grown,
    magnitudes,
    random_scores,
    scheduled_kept,
    start_scores,
)
from t5x_sparsity.algorithms.decaying_mask import DecayingMask, StructureDecay
from t5x_sparsity.algorithms.drop_and_grow import SET, DropAndGrow, RigL
from t5x_sparsity.algorithms.fixed import Dense, Static
from t5x_sparsity.algorithms.global_pruning import GlobalMagnitude, GlobalSaliency
from t5x_sparsity.algorithms.gradual import GradualPruning, Magnitude, RandomPruning
from t5x_sparsity.algorithms.granet import GraNet
from t5x_sparsity.algorithms.iterative_nm import IterativeNM
from t5x_sparsity.algorithms.mest import MEST
from t5x_sparsity.algorithms.saliency import Saliency
from t5x_sparsity.algorithms.snfs import SNFS
from t5x_sparsity.algorithms.srigl import SRigL
from t5x_sparsity.algorithms.straight_through import SRSTE, MagnitudeSTE, RandomSTE, StraightThrough
from t5x_sparsity.algorithms.top_kast import TopKAST
from t5x_sparsity.core.contract import DENSE, Algorithm, Need, Update, dense_masks, prune

__all__ = [
    "ACDC",
    "DENSE",
    "AdamFisher",
    "Algorithm",
    "DecayingMask",
    "Dense",
    "DropAndGrow",
    "GlobalMagnitude",
    "GlobalSaliency",
    "GraNet",
    "GradualPruning",
    "IterativeNM",
    "MEST",
    "Magnitude",
    "MagnitudeSTE",
    "Need",
    "RandomPruning",
    "RandomSTE",
    "RigL",
    "SET",
    "SNFS",
    "SRSTE",
    "SRigL",
    "Saliency",
    "Static",
    "StraightThrough",
    "StructureDecay",
    "TopKAST",
    "Update",
    "choose",
    "dense_masks",
    "grown",
    "magnitudes",
    "prune",
    "start_scores",
    "random_scores",
    "scheduled_kept",
]
