"""How a mask is stored and applied.

A mask is stored as uint8, eight weights per byte along one axis, the first in the lowest bit. Every
other axis is unchanged, so that the stored mask takes its weight's PartitionSpec. Where no axis
packs evenly under the usual shardings, it is stored with one byte per weight. The axis depends on
the weight's shape and logical names alone, never on the mesh, and can be read off the two shapes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from t5x_sparsity.core.trees import Arrays

# A packed axis must still split into this many shards, whatever the weight's mesh axis.
_USUAL_SHARDS = 8


def pack_axis(shape: Sequence[int], stack_axes: Sequence[int] = ()) -> int | None:
    """The axis along which a mask of this shape is packed, None for one byte per weight.

    The last axis is the last resort, because unpacking it would shuffle vector lanes. Of the others
    it is the one whose packed length is divisible by the largest power of two, since meshes are
    powers of two. Of several it is the last: of [heads, kv, embed], heads are sharded and kv isn't.
    """

    def ways(axis: int) -> int:
        length = shape[axis] // 8
        return length & -length  # the largest power of two that divides it

    free = [a for a in range(len(shape)) if a not in stack_axes]
    axes = [a for a in free if shape[a] % 8 == 0 and ways(a) >= _USUAL_SHARDS]
    outer = [a for a in axes if a != len(shape) - 1]
    return max(outer or axes, key=lambda a: (ways(a), a), default=None)


def packed_shape(shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
    """The shape of the stored mask of a weight of this shape."""
    return tuple(n // 8 if a == axis else n for a, n in enumerate(shape))


def pack(mask: jax.Array, axis: int | None) -> jax.Array:
    """bool mask -> uint8, an eighth as long along `axis`; one byte per weight where it is None.

    >>> mask = jnp.arange(16).reshape(8, 2) % 5 == 0
    >>> stored = pack(mask, axis=0)
    >>> print(stored)  # bits 0 and 5 of the first column, 2 and 7 of the second
    [[ 33 132]]
    >>> bool((unpack(stored, (8, 2)) == mask).all())
    True
    """
    if axis is None:
        return mask.astype(jnp.uint8)
    shape = mask.shape
    bits = mask.reshape(*shape[:axis], shape[axis] // 8, 8, *shape[axis + 1 :]).astype(jnp.uint8)
    return jnp.sum(bits << _shifts(bits.ndim, axis), axis=axis + 1, dtype=jnp.uint8)


def unpack(packed: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Stored mask -> bool mask of the weight's `shape`; the inverse of `pack`.

    Raises:
      ValueError: the stored mask does not belong to a weight of that shape.
    """
    shape = tuple(shape)
    axis = stored_axis(packed.shape, shape)
    if axis is None:
        return packed != 0
    shifts = _shifts(packed.ndim + 1, axis)
    bits: jax.Array = (jnp.expand_dims(packed, axis + 1) >> shifts) & jnp.uint8(1)
    return (bits != 0).reshape(shape)


def stored_axis(packed_shape: Sequence[int], shape: Sequence[int]) -> int | None:
    """The axis along which a stored mask is packed, None where it is not.

    Raises:
      ValueError: the shapes don't belong together.
    """
    packed_shape, shape = tuple(packed_shape), tuple(shape)
    if packed_shape == shape:
        return None
    if len(packed_shape) == len(shape):
        differs = [a for a, (p, n) in enumerate(zip(packed_shape, shape, strict=True)) if p != n]
        if len(differs) == 1 and packed_shape[differs[0]] * 8 == shape[differs[0]]:
            return differs[0]
    raise ValueError(
        f"a stored mask of shape {packed_shape} does not fit a weight of shape {shape}: one axis "
        "must be an eighth as long, or none differ"
    )


def _shifts(ndim: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(
        jnp.uint8, tuple(8 if a == axis + 1 else 1 for a in range(ndim)), axis + 1
    )


def apply(arrays: Arrays, stored: Arrays) -> dict[str, jax.Array]:
    """The arrays with 0 where the stored masks prune; those without a mask are unchanged."""
    return {
        path: jnp.where(unpack(stored[path], x.shape), x, jnp.zeros((), x.dtype))
        if path in stored
        else x
        for path, x in arrays.items()
    }
