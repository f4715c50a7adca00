"""What this package replaces in other libraries while a run is planned, and why.

Each is a context manager that puts back what it replaced. `tests/ahead_of_time/test_patches.py`
says with which versions they were tried.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from types import ModuleType
from typing import Any

import jax


@contextlib.contextmanager
def replaced(module: ModuleType, package: str, **values: Any) -> Iterator[None]:
    """Replaces names of a module of another package.

    Raises:
      RuntimeError: a name is gone, as it may be in a later version.
    """
    missing = [name for name in values if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"{package} {metadata.version(package)} has no {module.__name__}.{missing[0]}, which "
            f"t5x_sparsity replaces while it plans a run; install an earlier {package}, and report "
            "this"
        )
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def jax_devices(devices: Sequence[Any], local: Sequence[Any]) -> AbstractContextManager[None]:
    """Has JAX name these devices to those who ask.

    Partitioners make their meshes of `jax.devices()`, and take no devices of another slice.
    """
    return replaced(
        jax,
        "jax",
        devices=lambda backend=None: list(devices),
        local_devices=lambda *args, **kwargs: list(local),
        device_count=lambda backend=None: len(devices),
        local_device_count=lambda backend=None: len(local),
    )


def gin_missing_imports(found: list[str]) -> AbstractContextManager[None]:
    """Appends to `found` the modules that gin files import and that aren't installed.

    gin skips them where unknown names may be skipped, and only prints that it did.
    """
    import gin

    def note(statement, error):
        found.append(statement.module)

    return replaced(gin.config, "gin-config", _print_unknown_import_message=note)


def gin_search_paths() -> AbstractContextManager[None]:
    """Puts back the folders that gin searches for files: it can add to them, not take one out."""
    import gin

    folders = list(gin.config._LOCATION_PREFIXES)
    return replaced(gin.config, "gin-config", _LOCATION_PREFIXES=folders)


@contextlib.contextmanager
def main_train(train: Callable[..., Any]) -> Iterator[None]:
    """Has a function be `__main__.train`, by which name gin files bind T5X's train function."""
    script = sys.modules["__main__"]
    before = script.__dict__.get("train")
    train.__module__ = "__main__"
    script.train = train
    try:
        yield
    finally:
        if before is None:
            del script.train
        else:
            script.train = before
