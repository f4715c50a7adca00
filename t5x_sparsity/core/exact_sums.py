"""Sums that come out the same bit for bit in whatever order they are taken.

A float sum depends on its order, and under a mesh the order depends on the mesh. Scores that are
sums, of a block, a channel or a layer, would then tie or not by chance, and masks would differ.
Here the terms are rounded to 30 bits below the largest one and added as integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

BITS = 30  # of a term, below the largest one of its sum
_DIGIT = 10
_DIGITS = 7  # 30 bits of a term and 40 of their number
# so many digits add up within an int32
_TERMS = 1 << (31 - _DIGIT)


def fixed_point(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Rounds non-negative floats to integers below 2**30, with one power of two a sum.

    Args:
      x: float, finite and not negative.
      axes: those that are to be summed.

    Returns:
      int32 of x's shape, and the int32 exponent (axes kept, of length 1): x is about
      integer * 2**exponent.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(x, axis=tuple(axes), keepdims=True)
    exponent = jnp.frexp(top)[1].astype(jnp.int32) - BITS
    return jnp.ldexp(x, -exponent).astype(jnp.int32), exponent


def integer_sum(fixed: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The exact sum of non-negative int32 below 2**30, rounded to float32 once; axes are kept."""
    digits = [(fixed >> (_DIGIT * i)) & ((1 << _DIGIT) - 1) for i in range(BITS // _DIGIT)]
    sizes = {a: fixed.shape[a] for a in axes}
    together = math.prod(sizes.values()) <= _TERMS
    for step in [tuple(axes)] if together else [(a,) for a in axes]:
        if math.prod(sizes[a] for a in step) > _TERMS:
            raise ValueError(f"an axis of {sizes[step[0]]} is too long to be summed; split it")
        digits = [jnp.sum(d, axis=step, keepdims=True, dtype=jnp.int32) for d in digits]
        digits += [jnp.zeros_like(digits[0])] * (_DIGITS - len(digits))
        for i in range(_DIGITS - 1):
            digits[i + 1] = digits[i + 1] + (digits[i] >> _DIGIT)
            digits[i] = digits[i] & ((1 << _DIGIT) - 1)
    total = jnp.zeros(digits[0].shape, jnp.float32)
    for digit in reversed(digits):
        total = total * (1 << _DIGIT) + digit.astype(jnp.float32)
    return total


def ordered_sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The float32 sum of |x| over `axes`, which are kept, of length 1.

    Terms below 2**-30 of the largest count as 0. A sum with a NaN in it is NaN, else one with an
    infinity is infinite.
    """
    x = jnp.abs(x.astype(jnp.float32))
    axes = tuple(axes)
    if not axes:
        return x
    fixed, exponent = fixed_point(jnp.where(jnp.isfinite(x), x, 0), axes)
    total = jnp.ldexp(integer_sum(fixed, axes), exponent)
    # the largest is NaN or infinite where any is
    top = jnp.max(x, axis=axes, keepdims=True)
    return jnp.where(jnp.isfinite(top), total, top)
