"""The command `t5x-sparsity`: parses its arguments and dispatches to a subcommand.

The subcommands are in `t5x_sparsity.commands`. Until one is asked for, only the standard library is
imported, so that help is there at once.
"""

import argparse
import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from t5x_sparsity import __version__
from t5x_sparsity.artifacts.gin_flags import rewrite_gin_args
from t5x_sparsity.commands import CommandError, one_line, quiet
from t5x_sparsity.commands.options import add_command
from t5x_sparsity.extras import requires

_DESCRIPTION = "Plans sparse runs of T5X, looks into them, and exports their weights."
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
        try:
            arguments = rewrite_gin_args(arguments)
        except ValueError as e:
            parser.error(str(e).rstrip("."))
        values, unknown = parser.parse_known_args(arguments)
        if unknown:
            commands[values.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as e:
        return int(e.code or 0)
    return _run(values)


def _run(values: argparse.Namespace) -> int:
    """Runs the subcommand asked for; an error of the user's is one line, and 2.

    Nothing runs on an accelerator, so none is taken.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    name = values.command.replace("-", "_")
    fields = dataclasses.fields(values.options)
    options = values.options(**{f.name: getattr(values, f.name) for f in fields})
    if hasattr(options, "set_environment"):
        options.set_environment()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a name that a terminal can't show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        with requires(values.extra, values.command):
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
        print(f"t5x-sparsity {values.command}: error: {one_line(e)}", file=sys.stderr)
        _drop_output()
        return 2
    except KeyboardInterrupt:
        return 130


def _drop_output() -> None:
    """Discards output that can't be written, or Python would try again as it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of the command, and those of its subcommands by name."""
    parser = Parser(
        prog="t5x-sparsity", description=_DESCRIPTION, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"t5x-sparsity {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name in _COMMANDS:
        module = importlib.import_module(f"t5x_sparsity.commands.{name}.options")
        add_command(commands, name.replace("_", "-"), **module.COMMAND)
    return parser, commands.choices


if __name__ == "__main__":
    sys.exit(main())
