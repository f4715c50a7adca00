"""The host that trains: T5X where it is importable, else the embedded host.

Everything that names a part of T5X names it through this module, gin files too, so that one file
serves both: `host.trainer.Trainer`, `host.utils.DatasetConfig`, `host.adafactor.Adafactor`, ...
The environment variable T5X_SPARSITY_HOST forces one: 't5x' or 'embedded'; 'auto' is the default.

Both hosts have the modules that are imported here; a type checker sees the embedded host's.

Raises:
  MissingExtra: the host lacks a package; the message says what to install.
  ImportError: the variable has another value, or T5X can't be imported.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Literal

from t5x_sparsity.extras import requires

VARIABLE = "T5X_SPARSITY_HOST"


def _choose() -> Literal["t5x", "embedded"]:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "t5x", "embedded"):
        raise ImportError(
            f"{VARIABLE} must be 'auto', 't5x' or 'embedded', got {wanted!r}; unset it or fix it"
        )
    if wanted == "embedded":
        return "embedded"
    if not _is_t5x_there():
        if wanted == "t5x":
            raise ImportError(
                f"{VARIABLE} asks for T5X, but no package t5x is importable; install T5X by its "
                'own instructions and pip install "t5x_sparsity[t5x]", or choose the embedded host'
            )
        return "embedded"
    return "t5x"


def _is_t5x_there() -> bool:
    spec = importlib.util.find_spec("t5x")
    # with this package's folder on the path, its own folder t5x is found
    own = os.path.join(os.path.dirname(__file__), "t5x", "__init__.py")
    return spec is not None and spec.origin != own


NAME = _choose()

if TYPE_CHECKING or NAME == "embedded":
    with requires("embedded", "the embedded host"):
        from t5x_sparsity.embedded import (
            adafactor,
            checkpoints,
            gin_utils,
            models,
            network,
            optimizers,
            partitioning,
            train_state,
            trainer,
            utils,
        )
        from t5x_sparsity.embedded import network as decoder_only
        from t5x_sparsity.embedded import train as train_lib
else:
    try:
        from t5x import (
            adafactor,
            checkpoints,
            gin_utils,
            models,
            optimizers,
            partitioning,
            train_state,
            trainer,
            utils,
        )
        from t5x import train as train_lib
        from t5x.examples.decoder_only import network as decoder_only
        from t5x.examples.t5 import network
    except Exception as e:
        raise ImportError(
            f"T5X is installed but fails to import ({type(e).__name__}: {e}); fix the installation "
            '(pip install "t5x_sparsity[t5x]" installs what T5X needs from the package index), or '
            f"set {VARIABLE}=embedded to train on the embedded host"
        ) from e

OptimizerDef = optimizers.OptimizerDef
Optimizer = optimizers.Optimizer
OptimizerState = optimizers.OptimizerState
TrainStateInitializer = utils.TrainStateInitializer
BaseTrainer = trainer.BaseTrainer
Trainer = trainer.Trainer

__all__ = [
    "NAME",
    "VARIABLE",
    "BaseTrainer",
    "Optimizer",
    "OptimizerDef",
    "OptimizerState",
    "TrainStateInitializer",
    "Trainer",
    "adafactor",
    "checkpoints",
    "decoder_only",
    "gin_utils",
    "models",
    "network",
    "optimizers",
    "partitioning",
    "train_lib",
    "train_state",
    "trainer",
    "utils",
]
