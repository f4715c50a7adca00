"""What selection must choose, by sorting and by loops, and scores with every special value."""

import functools

import ml_dtypes
import numpy as np
from meshes import quick_jit

from t5x_sparsity.core.selection import Choice, select_masks

DTYPES = {
    "float32": (np.float32, np.uint32),
    "bfloat16": (ml_dtypes.bfloat16, np.uint16),
    "float16": (np.float16, np.uint16),
}

# bits of 0.0, -0.0, 1.0, -1.0, the infinities, NaN of both signs, quiet and signalling, and
# subnormals, the smallest first
POOL = {
    "float32": [
        *(0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000),
        *(0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
        *(0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00000002, 0x3F800001),
    ],
    "bfloat16": [
        *(0x0000, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80),
        *(0x7FC0, 0xFFC0, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
        *(0x0001, 0x8001, 0x007F, 0x807F, 0x0002, 0x3F81),
    ],
    "float16": [
        *(0x0000, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00),
        *(0x7E00, 0xFE00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
        *(0x0001, 0x8001, 0x03FF, 0x83FF, 0x0002, 0x3C01),
    ],
}


def as_float64(scores):
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.asarray(scores).astype(np.float64)


def order(scores, where):
    """Flat indices, the first to be kept first: a stable sort, NaN last of the candidates."""
    values = as_float64(scores).reshape(-1)
    nan = np.isnan(values)
    barred = ~np.asarray(where).reshape(-1)
    return np.lexsort((np.where(nan, 0, -values), nan, barred))


def oracle(scores, k, where=None, stack_axes=()):
    """The mask of the k largest of every slice, by sorting."""
    scores = np.asarray(scores)
    where = np.ones(scores.shape, bool) if where is None else np.asarray(where)
    stacked = tuple(scores.shape[a] for a in stack_axes)
    k = np.broadcast_to(np.asarray(k), stacked)
    mask = np.zeros(scores.shape, bool)
    for at in np.ndindex(*stacked):
        index = [slice(None)] * scores.ndim
        for axis, i in zip(stack_axes, at, strict=True):
            index[axis] = i
        index = tuple(index)
        part = np.zeros(scores[index].size, bool)
        part[order(scores[index], where[index])[: k[at]]] = True
        mask[index] = part.reshape(scores[index].shape) & where[index]
    return mask


def random_scores(rng, shape, dtype="float32", ties=True):
    """Scores with every special value in them, and many ties."""
    float_type, uint = DTYPES[dtype]
    bits = rng.integers(0, np.iinfo(uint).max, shape, dtype=uint, endpoint=True)
    if ties:
        special = np.array(POOL[dtype], uint)[rng.integers(0, len(POOL[dtype]), shape)]
        bits = np.where(rng.random(shape) < 0.7, special, bits)
    return bits.view(float_type)


def group_oracle(scores, n, m, axis, keep=None, where=None, stack_axes=()):
    """N:M by a loop over groups: those to keep, then the candidates from the largest on."""
    values = as_float64(scores)
    nan = np.isnan(values)
    values = np.where(nan, 0, values)
    free = [a for a in range(values.ndim) if a not in stack_axes]
    axis = free[axis]
    values, nan = (np.moveaxis(x, axis, -1) for x in (values, nan))
    keep = np.zeros(values.shape, bool) if keep is None else np.moveaxis(keep, axis, -1)
    where = np.ones(values.shape, bool) if where is None else np.moveaxis(where, axis, -1)
    mask = np.zeros(values.shape, bool)
    for at in np.ndindex(values.shape[:-1]):
        for start in range(0, values.shape[-1], m):
            group = [
                (not keep[at][i], nan[at][i], -values[at][i], i)
                for i in range(start, start + m)
                if keep[at][i] or where[at][i]
            ]
            for *_, i in sorted(group)[:n]:
                mask[at][i] = True
    return np.moveaxis(mask, -1, axis)


@functools.cache
def compiled(pattern, stack_axes, with_keep, with_where):
    def run(scores, k, keep, where):
        choice = Choice(
            pattern=pattern,
            scores=scores,
            k=k,
            stack_axes=stack_axes,
            where=where if with_where else None,
            keep=keep if with_keep else None,
        )
        return select_masks({"w": choice})["w"]

    return quick_jit(run)


def chosen(pattern, scores, k, keep=None, where=None, stack_axes=()):
    run = compiled(pattern, stack_axes, keep is not None, where is not None)
    return np.asarray(run(scores, np.asarray(k, np.int32), keep, where))
