"""Sparse training of language models with T5X, or with any optax optimizer.

Names are loaded when they are first asked for: the command line needs none of them for its help,
and those of the plugin need a host, T5X or the embedded one.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# where each public name is
_NAMES = {
    "algorithms": (
        "ACDC",
        "AdamFisher",
        "Algorithm",
        "DecayingMask",
        "Dense",
        "GlobalMagnitude",
        "GlobalSaliency",
        "GraNet",
        "IterativeNM",
        "MEST",
        "Magnitude",
        "MagnitudeSTE",
        "RandomPruning",
        "RandomSTE",
        "RigL",
        "SET",
        "SNFS",
        "SRSTE",
        "SRigL",
        "Saliency",
        "Static",
        "StructureDecay",
        "TopKAST",
    ),
    "core.config": ("SparsityConfig",),
    "artifacts.export": ("load_export",),
    "monitoring.summary": ("sparsity_summary", "summary_table"),
    "core.patterns": (
        "Block",
        "Channel",
        "ConstantFanIn",
        "NByM",
        "Unstructured",
    ),
    "core.plan": ("Rule",),
    "t5x": (
        "SparseOptimizer",
        "SparseTrainStateInitializer",
        "checkpoint_step",
        "from_dense",
        "make_sparse",
        "sparse_trainer",
    ),
    "core.schedules": (
        "Constant",
        "Cosine",
        "Exponential",
        "Listed",
        "Never",
        "OneShot",
        "Periodic",
        "Polynomial",
    ),
    "transformation": (
        "apply_masks",
        "sparsify",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("host",)

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str):
    if name in _MODULE_OF:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
        value = globals()[name] = getattr(module, name)
        return value
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
