"""The command `t5x-sparsity`: a module here reads the arguments of each subcommand.

What a subcommand does is in `t5x_sparsity.commands`, and is imported once it is asked for; here is
only the standard library, so that help is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

_DESCRIPTION = "Plans sparse runs of T5X, looks into them, and takes their weights away."
_EPILOG = "Exit codes: 0; 2 for what can't be done as asked, with one line that says why."

# in the order of a run's life
_COMMANDS = ("plan", "inspect", "export", "report", "fit_scaling")


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code: 2 for what can't be done as asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        values = _parser().parse_args(_with_bindings(arguments))
    except SystemExit as e:
        return int(e.code or 0)
    return values.run(values)


def run(name: str, options: Any) -> int:
    """Runs `t5x_sparsity.commands.<name>.run(options)`; an error of the user's is one line, and 2.

    Nothing runs on an accelerator, so none is taken.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from t5x_sparsity.commands import CommandError, one_line

    try:
        with _quiet():
            command = importlib.import_module(f"t5x_sparsity.commands.{name}")
        return command.run(options)
    except (CommandError, ImportError) as e:
        print(f"t5x-sparsity {name.replace('_', '-')}: error: {one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # whoever read the output, such as `head`, has seen enough; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="t5x-sparsity", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"{__name__}.{name}").add(commands)
    return parser


def _version() -> str:
    from t5x_sparsity import __version__

    return f"t5x-sparsity {__version__}"


def _with_bindings(arguments: Sequence[str]) -> list[str]:
    """The arguments, each `--gin.NAME=VALUE` as `--gin_bindings=NAME = VALUE`."""
    found = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if argument.startswith("--gin.") and name and equals:
            argument = f"--gin_bindings={name} = {value}"
        found.append(argument)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what libraries of C++ say of themselves as they are imported."""
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
