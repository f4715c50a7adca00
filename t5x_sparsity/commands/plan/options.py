"""The arguments of `t5x-sparsity plan`."""

import argparse
import dataclasses
import os
from collections.abc import Sequence

from t5x_sparsity.ahead_of_time import TPU_ENVIRONMENT
from t5x_sparsity.commands.options import argument

_DESCRIPTION = """\
Shows what a run would be, from its gin files, with no data and no weights.
Takes the flags of the train script. Exit code: 0; 2 if the run can't be planned;
3 if it doesn't fit the slice."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `t5x-sparsity plan`: the flags of the train script that say which run it is."""

    gin_file: Sequence[str] = argument(
        "--gin_file", action="append", required=True, metavar="FILE", help="may be given repeatedly"
    )
    gin_bindings: Sequence[str] = argument(
        "--gin_bindings",
        action="append",
        default=(),
        metavar="BINDING",
        help="a gin binding; --gin.NAME=VALUE for short",
    )
    gin_search_paths: Sequence[str] = argument(
        "--gin_search_paths",
        default=(".",),
        type=lambda text: text.split(","),
        metavar="FOLDERS",
        help="separated by commas",
    )
    host: str | None = argument(
        "--host",
        choices=("auto", "t5x", "embedded"),
        help="auto: T5X where importable, else embedded",
    )
    # a train command can be taken as it is; no data is read
    tfds_data_dir: str | None = argument("--tfds_data_dir", help=argparse.SUPPRESS)
    seqio_additional_cache_dirs: str | None = argument(
        "--seqio_additional_cache_dirs", help=argparse.SUPPRESS
    )
    topology: str | None = argument(
        "--topology",
        metavar="NAME",
        help="compile the train steps for this TPU slice, such as v5e:4x4; needs libtpu",
    )
    json: bool = argument("--json", action="store_true", help="print one JSON object")
    all: bool = argument("--all", action="store_true", help="list dense weights too")

    def set_environment(self) -> None:
        """Sets what JAX and the choice of a host read as they are imported."""
        if self.host:
            os.environ["T5X_SPARSITY_HOST"] = self.host
        for key, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(key, value)


COMMAND = dict(
    options=PlanOptions,
    extra="embedded",
    help="show what a run would be: weights, FLOPs, memory on a TPU slice",
    description=_DESCRIPTION,
)
