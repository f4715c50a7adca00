"""The arguments of `t5x-sparsity fit-scaling`."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence

from t5x_sparsity.commands.options import argument

COSTS = ("gradual", "dense", "sparse")
# No run's weights, tokens or loss are beyond; float64 holds their tenth powers, as the law takes.
LEAST, MOST = 1e-30, 1e30

_DESCRIPTION = """\
Fits the sparse scaling law of Frantar et al. (2023, arXiv:2309.08520),

  L(S, N, D) = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c,

to a table of runs, and finds the sparsity that is best for given compute.

TABLE is a file of comma-separated values (or of semicolons or tabs) whose first
line names its columns, one run per line below; lines that start with # are
skipped, as are other columns:

  sparsity         share of the counted weights that is zero, in [0, 1)
  nonzero_weights  counted weights that aren't zero in the end
  weights          counted weights in all; in place of nonzero_weights
  tokens           trained on
  loss             in the end, nats a token

Count the same weights in every run, without embeddings as the authors do. At
least 8 runs, and 3 different values each of sparsity, weights and tokens.
"""
_EPILOG = """\
examples:
  t5x-sparsity fit-scaling runs.csv --plots=law.html
  t5x-sparsity fit-scaling runs.csv --compute 1e20 1e21 --size 1e8 --cost=sparse

What the numbers mean, and when not to believe them: docs/fit_scaling.md.
Exit code: 0; 2 if the law can't be fitted, with one line that says why.
"""


def _number(
    kind: type[int] | type[float], allowed: str, is_allowed: Callable[[float], bool]
) -> Callable[[str], float]:
    """A parser of numbers, for argparse: `allowed` says in words what they may be."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"must be {allowed}, got {text!r}")
        return value

    return parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitScalingOptions:
    """Options of `t5x-sparsity fit-scaling`."""

    table: str = argument(metavar="TABLE", help="the runs, see above")
    compute: Sequence[float] = argument(
        "--compute",
        nargs="+",
        default=(),
        type=_number(float, "a number from 1e-60 to 1e+60", lambda x: 1e-60 <= x <= 1e60),
        metavar="FLOPS",
        help="training FLOPs to find the best sparsity for; without it three, from the least to "
        "the most that a run of the table took",
    )
    size: Sequence[float] = argument(
        "--size",
        nargs="+",
        default=(),
        type=_number(float, "a number from 1e-30 to 1e+30", lambda x: LEAST <= x <= MOST),
        metavar="WEIGHTS",
        help="non-zero weights to find it for, beside the best size for the compute; without it "
        "the middle size of the table",
    )
    cost: str = argument(
        "--cost",
        choices=COSTS,
        default="gradual",
        help="what training costs, as 6 x non-zero weights x tokens times: gradual, pruned over "
        "the middle half of training, 5/8 + 3/8 / (1 - S), the default; dense, zeros cost as "
        "much, 1 / (1 - S); sparse, zeros cost nothing from the start, 1",
    )
    plots: str | None = argument(
        "--plots", metavar="OUT.html", help="write a page of plots that needs no other file"
    )
    json: bool = argument("--json", action="store_true", help="print one JSON object")
    bootstrap: int = argument(
        "--bootstrap",
        type=_number(int, "a whole number, 0 or at least 20", lambda x: x == 0 or x >= 20),
        default=200,
        metavar="TABLES",
        help="tables to resample for intervals, 0 for no intervals; default: 200",
    )
    level: float = argument(
        "--level",
        type=_number(float, "a number between 0 and 1", lambda x: 0 < x < 1),
        default=0.95,
        help="of the intervals; default: 0.95",
    )
    starts: int = argument(
        "--starts",
        type=_number(int, "a whole number, at least 1", lambda x: x >= 1),
        default=50,
        help="of the fit; default: 50",
    )
    seed: int = argument(
        "--seed",
        type=_number(int, "a whole number, at least 0", lambda x: x >= 0),
        default=0,
        help="of starts and resampling; default: 0",
    )
    delta: float = argument(
        "--delta",
        type=_number(float, "a number from 1e-12 to 1e+12", lambda x: 1e-12 <= x <= 1e12),
        default=1e-3,
        help="where the Huber loss of a log residual turns from square to linear; default: 0.001, "
        "the paper's for language models",
    )


COMMAND = dict(
    options=FitScalingOptions,
    extra="tools",
    help="fit the sparse scaling law to a table of runs",
    description=_DESCRIPTION,
    epilog=_EPILOG,
)
