"""What `t5x-sparsity` does, one folder per subcommand, imported when it is asked for.

In each folder `options.py` has the options and their parser, and `command.py` runs them. `options`
and this module import the standard library alone, so that help is there at once.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

from t5x_sparsity.core.names import one_line as one_line


class CommandError(Exception):
    """What was asked for can't be done: one line for the user, exit code 2."""


_USERS_ERRORS = (ValueError, TypeError, KeyError, AssertionError)


@contextlib.contextmanager
def as_command_errors(
    prefix: str = "", kinds: type[Exception] | tuple[type[Exception], ...] = _USERS_ERRORS
) -> Iterator[None]:
    """Turns the errors that a user's configuration makes other code raise into a CommandError.

    Every type but ValueError is named: without it, a KeyError's text says little.
    """
    try:
        yield
    except CommandError:
        raise
    except kinds as e:
        name = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise CommandError(f"{prefix}{name}{one_line(e)}") from e


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what C++ libraries write to standard error as they are imported."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
