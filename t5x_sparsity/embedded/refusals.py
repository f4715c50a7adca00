"""What T5X can do and the embedded host can't: one error that names the argument or the symbol."""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn


def refuse(argument: str, value: Any, accepted: Any = None, why: str = "does less") -> None:
    """Raises a ValueError unless `value` is `accepted`, the only one that the embedded host takes.

    `argument` is the name to bind in gin, such as 'train.gc_period'; `why` follows "the embedded
    host", such as "does less".
    """
    if value != accepted:
        raise ValueError(
            f"{argument} is {reprlib.repr(value)}, but the embedded host {why}: set it to "
            f"{accepted!r}, or use T5X for it."
        )


def refuse_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises a TypeError for arguments of `name` that only T5X has."""
    if options:
        raise TypeError(
            f"{name} of the embedded host has no {', '.join(sorted(options))}: leave it out, or "
            "use T5X for it."
        )


def missing_from(module: str, instead: str = "") -> Callable[[str], NoReturn]:
    """Returns the `__getattr__` of `module`: an AttributeError that sends the reader to T5X.

    instead: what to use on the embedded host, if there is something.
    """

    def getattr_of_module(name: str) -> NoReturn:
        raise AttributeError(
            f"{module} has no {name!r}: the embedded host does less than T5X. Use T5X for it"
            f"{instead}."
        )

    return getattr_of_module
