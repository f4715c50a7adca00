"""The host that trains: T5X where it is importable, else the embedded host.

Everything that names a part of T5X names it through this module, gin files too, so that one file
serves both: `host.trainer.Trainer`, `host.utils.DatasetConfig`, `host.adafactor.Adafactor`, ...
The environment variable T5X_SPARSITY_HOST forces one: 't5x' or 'embedded'; 'auto' is the default.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

VARIABLE = "T5X_SPARSITY_HOST"

_MODULES = {
    "adafactor": "adafactor",
    "checkpoints": "checkpoints",
    "gin_utils": "gin_utils",
    "models": "models",
    "optimizers": "optimizers",
    "partitioning": "partitioning",
    "train_lib": "train",
    "train_state": "train_state",
    "trainer": "trainer",
    "utils": "utils",
}
# where the two hosts keep their networks
_NETWORKS = {
    "t5x": {"network": "examples.t5.network", "decoder_only": "examples.decoder_only.network"},
    "embedded": {"network": "network", "decoder_only": "decoder_only"},
}


def _choose() -> str:
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "t5x", "embedded"):
        raise ImportError(
            f"{VARIABLE} must be 'auto', 't5x' or 'embedded', got {wanted!r}; unset it or mend it"
        )
    if wanted == "embedded":
        return "embedded"
    if importlib.util.find_spec("t5x") is None:
        if wanted == "t5x":
            raise ImportError(
                f"{VARIABLE} asks for T5X, but no package t5x is importable; install T5X by its "
                "own instructions, or choose the embedded host"
            )
        return "embedded"
    return "t5x"


def _load(name: str) -> dict[str, object]:
    package = "t5x" if name == "t5x" else "t5x_sparsity.embedded"
    modules = {**_MODULES, **_NETWORKS[name]}
    try:
        return {k: importlib.import_module(f"{package}.{m}") for k, m in modules.items()}
    except Exception as e:
        if name == "embedded":
            raise
        raise ImportError(
            f"T5X is installed but fails to import ({type(e).__name__}: {e}); mend the "
            f"installation, or set {VARIABLE}=embedded to train on the embedded host"
        ) from e


NAME = _choose()
globals().update(_load(NAME))

OptimizerDef = globals()["optimizers"].OptimizerDef
Optimizer = globals()["optimizers"].Optimizer
OptimizerState = globals()["optimizers"].OptimizerState
TrainStateInitializer = globals()["utils"].TrainStateInitializer
BaseTrainer = globals()["trainer"].BaseTrainer
Trainer = globals()["trainer"].Trainer
