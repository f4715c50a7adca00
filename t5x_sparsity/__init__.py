"""Sparse training of language models with T5X, or with any optax optimizer.

Names are loaded when they are first used: the command line needs none of them for its help, optax
users need no host, and those of the plugin need one, T5X or the embedded host.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from t5x_sparsity.extras import requires

# isort: off
if TYPE_CHECKING:  # for type checkers and editors, which can't follow __getattr__
    from t5x_sparsity import host as host
    from t5x_sparsity.algorithms import (
        ACDC as ACDC,
        MEST as MEST,
        SET as SET,
        SNFS as SNFS,
        SRSTE as SRSTE,
        AdamFisher as AdamFisher,
        Algorithm as Algorithm,
        DecayingMask as DecayingMask,
        Dense as Dense,
        GlobalMagnitude as GlobalMagnitude,
        GlobalSaliency as GlobalSaliency,
        GraNet as GraNet,
        IterativeNM as IterativeNM,
        Magnitude as Magnitude,
        MagnitudeSTE as MagnitudeSTE,
        RandomPruning as RandomPruning,
        RandomSTE as RandomSTE,
        RigL as RigL,
        Saliency as Saliency,
        SRigL as SRigL,
        Static as Static,
        StructureDecay as StructureDecay,
        TopKAST as TopKAST,
    )
    from t5x_sparsity.artifacts.export import load_export as load_export
    from t5x_sparsity.core.patterns import (
        Block as Block,
        Channel as Channel,
        ConstantFanIn as ConstantFanIn,
        NByM as NByM,
        Unstructured as Unstructured,
    )
    from t5x_sparsity.core.plan import Rule as Rule
    from t5x_sparsity.core.plan import SparsityConfig as SparsityConfig
    from t5x_sparsity.core.schedules import (
        Constant as Constant,
        Cosine as Cosine,
        Exponential as Exponential,
        Listed as Listed,
        Never as Never,
        OneShot as OneShot,
        Periodic as Periodic,
        Polynomial as Polynomial,
    )
    from t5x_sparsity.monitoring.summary import (
        sparsity_summary as sparsity_summary,
        summary_table as summary_table,
    )
    from t5x_sparsity.t5x import (
        SparseOptimizer as SparseOptimizer,
        SparseTrainStateInitializer as SparseTrainStateInitializer,
        checkpoint_step as checkpoint_step,
        from_dense as from_dense,
        make_sparse as make_sparse,
        sparse_trainer as sparse_trainer,
    )
    from t5x_sparsity.transformation import apply_masks as apply_masks, sparsify as sparsify

# isort: on

__version__ = "0.1.0"

# The public names of each module; a test compares them with the imports above.
_NAMES = {
    "algorithms": (
        "ACDC AdamFisher Algorithm DecayingMask Dense GlobalMagnitude GlobalSaliency GraNet "
        "IterativeNM MEST Magnitude MagnitudeSTE RandomPruning RandomSTE RigL SET SNFS SRSTE "
        "SRigL Saliency Static StructureDecay TopKAST"
    ),
    "artifacts.export": "load_export",
    "monitoring.summary": "sparsity_summary summary_table",
    "core.patterns": "Block Channel ConstantFanIn NByM Unstructured",
    "core.plan": "Rule SparsityConfig",
    "t5x": (
        "SparseOptimizer SparseTrainStateInitializer checkpoint_step from_dense make_sparse "
        "sparse_trainer"
    ),
    "core.schedules": "Constant Cosine Exponential Listed Never OneShot Periodic Polynomial",
    "transformation": "apply_masks sparsify",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("host",)

__all__ = sorted([*_MODULE_OF, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        with requires("tools", name):  # `host` names extras of its own, and the core needs none
            module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
        value = getattr(module, name)
        return globals().setdefault(name, value)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
