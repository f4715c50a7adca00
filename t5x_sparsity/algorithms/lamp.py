"""Selection by LAMP scores over all layers, without a sort (Lee et al. 2021, arXiv:2010.07611).

The LAMP score of a weight is its square, divided by the sum of all squares in its layer that are
not smaller (section 3). Within a layer it increases with |w|, so that a threshold on scores is a
threshold on |w| in every layer. Both are found by bisection: for each threshold on scores that is
tried, those of the layers are searched between the bounds known so far. That takes a few hundred
passes over the weights, each with one all-reduce of a few numbers per layer.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from t5x_sparsity.core.exact_sums import fixed_point, integer_sum
from t5x_sparsity.core.topk import Count, Layout, joint_top_k_masks, materialize, top_k_masks

_LARGEST = jnp.finfo(jnp.float32).max

# Lower and upper bounds of the threshold on scores, int32 scalars, and of each layer's on |w|.
_Bounds = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def lamp_masks(
    scores: Sequence[jax.Array],
    k: Count | int | jax.Array,
    *,
    where: Sequence[jax.Array | None] | None = None,
    sizes: Sequence[jax.Array | int] | None = None,
    stack_axes: Sequence[Sequence[int]] | None = None,
    order: Sequence[Sequence[int]] | None = None,
) -> list[jax.Array]:
    """Returns the masks of the k weights of largest LAMP score over all tensors together.

    Each slice is a layer. Of equal LAMP scores the larger |w| is kept, then the earlier tensor,
    then the lower flat index. Equal |w| of a layer have equal LAMP scores, except that the first of
    its largest scores 1, so that every layer keeps a weight if k allows.

    Args:
      scores: |w|, or scores of units instead; see `joint_top_k_masks`.
      k: how many weights to keep.
      where: for each tensor, its candidates, or None for all; others count as 0.
      sizes: for each tensor, how many weights its units hold.
      stack_axes: for each tensor, the axes along which it is a stack of layers.
      order: if given, entries of `scores` are stacks of tensors; see `joint_top_k_masks`. Their
        first axes must be in `stack_axes`.

    Returns:
      For each tensor, its mask: bool, the tensor's shape.
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
    # positive floats have the order of their bits
    bits = [lax.bitcast_convert_type(q, jnp.int32) for q in squares]
    fixed, exponents = zip(
        *(fixed_point(q, axes) for q, axes in zip(squares, layout.reduced, strict=True)),
        strict=True,
    )

    def above(thresholds: jax.Array) -> list[jax.Array]:
        spread = layout.spread(thresholds)
        return [a & (b >= t) for a, b, t in zip(active, bits, spread, strict=True)]

    def with_firsts(flags: Sequence[jax.Array]) -> list[jax.Array]:
        return [x | first for x, first in zip(flags, firsts, strict=True)]

    def reaches(thresholds: jax.Array, level: jax.Array) -> jax.Array:
        """Whether a weight at its layer's threshold scores at least `level`."""
        sums = [
            jnp.ldexp(integer_sum(jnp.where(flags, f, 0), axes), e).reshape(-1)
            for flags, f, e, axes in zip(
                above(thresholds), fixed, exponents, layout.reduced, strict=True
            )
        ]
        squares = lax.bitcast_convert_type(thresholds, jnp.float32)
        return (thresholds > 0) & (squares >= level * jnp.concatenate(sums))

    def at_level(level: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """The lowest threshold of every layer in [low, high] that reaches `level`."""

        def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = low + (high - low) // 2
            found = reaches(middle, level)
            return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

        found: jax.Array = lax.while_loop(lambda b: jnp.any(b[0] < b[1]), halve, (low, high))[1]
        return found

    def narrow(state: _Bounds) -> _Bounds:
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

    # a level of 0 keeps all weights, and one above 1 none
    one = lax.bitcast_convert_type(jnp.float32(1), jnp.int32) + 1
    tops = [
        jnp.max(b, axis=axes).reshape(-1) + 1 for b, axes in zip(bits, layout.reduced, strict=True)
    ]
    highest = jnp.concatenate(tops)
    start = (jnp.int32(0), one, jnp.zeros_like(highest), highest)
    _, _, lowest, highest = lax.while_loop(lambda s: s[1] - s[0] > 1, narrow, start)
    # if k is too small for the first of every layer, only some of these are chosen
    few = layout.count(firsts).sum().reaches(k)[0]
    chosen = [c & ~few for c in with_firsts(above(highest))]
    ties = [x & ~c for x, c in zip(with_firsts(above(lowest)), chosen, strict=True)]
    left = k - layout.count(chosen).sum()
    rest = joint_top_k_masks(scores, left, where=ties, sizes=sizes, order=order)
    return [c | r for c, r in zip(chosen, rest, strict=True)]


def _square(scores: jax.Array, active: jax.Array, axes: Sequence[int]) -> jax.Array:
    """float32 squares of the candidates, finite; NaN is the smallest.

    They are scaled by a power of two per layer, on which LAMP scores don't depend, so that squares
    of very small or very large weights neither vanish nor overflow.
    """
    x = scores.astype(jnp.float32)
    x = jnp.minimum(jnp.where(active & ~jnp.isnan(x), jnp.abs(x), 0), _LARGEST)
    exponent = jnp.frexp(jnp.max(x, axis=axes, keepdims=True))[1]
    return jnp.square(jnp.ldexp(x, -exponent))
