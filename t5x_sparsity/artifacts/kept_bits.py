"""Weights as stacks of matrices, and which of a matrix are kept, one bit each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Weights looked at together; most patterns fail on the first.
_BAND = 1 << 18


class KeptBits:
    """Which weights of a slice are kept, one bit each.

    Attributes:
      shape: of the slice, axes of the inputs before those of the outputs.
      rows: inputs of the matrix.
      columns: outputs of the matrix.
    """

    def __init__(self, shape: Sequence[int], output_axes: int = 1):
        """All pruned.

        Args:
          shape: of the slice, of at least one axis.
          output_axes: how many of its last axes are the outputs.
        """
        self.shape = tuple(shape)
        self.inputs = self.shape[: len(self.shape) - output_axes]
        self.outputs = self.shape[len(self.shape) - output_axes :]
        self.rows, self.columns = math.prod(self.inputs), math.prod(self.outputs)
        self._bits = np.zeros((*self.shape[:-1], -(-self.shape[-1] // 8)), np.uint8)

    @property
    def size(self) -> int:
        """Weights of the slice."""
        return self.rows * self.columns

    def add(self, kept: np.ndarray, index: Sequence[slice] = ()) -> None:
        """Marks weights as kept.

        Args:
          kept: bool, True where the weight is kept; a part of the slice, with all its axes.
          index: where the part is, one slice with start and stop per axis; () for the whole slice.
        """
        at = list(index) or [slice(0, n) for n in self.shape]
        first = at[-1].start % 8
        if first:
            kept = np.pad(kept, [*[(0, 0)] * (kept.ndim - 1), (first, 0)])
        packed = np.packbits(kept, axis=-1)
        start = at[-1].start // 8
        at[-1] = slice(start, start + packed.shape[-1])
        self._bits[tuple(at)] |= packed

    def band(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of the matrix: bool [rows, columns]."""
        packed = self._bits.reshape(self.rows, -1, self._bits.shape[-1])[start:stop]
        bits = np.unpackbits(packed, axis=-1, count=self.shape[-1])
        return bits.reshape(len(packed), self.columns).view(bool)

    def mask(self) -> np.ndarray:
        """The slice: bool, in its shape."""
        return self.band(0, self.rows).reshape(self.shape)

    def bands(self, multiple: int = 1) -> Iterator[np.ndarray]:
        """The matrix, a multiple of so many rows at a time; the rest comes last."""
        step = self.band_rows(multiple)
        for start in range(0, self.rows, step):
            yield self.band(start, min(start + step, self.rows))

    def band_rows(self, multiple: int = 1) -> int:
        """Rows looked at together, a multiple of so many."""
        return max(1, _BAND // max(1, self.columns * multiple)) * multiple


def slices_of(kept: np.ndarray, stack_axes: Sequence[int] = ()) -> Iterator[KeptBits]:
    """The slices of a weight, from a bool array of its shape that is True where it is kept."""
    stacked = np.moveaxis(kept, stack_axes, range(len(stack_axes)))
    for at in np.ndindex(*stacked.shape[: len(stack_axes)]):
        bits = KeptBits(stacked[at].shape)
        bits.add(stacked[at])
        yield bits
