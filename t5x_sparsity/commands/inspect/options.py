"""The arguments of `t5x-sparsity inspect`."""

import dataclasses

from t5x_sparsity.commands.options import argument

_DESCRIPTION = """\
Shows what a checkpoint's zeros look like, weight by weight: weights kept, sparsity against the
target, dead rows and columns, and the pattern that holds exactly, such as 2:4 along the inputs;
then totals, and what made it. Checkpoints of T5X and of the embedded host are read alike, without
the model and without the run's gin files, a part at a time. Nothing is written.

With --compare, what changed from CHECKPOINT to OTHER instead: how far their masks overlap, which
share of the weights was replaced, and how far the weights moved. Either may be dense, or of either
host."""

_EPILOG = """\
examples:
  t5x-sparsity inspect /runs/rigl
  t5x-sparsity inspect /runs/rigl/checkpoint_4000 --compare /runs/rigl/checkpoint_8000
  t5x-sparsity inspect /runs/rigl --json | jq .total.sparse.sparsity

Exit code: 0; 2 if it can't be read, with one line that says why. docs/inspect.md defines every
number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `t5x-sparsity inspect`."""

    checkpoint: str = argument(
        metavar="CHECKPOINT", help="a folder checkpoint_<step>, or a MODEL_DIR for its last one"
    )
    compare: str | None = argument(
        "--compare", metavar="OTHER", help="another checkpoint or MODEL_DIR to compare with"
    )
    json: bool = argument("--json", action="store_true", help="print one JSON object")
    all: bool = argument("--all", action="store_true", help="list dense weights too")


COMMAND = dict(
    options=InspectOptions,
    extra="tools",
    help="show a checkpoint's sparsity, weight by weight, or compare two",
    description=_DESCRIPTION,
    epilog=_EPILOG,
)
