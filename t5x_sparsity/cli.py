"""The command `t5x-sparsity`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

# Only the standard library here: what a subcommand needs is imported once it is asked for.

_HOST_VARIABLE = "T5X_SPARSITY_HOST"

# libtpu, which JAX loads where it is installed, looks for the machine that it would run on, and
# locks it, unless it is told not to.
TPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `t5x-sparsity plan`.

    Attributes:
      gin_file: gin files, later ones override earlier ones.
      gin_bindings: gin bindings, which override the files.
      gin_search_paths: folders that gin files are searched in.
      topology: a TPU slice to compile for, such as 'v5e:4x4'; None compiles nothing.
      json: print one JSON object instead of tables.
      all: list dense weights too.
    """

    gin_file: Sequence[str]
    gin_bindings: Sequence[str] = ()
    gin_search_paths: Sequence[str] = (".",)
    topology: str | None = None
    json: bool = False
    all: bool = False


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code: 2 for what can't be done as asked."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        values = parser.parse_args(_with_bindings(arguments))
    except SystemExit as e:
        return int(e.code or 0)
    return values.run(values)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="t5x-sparsity", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_plan(commands)
    return parser


def _add_plan(commands) -> None:
    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="show what a run would be: weights, FLOPs, memory on a TPU slice",
        description="Shows what a run would be, from its gin files, with no data and no weights. "
        "Takes the flags of the train script. Exit code: 0; 2 if the run can't be planned; 3 if it "
        "doesn't fit the slice.",
    )
    _add_gin_flags(plan)
    plan.add_argument(
        "--topology",
        metavar="NAME",
        help="compile the train steps for this TPU slice, such as v5e:4x4; needs libtpu",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--all", action="store_true", help="list dense weights too")
    plan.set_defaults(run=_plan)


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the train script that say which run it is."""
    parser.add_argument(
        "--gin_file", action="append", required=True, metavar="FILE", help="may be given repeatedly"
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="BINDING",
        help="a gin binding; --gin.NAME=VALUE for short",
    )
    parser.add_argument(
        "--gin_search_paths", default=".", metavar="FOLDERS", help="separated by commas"
    )
    parser.add_argument(
        "--host",
        choices=("auto", "t5x", "embedded"),
        help="auto: T5X where importable, else embedded",
    )
    # a train command can be taken as it is; no data is read
    for flag in ("--tfds_data_dir", "--seqio_additional_cache_dirs"):
        parser.add_argument(flag, help=argparse.SUPPRESS)


def _with_bindings(arguments: Sequence[str]) -> list[str]:
    """The arguments, each `--gin.NAME=VALUE` as `--gin_bindings=NAME = VALUE`."""
    found = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if argument.startswith("--gin.") and name and equals:
            argument = f"--gin_bindings={name} = {value}"
        found.append(argument)
    return found


def _plan(values: argparse.Namespace) -> int:
    if values.host:
        os.environ[_HOST_VARIABLE] = values.host
    # Nothing runs, so no accelerator is taken.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for key, value in {"TF_CPP_MIN_LOG_LEVEL": "3", **TPU_ENVIRONMENT}.items():
        os.environ.setdefault(key, value)
    from t5x_sparsity.commands import CommandError, one_line

    options = PlanOptions(
        gin_file=values.gin_file,
        gin_bindings=values.gin_bindings,
        gin_search_paths=values.gin_search_paths.split(","),
        topology=values.topology,
        json=values.json,
        all=values.all,
    )
    try:
        with _quiet():
            from t5x_sparsity.commands import plan

        return plan.run(options)
    except (CommandError, ImportError) as e:
        print(f"t5x-sparsity plan: error: {one_line(e)}", file=sys.stderr)
        return 2


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


if __name__ == "__main__":
    sys.exit(main())
