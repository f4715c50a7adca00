"""Which axes of a weight are the rows and which the columns of its matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixAxes:
    """How a weight is a stack of matrices; all are axes of the whole weight, ascending.

    Attributes:
      stack: axes of the stack.
      inputs: axes that are a matrix's rows, together.
      outputs: axes that are its columns, together.
    """

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def matrix_axes(
    ndim: int, stack_axes: Sequence[int] = (), names: Sequence[str | None] | None = None
) -> MatrixAxes:
    """The axes of a weight as those of matrices: the outputs are the last axis, or heads x kv.

    Args:
      ndim: axes of the weight.
      stack_axes: axes along which it is a stack of slices.
      names: logical names of its axes, None where they are not known.
    """
    free = [a for a in range(ndim) if a not in stack_axes]
    last = [names[a] for a in free[-2:]] if names is not None and len(names) == ndim else []
    n = 2 if len(free) > 2 and last == ["heads", "kv"] else 1
    stack = tuple(a for a in range(ndim) if a in stack_axes)
    return MatrixAxes(stack=stack, inputs=tuple(free[:-n]), outputs=tuple(free[-n:]))
