"""Gin text alone, without the objects that its names refer to."""

from __future__ import annotations

import tokenize
from collections.abc import Sequence
from typing import Any

from gin import config_parser


class AsWritten(config_parser.ParserDelegate):
    """Takes every name as known; references stay as they are in the text."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return _Verbatim(f"@{scoped_configurable_name}{'()' if evaluate else ''}")

    def macro(self, macro_name):
        return _Verbatim(f"%{macro_name}")


class _Verbatim(str):
    """A reference, which needs no quotes."""

    __slots__ = ()

    def __repr__(self):
        return str(self)


def check_bindings(bindings: Sequence[str]) -> None:
    """Checks that the value of each `NAME = VALUE` is one of gin.

    Raises:
      ValueError: it isn't; gin itself would say neither which nor why.
    """
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


def is_macro(statement: Any) -> bool:
    """Whether one of gin's statements binds a macro."""
    is_binding = isinstance(statement, config_parser.BindingStatement)
    return is_binding and not statement.scope and not statement.arg_name


def macros_in(text: str) -> dict[str, str]:
    """The macros that gin text binds, each with its value as gin writes it.

    What isn't gin is skipped.
    """
    pieces: list[str] = []
    for line in text.splitlines(keepends=True):
        # gin indents all lines of a statement but the first; each statement is parsed alone
        if not line[0].isspace() or not pieces:
            pieces.append("")
        pieces[-1] += line
    found = {}
    for piece in pieces:
        try:
            for statement in config_parser.ConfigParser(piece, AsWritten()):
                if is_macro(statement):
                    found[statement.selector] = repr(statement.value)
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue
    return found
