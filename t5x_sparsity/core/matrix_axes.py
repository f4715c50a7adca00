"""Which axes of a weight are the rows, and which the columns, of its matrices."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixAxes:
    """The axes of a weight that is a stack of matrices, each ascending.

    Attributes:
      stack: axes of the stack.
      inputs: axes that together are the rows of a matrix.
      outputs: axes that together are its columns.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_axes(
    ndim: int, stack_axes: Sequence[int] = (), names: Sequence[str | None] | None = None
) -> MatrixAxes:
    """Which axes of a weight are inputs and outputs: the last is the output, or heads x kv.

    >>> matrix_axes(3, names=("embed", "heads", "kv"))
    MatrixAxes(stack=(), inputs=(0,), outputs=(1, 2))

    names: logical names of the weight's axes, None where unknown.
    """
    free = [a for a in range(ndim) if a not in stack_axes]
    last = [names[a] for a in free[-2:]] if names is not None and len(names) == ndim else []
    n = 2 if len(free) > 2 and last == ["heads", "kv"] else 1
    stack = tuple(a for a in range(ndim) if a in stack_axes)
    return MatrixAxes(stack=stack, inputs=tuple(free[:-n]), outputs=tuple(free[-n:]))
