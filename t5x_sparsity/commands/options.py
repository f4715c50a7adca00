"""A command's options, each said once: the fields of a dataclass are the arguments of its parser.

Imports the standard library alone, so that help is quick.
"""

import argparse
import dataclasses
from typing import Any


def argument(*flags: str, **settings: Any) -> Any:
    """A field of a class of options, and the argument of the parser that gives its value.

        out: str = argument(metavar="OUT", help="the file to write")
        json: bool = argument("--json", action="store_true", help="print one JSON object")

    Args:
      *flags: such as '--json'; none for an argument that is known by its place.
      **settings: what `ArgumentParser.add_argument` takes. The field's default is `default`, False
        for a flag that is on or off, None otherwise; what is required has none.
    """
    metadata = {"flags": flags, "settings": settings}
    if not flags or settings.get("required"):
        return dataclasses.field(metadata=metadata)
    is_switch = settings.get("action") == "store_true"
    default = settings.pop("default", False if is_switch else None)
    return dataclasses.field(default=default, metadata=metadata)


def add_command(commands: Any, name: str, options: type, *, extra: str, **texts: Any) -> None:
    """Adds a command, whose module `options` describes it by `COMMAND`, to those of `t5x-sparsity`.

    Args:
      commands: what `add_subparsers` returned.
      name: of the command.
      options: a dataclass, whose fields `argument` made; help lists them in their order.
      extra: of this package, that the command needs, such as 'tools'.
      **texts: help, description and epilog, as `ArgumentParser` takes them.
    """
    parser = commands.add_parser(
        name,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the lines of the texts
        **texts,
    )
    for field in dataclasses.fields(options):
        flags, settings = field.metadata["flags"], dict(field.metadata["settings"])
        if flags:
            settings["dest"] = field.name
        if field.default is not dataclasses.MISSING:
            # argparse appends to lists alone
            is_list = settings.get("action") == "append"
            settings["default"] = list(field.default) if is_list else field.default
        parser.add_argument(*(flags or (field.name,)), **settings)
    parser.set_defaults(options=options, extra=extra)
