"""The arguments of `t5x-sparsity plan`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence

from t5x_sparsity.ahead_of_time.environment import TPU_ENVIRONMENT

_HOST_VARIABLE = "T5X_SPARSITY_HOST"


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


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
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
    plan.set_defaults(options=PlanOptions, extra="embedded", prepare=_set_environment)


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
        "--gin_search_paths",
        default=".",
        type=lambda text: text.split(","),
        metavar="FOLDERS",
        help="separated by commas",
    )
    parser.add_argument(
        "--host",
        choices=("auto", "t5x", "embedded"),
        help="auto: T5X where importable, else embedded",
    )
    # a train command can be taken as it is; no data is read
    for flag in ("--tfds_data_dir", "--seqio_additional_cache_dirs"):
        parser.add_argument(flag, help=argparse.SUPPRESS)


def _set_environment(values: argparse.Namespace) -> None:
    """Sets what JAX and the choice of a host read as they are imported."""
    if values.host:
        os.environ[_HOST_VARIABLE] = values.host
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
