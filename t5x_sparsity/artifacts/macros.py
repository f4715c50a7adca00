"""Gin text without the objects that its names refer to; the macros of the package's own files."""

import dataclasses
import functools
import importlib.resources
import itertools
import pathlib
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

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
    """A setting that a file to include has, with a default."""

    name: str  #: as in --gin.NAME=VALUE
    comment: str  #: its meaning, range and default, as the file where it is first bound says it
    #: file -> value, such as {'rigl': 0.8}; references are text, such as '@t5x_sparsity.NByM()'
    defaults: Mapping[str, Any]


@functools.cache
def sparsity_macros() -> Mapping[str, Macro]:
    """The macros of `sparsity/*.gin` by name, in the order in which files have them.

    A macro is a setting where a file both binds and reads it. What a file includes belongs to it.
    """
    comments: dict[str, str] = {}
    defaults: dict[str, dict[str, Any]] = {}
    for file in sorted(p.name for p in _folder().iterdir() if p.name.endswith(".gin")):
        delegate = AsWritten()
        bound = {}
        for name, value, comment in _bound(f"sparsity/{file}", delegate):
            bound[name] = value
            comments.setdefault(name, comment)
        for name, value in bound.items():
            if name in delegate.macros_read:
                defaults.setdefault(name, {})[file.removesuffix(".gin")] = value
    return {name: Macro(name, comments[name], of) for name, of in defaults.items()}


def shown_macros() -> tuple[str, ...]:
    """Names of the macros that say how a run was made sparse and what it was, sparsity's first."""
    return (*sparsity_macros(), *OF_A_RUN)


def macros_in(text: str) -> dict[str, str]:
    """The macros that gin text binds, with values as gin writes them; what isn't gin is skipped."""
    found = {}
    # gin indents all lines of a statement but the first; each statement is parsed alone
    for piece in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        try:
            for statement in config_parser.ConfigParser(piece, AsWritten()):
                if _is_macro(statement):
                    found[statement.selector] = repr(statement.value)
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue
    return found


def check_bindings(bindings: Sequence[str]) -> None:
    """A ValueError for a `NAME = VALUE` that gin can't read; gin itself would not name it."""
    for binding in bindings:
        name, equals, value = binding.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or "\n" in binding:
            continue
        try:
            config_parser.ConfigParser(value, AsWritten()).parse_value()
        except (SyntaxError, ValueError) as e:
            raise ValueError(
                f"{name} = {value} has no value that gin can read; a text needs quotes of its own, "
                f"as in --gin.{name}=\"'text'\""
            ) from e


class AsWritten(config_parser.ParserDelegate):
    """Takes every name as known; references stay as they are in the text."""

    def __init__(self):
        self.macros_read: set[str] = set()

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return _Verbatim(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name):
        self.macros_read.add(macro_name)
        return _Verbatim(f"%{macro_name}")


class _Verbatim(str):
    """A reference, which needs no quotes."""

    __slots__ = ()

    def __repr__(self):
        return str(self)


def _is_macro(statement: Any) -> bool:
    """Whether one of gin's statements binds a macro."""
    is_binding = isinstance(statement, config_parser.BindingStatement)
    return is_binding and not statement.scope and not statement.arg_name


def _folder():
    try:
        return importlib.resources.files("sparsity")
    except ModuleNotFoundError:  # a checkout that isn't installed
        return pathlib.Path(__file__).parents[2] / "gin" / "sparsity"


def _bound(include: str, delegate: AsWritten) -> Iterator[tuple[str, Any, str]]:
    """Name, value and comment of each macro that a file binds, its includes' in their place."""
    text = _folder().joinpath(*include.split("/")[1:]).read_text(encoding="utf-8")
    lines = text.splitlines()
    for statement in config_parser.ConfigParser(text, delegate):
        if isinstance(statement, config_parser.IncludeStatement):
            yield from _bound(statement.filename, delegate)
        elif _is_macro(statement):
            yield statement.selector, statement.value, _above(lines, statement.location.line_num)


def _above(lines: list[str], line_num: int) -> str:
    """The comment that ends just above a line; lines are counted from 1."""
    above = reversed(lines[: line_num - 1])
    comment = [*itertools.takewhile(lambda line: line.startswith("#"), above)]
    return " ".join(line.removeprefix("#").strip() for line in reversed(comment))
