"""Sparse training of language models with T5X, or with any optax optimizer."""

from __future__ import annotations

import importlib

from t5x_sparsity.algorithms import (
    ACDC,
    MEST,
    SET,
    SNFS,
    SRSTE,
    AdamFisher,
    Algorithm,
    DecayingMask,
    Dense,
    GlobalMagnitude,
    GlobalSaliency,
    GraNet,
    IterativeNM,
    Magnitude,
    MagnitudeSTE,
    RandomPruning,
    RandomSTE,
    RigL,
    Saliency,
    SRigL,
    Static,
    StructureDecay,
    TopKAST,
)
from t5x_sparsity.core import SparsityConfig
from t5x_sparsity.metrics import sparsity_summary
from t5x_sparsity.patterns import Block, Channel, ConstantFanIn, NByM, Unstructured
from t5x_sparsity.plan import Rule
from t5x_sparsity.schedules import (
    Constant,
    Cosine,
    Exponential,
    Listed,
    Never,
    OneShot,
    Periodic,
    Polynomial,
)
from t5x_sparsity.sparsify import apply_masks, sparsify

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "AdamFisher",
    "Algorithm",
    "Block",
    "Channel",
    "Constant",
    "ConstantFanIn",
    "Cosine",
    "DecayingMask",
    "Dense",
    "Exponential",
    "GlobalMagnitude",
    "GlobalSaliency",
    "GraNet",
    "IterativeNM",
    "Listed",
    "MEST",
    "Magnitude",
    "MagnitudeSTE",
    "NByM",
    "Never",
    "OneShot",
    "Periodic",
    "Polynomial",
    "RandomPruning",
    "RandomSTE",
    "RigL",
    "Rule",
    "SET",
    "SNFS",
    "SRSTE",
    "SRigL",
    "Saliency",
    "SparseOptimizer",
    "SparseTrainStateInitializer",
    "SparsityConfig",
    "Static",
    "StructureDecay",
    "TopKAST",
    "Unstructured",
    "apply_masks",
    "checkpoint_step",
    "from_dense",
    "host",
    "make_sparse",
    "sparse_trainer",
    "sparsify",
    "sparsity_summary",
]

# Names that need a host, T5X or the embedded one: loaded when a gin file or a user asks for them.
_LAZY = {
    "SparseOptimizer": "t5x_sparsity.plugin",
    "SparseTrainStateInitializer": "t5x_sparsity.plugin",
    "checkpoint_step": "t5x_sparsity.plugin",
    "from_dense": "t5x_sparsity.plugin",
    "make_sparse": "t5x_sparsity.plugin",
    "sparse_trainer": "t5x_sparsity.plugin",
}


def __getattr__(name: str):
    if name == "host":
        return importlib.import_module("t5x_sparsity.host")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
