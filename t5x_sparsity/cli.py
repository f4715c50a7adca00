"""The command `t5x-sparsity`: a module here reads the arguments of each subcommand.

What a subcommand does is in `t5x_sparsity.commands`, and is imported once it is asked for; here is
only the standard library, so that help is there at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_DESCRIPTION = "Plans sparse runs of T5X, looks into them, and takes their weights away."
_EPILOG = (
    "Exit codes: 0; 2 for what can't be done as asked, with one line that says why; 130 if "
    "interrupted."
)

# in the order of a run's life
_COMMANDS = ("plan", "inspect", "export", "report", "fit_scaling")


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code: 2 for what can't be done as asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    try:
        values, unknown = parser.parse_known_args(_with_bindings(arguments))
        if unknown:
            commands[values.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as e:
        return int(e.code or 0)
    return values.run(values)


def run(name: str, options: Any) -> int:
    """Runs `t5x_sparsity.commands.<name>.command.run`; an error of the user's is one line, and 2.

    Nothing runs on an accelerator, so none is taken.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from t5x_sparsity.commands import CommandError, one_line

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a name that a terminal can't show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with quiet():
            command = importlib.import_module(f"t5x_sparsity.commands.{name}.command")
        code = command.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # whoever read the output, such as `head`, has seen enough
        _drop_output()
        return 0
    except (CommandError, ImportError, OSError) as e:
        print(f"t5x-sparsity {name.replace('_', '-')}: error: {one_line(e)}", file=sys.stderr)
        _drop_output()
        return 2
    except KeyboardInterrupt:
        return 130


def options_of(cls: type, values: argparse.Namespace) -> Any:
    """The options of a subcommand, from arguments of the same names."""
    return cls(**{f.name: getattr(values, f.name) for f in dataclasses.fields(cls)})


def _drop_output() -> None:
    """Lets go of output that can't be written; Python would try, and complain, as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """That of the command, and those of its subcommands by name."""
    parser = Parser(
        prog="t5x-sparsity", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"t5x_sparsity.commands.{name}.options").add(commands)
    return parser, commands.choices


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
def quiet() -> Iterator[None]:
    """Silences what libraries of C++ say of themselves as they are imported."""
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


if __name__ == "__main__":
    sys.exit(main())
