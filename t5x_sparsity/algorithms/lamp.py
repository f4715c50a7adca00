"""The LAMP score's choice over all layers, without a sort (Lee et al. 2021, arXiv:2010.07611).

The score of a weight is its square over the sum of all squares in its layer that are not smaller
(section 3). It rises with |w| within a layer, so that a threshold on scores is one on |w| for every
layer. Both are found by bisection, the layers' within the brackets that the last one left: a few
hundred passes over the weights, each with one all-reduce of a few numbers a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from t5x_sparsity.core.exact_sums import fixed_point, integer_sum
from t5x_sparsity.core.topk import Count, Layout, joint_top_k_masks, materialize, top_k_masks

_LARGEST = jnp.finfo(jnp.float32).max


def lamp_masks(
    scores: Sequence[jax.Array],
    k: Count | int | jax.Array,
    *,
    where: Sequence[jax.Array | None] | None = None,
    sizes: Sequence[jax.Array | int] | None = None,
    stack_axes: Sequence[Sequence[int]] | None = None,
    turns: Sequence[Sequence[int]] | None = None,
) -> list[jax.Array]:
    """Returns the masks of the k weights of largest LAMP score over all tensors together.

    Each slice is a layer of its own. Of equal LAMP scores the larger |w| stays, then the earlier
    tensor, then the lower flat index. Equal |w| of a layer have equal LAMP scores, but for the
    first of its largest, which scores 1, so that every layer keeps a weight while k allows.

    Args:
      scores: |w|, or scores of units in place of it; see `joint_top_k_masks`.
      k: how many weights to keep.
      where: for each tensor, its candidates, or None for all; others count for nothing.
      sizes: for each tensor, how many weights its units hold.
      stack_axes: for each tensor, the axes along which it is a stack of layers.
      turns: given, entries of `scores` are stacks of tensors; see `joint_top_k_masks`. Their first
        axes are stacked axes then, as it is.
    """
    stack_axes = [()] * len(scores) if stack_axes is None else stack_axes
    where = [None] * len(scores) if where is None else where
    layout = Layout([s.shape for s in scores], stack_axes, joint=False, sizes=sizes)
    k = Count(*(c.reshape(1) for c in Count.of(k)))
    active = [
        jnp.ones(s.shape, bool) if w is None else w for s, w in zip(scores, where, strict=True)
    ]
    firsts = top_k_masks(scores, [1] * len(scores), where=where, stack_axes=stack_axes)
    squares = materialize(
        [_square(s, a, axes) for s, a, axes in zip(scores, active, layout.reduced, strict=True)]
    )
    # of positive floats the bits order as the numbers do
    bits = [lax.bitcast_convert_type(q, jnp.int32) for q in squares]
    fixed, exponents = zip(
        *(fixed_point(q, axes) for q, axes in zip(squares, layout.reduced, strict=True)),
        strict=True,
    )

    def above(thresholds):
        spread = layout.spread(thresholds)
        return [a & (b >= t) for a, b, t in zip(active, bits, spread, strict=True)]

    def with_firsts(flags):
        return [x | first for x, first in zip(flags, firsts, strict=True)]

    def reaches(thresholds, level):
        """Whether a weight at its layer's threshold scores at least `level`."""
        sums = [
            jnp.ldexp(integer_sum(jnp.where(flags, f, 0), axes), e).reshape(-1)
            for flags, f, e, axes in zip(
                above(thresholds), fixed, exponents, layout.reduced, strict=True
            )
        ]
        squares = lax.bitcast_convert_type(thresholds, jnp.float32)
        return (thresholds > 0) & (squares >= level * jnp.concatenate(sums))

    def at_level(level, low, high):
        """The lowest threshold of every layer in [low, high] that reaches `level`."""

        def halve(bracket):
            low, high = bracket
            middle = low + (high - low) // 2
            found = reaches(middle, level)
            return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

        return lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, (low, high))[1]

    def narrow(state):
        low, high, lowest, highest = state
        middle = low + (high - low) // 2
        level = lax.bitcast_convert_type(middle, jnp.float32)
        thresholds = at_level(level, lowest, highest)
        enough = layout.count(with_firsts(above(thresholds))).sum().reaches(k)[0]
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, thresholds, lowest),
            jnp.where(enough, highest, thresholds),
        )

    # at a level of 0 all weights are kept, and none above 1
    one = lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    tops = [
        jnp.max(b, axis=axes).reshape(-1) + 1 for b, axes in zip(bits, layout.reduced, strict=True)
    ]
    highest = jnp.concatenate(tops)
    start = (jnp.int32(0), one, jnp.zeros_like(highest), highest)
    _, _, lowest, highest = lax.while_loop(lambda s: s[1] - s[0] > 1, narrow, start)
    # where k is too small for the first of every layer, some of them are all that is chosen
    few = layout.count(firsts).sum().reaches(k)[0]
    chosen = [c & ~few for c in with_firsts(above(highest))]
    ties = [x & ~c for x, c in zip(with_firsts(above(lowest)), chosen, strict=True)]
    left = k - layout.count(chosen).sum()
    rest = joint_top_k_masks(scores, left, where=ties, sizes=sizes, turns=turns)
    return [c | r for c, r in zip(chosen, rest, strict=True)]


def _square(scores: jax.Array, active: jax.Array, axes: Sequence[int]) -> jax.Array:
    """float32 squares of the candidates, finite; NaN is the smallest.

    They are scaled by a power of two a layer, which LAMP's scores don't depend on, so that those of
    very small or very large weights neither vanish nor overflow.
    """
    x = scores.astype(jnp.float32)
    x = jnp.minimum(jnp.where(active & ~jnp.isnan(x), jnp.abs(x), 0), _LARGEST)
    exponent = jnp.frexp(jnp.max(x, axis=axes, keepdims=True))[1]
    return jnp.square(jnp.ldexp(x, -exponent))
