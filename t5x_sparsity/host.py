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
    is_there = _is_t5x_there()
    if wanted == "t5x" and not is_there:
        raise ImportError(
            f"{VARIABLE} asks for T5X, but no package t5x is importable; install T5X by its own "
            'instructions and pip install "t5x_sparsity[t5x]", or choose the embedded host'
        )
    return "t5x" if is_there and wanted != "embedded" else "embedded"


def _is_t5x_there() -> bool:
    spec = importlib.util.find_spec("t5x")
    # with this package's folder on the path, its own folder t5x is found
    own = os.path.join(os.path.dirname(__file__), "t5x", "__init__.py")
    return spec is not None and spec.origin != own


NAME = _choose()

if TYPE_CHECKING or NAME == "embedded":
    with requires("embedded", "the embedded host"):
        from t5x_sparsity.embedded import adafactor as adafactor
        from t5x_sparsity.embedded import checkpoints as checkpoints
        from t5x_sparsity.embedded import gin_utils as gin_utils
        from t5x_sparsity.embedded import models as models
        from t5x_sparsity.embedded import network as decoder_only  # noqa: F401
        from t5x_sparsity.embedded import network as network
        from t5x_sparsity.embedded import optimizers as optimizers
        from t5x_sparsity.embedded import partitioning as partitioning
        from t5x_sparsity.embedded import train as train_lib  # noqa: F401
        from t5x_sparsity.embedded import train_state as train_state
        from t5x_sparsity.embedded import trainer as trainer
        from t5x_sparsity.embedded import utils as utils
else:
    try:
        from t5x import adafactor as adafactor
        from t5x import checkpoints as checkpoints
        from t5x import gin_utils as gin_utils
        from t5x import models as models
        from t5x import optimizers as optimizers
        from t5x import partitioning as partitioning
        from t5x import train as train_lib  # noqa: F401
        from t5x import train_state as train_state
        from t5x import trainer as trainer
        from t5x import utils as utils
        from t5x.examples.decoder_only import network as decoder_only  # noqa: F401
        from t5x.examples.t5 import network as network
    except Exception as e:
        raise ImportError(
            f"T5X is installed but fails to import ({type(e).__name__}: {e}); fix the installation "
            '(pip install "t5x_sparsity[t5x]" installs what T5X needs from the package index), or '
            f"set {VARIABLE}=embedded to train on the embedded host"
        ) from e

Trainer = trainer.Trainer  # as gin files name it
