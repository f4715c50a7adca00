"""The arguments of `t5x-sparsity export`."""

import dataclasses

from t5x_sparsity.commands.options import argument

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
    """Options of `t5x-sparsity export`."""

    checkpoint: str = argument(
        metavar="CHECKPOINT",
        help="a folder checkpoint_<step>, or the MODEL_DIR above it for its last one",
    )
    out: str = argument(metavar="OUT", help="the file to write: a name.safetensors")
    format: str = argument(
        "--format", choices=("dense", "compressed"), default="dense", help="default: dense"
    )
    dtype: str | None = argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of floating-point weights, rounded to nearest; default: their own",
    )
    include: str | None = argument(
        "--include",
        metavar="REGEX",
        help="only weights whose path it is found in; default: all",
    )
    smallest: bool = argument(
        "--smallest",
        action="store_true",
        help="with --format=compressed: a bit mask in place of CSR wherever it is smaller",
    )
    overwrite: bool = argument(
        "--overwrite", action="store_true", help="replace OUT if it is there"
    )
    json: bool = argument("--json", action="store_true", help="print one JSON object")


COMMAND = dict(
    options=ExportOptions,
    extra="tools",
    help="write a checkpoint's weights as safetensors, dense or compressed",
    description=_DESCRIPTION,
    epilog=_EPILOG,
)
