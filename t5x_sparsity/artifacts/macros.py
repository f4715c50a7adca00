"""The macros of the package's gin files, read from those files themselves."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gin import config_parser

from t5x_sparsity.artifacts.gin_values import AsWritten, is_macro

# The macros of T5X and of run files that say most about a run, next to those of sparsity.
OF_A_RUN = (
    "TRAIN_STEPS",
    "BATCH_SIZE",
    "TASK_FEATURE_LENGTHS",
    "MIXTURE_OR_TASK_NAME",
    "LEARNING_RATE",
    "LEARNING_RATE_FACTORS",
    "WARMUP_STEPS",
    "DROPOUT_RATE",
    "OPTIMIZER",
    "MODEL",
    "INITIAL_CHECKPOINT_PATH",
    "RANDOM_SEED",
)


@dataclasses.dataclass(frozen=True)
class Macro:
    """A setting that a file to include has, with a default.

    Attributes:
      name: as in --gin.NAME=VALUE.
      comment: its meaning, range and default, as the file where it is first bound says it.
      defaults: file -> value, of every file to include that has it, such as {'rigl': 0.8};
        references are text, such as '@t5x_sparsity.NByM()'.
    """

    name: str
    comment: str
    defaults: Mapping[str, Any]


@functools.cache
def sparsity_macros() -> Mapping[str, Macro]:
    """The macros of `sparsity/*.gin` by name, in the order in which files have them.

    A macro is a setting where a file both binds and reads it. What a file includes belongs to it.
    """
    comments: dict[str, str] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for file in sorted(p.name for p in _folder().iterdir() if p.name.endswith(".gin")):
        reads = _Reads()
        bound = {}
        for name, value, comment in _bound(f"sparsity/{file}", reads):
            bound[name] = value
            comments.setdefault(name, comment)
        for name, value in bound.items():
            if name in reads.macros:
                defaults.setdefault(name, {})[file.removesuffix(".gin")] = value
    return {name: Macro(name, comments[name], of) for name, of in defaults.items()}


def shown_macros() -> tuple[str, ...]:
    """Names of the macros that say how a run was made sparse and what it was, sparsity's first."""
    return (*sparsity_macros(), *OF_A_RUN)


class _Reads(AsWritten):
    """Notes which macros are read."""

    def __init__(self):
        self.macros: set[str] = set()

    def macro(self, macro_name):
        self.macros.add(macro_name)
        return super().macro(macro_name)


def _folder():
    try:
        return importlib.resources.files("sparsity")
    except ModuleNotFoundError:  # a checkout that isn't installed
        return pathlib.Path(__file__).parents[2] / "gin" / "sparsity"


def _bound(include: str, reads: _Reads) -> Iterator[tuple[str, Any, str]]:
    """Name, value and comment of each macro that a file binds, its includes' in their place."""
    text = _folder().joinpath(*include.split("/")[1:]).read_text(encoding="utf-8")
    lines = text.splitlines()
    for statement in config_parser.ConfigParser(text, reads):
        if isinstance(statement, config_parser.IncludeStatement):
            yield from _bound(statement.filename, reads)
        elif is_macro(statement):
            yield statement.selector, statement.value, _above(lines, statement.location.line_num)


def _above(lines: list[str], line_num: int) -> str:
    """The comment that ends just above a line; lines are counted from 1."""
    first = line_num - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return " ".join(line.removeprefix("#").strip() for line in lines[first : line_num - 1])
