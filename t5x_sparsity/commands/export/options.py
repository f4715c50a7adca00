"""The arguments of `t5x-sparsity export`."""

from __future__ import annotations

import argparse
import dataclasses

_DESCRIPTION = """\
Writes the weights of a checkpoint, those under target/, to one safetensors file.

dense: every weight as an array with exact zeros. Whatever reads safetensors reads it: NumPy,
PyTorch, JAX. No other package is needed.

compressed: every weight by the pattern of its zeros: CSR, N:M values with packed indices, or
blocks. t5x_sparsity.load_export gives back the same bits, as arrays or as BCOO.

Neither makes anything faster by itself. docs/export.md says what does, and describes the file."""

_EPILOG = """\
examples:
  t5x-sparsity export /runs/rigl/checkpoint_8000 rigl.safetensors
  t5x-sparsity export /runs/rigl rigl.safetensors --format=compressed --dtype=bfloat16
  t5x-sparsity export /runs/rigl mlp.safetensors --include='mlp/w[io]' --json

Exit code: 0; 2 if it can't be exported as asked, with one line that says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of `t5x-sparsity export`.

    Attributes:
      checkpoint: a folder checkpoint_<step>, or the MODEL_DIR above it for the last one.
      out: the file to write, which ends in .safetensors.
      format: 'dense' or 'compressed'.
      dtype: 'float32', 'bfloat16' or 'float16' for floating-point weights; None for their own.
      include: a regular expression; weights whose path it is found in, None for all.
      smallest: of compressed weights, take a bit mask wherever it is smaller than CSR.
      overwrite: replace the file if it is there.
      json: print one JSON object instead of a table.
    """

    checkpoint: str
    out: str
    format: str = "dense"
    dtype: str | None = None
    include: str | None = None
    smallest: bool = False
    overwrite: bool = False
    json: bool = False


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
    export = commands.add_parser(
        "export",
        allow_abbrev=False,
        help="write a checkpoint's weights as safetensors, dense or compressed",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder checkpoint_<step>, or the MODEL_DIR above it for its last one",
    )
    export.add_argument("out", metavar="OUT", help="the file to write: a name.safetensors")
    export.add_argument(
        "--format", choices=("dense", "compressed"), default="dense", help="default: dense"
    )
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of floating-point weights, rounded to nearest; default: their own",
    )
    export.add_argument(
        "--include",
        metavar="REGEX",
        help="only weights whose path it is found in; default: all",
    )
    export.add_argument(
        "--smallest",
        action="store_true",
        help="with --format=compressed: a bit mask in place of CSR wherever it is smaller",
    )
    export.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    export.add_argument("--json", action="store_true", help="print one JSON object")
    export.set_defaults(options=ExportOptions, extra="tools")
