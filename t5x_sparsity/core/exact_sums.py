"""Sums that are the same, bit for bit, in any order of their terms.

A float sum depends on the order of its terms, and the order on the mesh. Scores that are sums over
a block, a channel or a layer would tie on one mesh and not on another, and masks would differ. Here
terms are rounded to 30 bits below the largest term and added as integers.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

BITS = 30  # per term, below the largest term of its sum
_DIGIT = 10
_DIGITS = 7  # for 30 bits per term and 2**40 terms
_TERMS = 1 << (31 - _DIGIT)  # so many digits have a sum that fits an int32


def fixed_point(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Rounds finite, non-negative floats to integers below 2**30, with one power of two per sum.

    axes: those over which `integer_sum` will sum.

    Returns int32 of x's shape, and the int32 exponent, `axes` being of length 1: x is approximately
    integer * 2**exponent.
    """
    x = x.astype(jnp.float32)
    top = jnp.max(x, axis=tuple(axes), keepdims=True)
    exponent = jnp.frexp(top)[1].astype(jnp.int32) - BITS
    return jnp.ldexp(x, -exponent).astype(jnp.int32), exponent


def integer_sum(fixed: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The exact sum of non-negative int32 below 2**30 over `axes`, rounded to float32 once.

    The axes stay, of length 1.

    Raises:
      ValueError: more than 2**21 entries along one axis.
    """
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
    """The float32 sum of |x| over `axes`, which stay, of length 1.

    Terms below 2**-30 of the largest count as 0. A sum with a NaN term is NaN; otherwise one with
    an infinite term is infinite.

    >>> print(ordered_sum(jnp.array([[1.0, -2.0], [3.0, 0.5]]), axes=(1,)))
    [[3. ]
     [3.5]]
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
