"""Checks of gin bindings as they are given on a command line."""

from __future__ import annotations

from collections.abc import Sequence

from gin import config_parser


class _AnyName(config_parser.ParserDelegate):
    """Takes every name for one that is there."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        return None

    def macro(self, scoped_name):
        return None


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
            config_parser.ConfigParser(value, _AnyName()).parse_value()
        except (SyntaxError, ValueError) as e:
            raise ValueError(
                f"{name} = {value} has no value that gin can read; a text needs quotes of its own, "
                f"as in --gin.{name}=\"'text'\""
            ) from e
