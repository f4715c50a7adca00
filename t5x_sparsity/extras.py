"""One line that says what to install, where a package of an extra is missing."""

import contextlib
import importlib.util
from collections.abc import Iterator


class MissingExtra(ImportError):
    """A package is missing that one of this package's extras installs."""


@contextlib.contextmanager
def requires(extra: str, what: str) -> Iterator[None]:
    """Imports inside need packages that `pip install "t5x_sparsity[extra]"` installs.

        with requires("tools", "t5x-sparsity report"):
            import plotly

    Args:
      extra: name of the extra, such as 'embedded' or 'tools'.
      what: what needs it, the subject of the message.

    Raises:
      MissingExtra: a package other than this one isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        there = package != e.name and importlib.util.find_spec(package) is not None
        if package in ("", "t5x_sparsity") or there:  # a broken installation has another cause
            raise
        # which module imports it is of no use to the user
        raise MissingExtra(
            f"{what} needs {package}, which isn't installed; install it by "
            f'pip install "t5x_sparsity[{extra}]"',
            name=e.name,
        ) from None
