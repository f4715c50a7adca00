"""Gin text by itself, without the names that it refers to."""

from __future__ import annotations

from collections.abc import Sequence

from gin import config_parser


class AsWritten(config_parser.ParserDelegate):
    """Takes every name for one that is there; references stay what they are in the text."""

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
