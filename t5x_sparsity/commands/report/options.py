"""The arguments of `t5x-sparsity report`."""

import dataclasses
from collections.abc import Sequence

from t5x_sparsity.commands.options import argument

_DESCRIPTION = """\
Makes one HTML page of what a run did, or of several side by side: loss and sparsity over steps,
sparsity by layer, churn, images of masks, FLOPs against dense, and the configuration. It reads the
TensorBoard events, sparsity.json and config.gin of a run, no checkpoint, and works on a run that is
still going. The page is one file that needs no network, about 5 MB with its plotting library.

A page that this command made before is replaced; any other file is not. Exit code: 0; 2 if the
page can't be made, with one line that says why."""

_EPILOG = """\
examples:
  t5x-sparsity report runs/rigl
  t5x-sparsity report runs/rigl runs/granet --name RigL --name GraNet --out comparison.html"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `t5x-sparsity report`."""

    model_dirs: Sequence[str] = argument(
        nargs="+", metavar="MODEL_DIR", help="folder of a run; at most 8"
    )
    out: str | None = argument(
        "--out",
        metavar="FILE",
        help="the page; default: MODEL_DIR/sparsity_report.html for one run, for several "
        "sparsity_report.html in the current folder",
    )
    names: Sequence[str] = argument(
        "--name",
        action="append",
        default=(),
        metavar="NAME",
        help="name of a run on the page, once a run in their order; default: of its folder",
    )
    json: bool = argument(
        "--json",
        action="store_true",
        help="print one JSON object, the page's path and each run's key numbers, beside making "
        "the page",
    )


COMMAND = dict(
    options=ReportOptions,
    extra="tools",
    help="make one HTML page of one or more runs",
    description=_DESCRIPTION,
    epilog=_EPILOG,
)
