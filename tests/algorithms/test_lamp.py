import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, mesh, put, quick_jit

from t5x_sparsity.algorithms.lamp import lamp_masks
from t5x_sparsity.core.topk import Count


def lamp_scores(layer):
    """w_u^2 / sum of w_v^2 not smaller, of one layer, by sorting; float64, NaN as 0.

    The first of the largest scores 1.
    """
    w = np.abs(np.asarray(layer).astype(np.float64)).ravel()
    first = np.argmax(np.where(np.isnan(w), -1, w))
    w = np.nan_to_num(w, nan=0)
    largest = w.max(initial=0) or 1
    squares = (w / largest) ** 2  # the score doesn't depend on the layer's scale
    order = np.argsort(-squares, kind="stable")
    sums = np.cumsum(squares[order])
    # equal weights have equal scores: all of them are in each other's sum
    last = np.searchsorted(-squares[order], -squares[order], side="right") - 1
    scores = np.zeros(w.shape)
    scores[order] = np.divide(squares[order], sums[last], where=sums[last] > 0, out=scores.copy())
    scores[first] = 1
    return scores.reshape(np.shape(layer))


def test_the_oracle_by_hand():
    np.testing.assert_allclose(lamp_scores([1, -2, 3]), [1 / 14, 4 / 13, 1])
    np.testing.assert_allclose(lamp_scores([0, 2, 2, np.nan]), [0, 1, 0.5, 0])
    np.testing.assert_allclose(lamp_scores([1, 2, 1, 2]), [0.1, 1, 0.1, 0.5])


def layers_of(shape, axes):
    """The index of every layer of a stack."""
    for at in np.ndindex(*(shape[a] for a in axes)):
        index = [slice(None)] * len(shape)
        for axis, i in zip(axes, at, strict=True):
            index[axis] = i
        yield tuple(index)


def all_scores(weights, where, stack_axes):
    """Scores of every tensor, each slice a layer of its own; barred weights score -1."""
    found = []
    for w, free, axes in zip(weights, where, stack_axes, strict=True):
        scores = np.full(w.shape, -1.0)
        for index in layers_of(w.shape, axes):
            if free[index].any():
                layer = scores[index]
                layer[free[index]] = lamp_scores(w[index][free[index]])
                scores[index] = layer
        found.append(scores)
    return found


def assert_lamp(masks, weights, k, where, stack_axes):
    """The exact count, the k largest scores up to rounding, and a weight of every layer."""
    masks = [np.asarray(m) for m in masks]
    scores = all_scores(weights, where, stack_axes)
    flat = np.sort(np.concatenate([s.ravel() for s in scores]))[::-1]
    total = sum(int(m.sum()) for m in masks)
    assert total == min(k, int((flat >= 0).sum()))
    if not total:
        return
    for mask, score, w, free, axes in zip(masks, scores, weights, where, stack_axes, strict=True):
        assert not (mask & ~free).any()
        assert (score[mask] >= flat[total - 1] * (1 - 1e-6)).all()
        assert (score[~mask] <= flat[total - 1] * (1 + 1e-6)).all()
        for index in layers_of(w.shape, axes):
            if k >= (flat == 1).sum():
                assert mask[index].any() or not free[index].any(), "a layer without a weight"
            sizes = np.abs(np.asarray(w[index]).astype(np.float64))
            sizes = np.where(np.isnan(sizes), -1, sizes)
            pruned = sizes[~mask[index] & free[index]]
            assert sizes[mask[index]].min(initial=np.inf) >= pruned.max(initial=-1)


SHAPES = ((4, 5), (3, 2, 4), (7,))
AXES = ((), (1,), ())


@functools.cache
def compiled(axes=AXES):
    return quick_jit(
        lambda w, high, low, where: lamp_masks(w, Count(high, low), where=where, stack_axes=axes)
    )


def found(weights, k, where=None, axes=AXES):
    where = [np.ones(w.shape, bool) for w in weights] if where is None else where
    return compiled(axes)([np.abs(w) for w in weights], *Count.of(int(k)), where)


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "few values": lambda rng, shape: rng.integers(0, 4, shape),
    "wide": lambda rng, shape: rng.normal(size=shape) * np.exp2(rng.integers(-30, 1, shape)),
    "zeros": lambda rng, shape: np.zeros(shape),
    "equal": lambda rng, shape: np.full(shape, 0.3),
    "nan": lambda rng, shape: np.where(rng.random(shape) < 0.2, np.nan, rng.normal(size=shape)),
}


@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=3, max_size=3),
    st.lists(st.integers(-30, 30), min_size=3, max_size=3),
    st.booleans(),
)
@settings(max_examples=40)
def test_equals_a_sort(seed, kinds, exponents, barred):
    rng = np.random.default_rng(seed)
    weights = [
        (KINDS[kind](rng, shape) * 2.0**e).astype(np.float32)
        for kind, shape, e in zip(kinds, SHAPES, exponents, strict=True)
    ]
    where = [rng.random(s) < (0.6 if barred else 2) for s in SHAPES]
    for k in rng.integers(0, 54, 3):
        assert_lamp(found(weights, k, where), weights, k, where, AXES)


def test_every_k_in_order():
    """Distinct scores: the masks are the sort's own, one weight more each time."""
    rng = np.random.default_rng(3)
    weights = [np.abs(rng.normal(size=s)).astype(np.float32) for s in SHAPES]
    scores = all_scores(weights, [np.ones(s, bool) for s in SHAPES], AXES)
    flat = np.concatenate([s.ravel() for s in scores])
    # the largest of a layer scores 1: of these ties the earlier tensor, or the larger |w|, is first
    for k in (0, 5, 11, 20, 33, 48, 51, 60):
        masks = np.concatenate([np.asarray(m).ravel() for m in found(weights, k)])
        if k >= 4:
            expected = np.zeros(51, bool)
            expected[np.argsort(-flat, kind="stable")[:k]] = True
            np.testing.assert_array_equal(masks, expected, err_msg=str(k))
        assert masks.sum() == min(k, 51)


def test_by_hand():
    # scores 1/14, 4/13, 1 and 9/25, 1 and 1, 1/2
    weights = [np.float32([1, 2, 3]), np.float32([3, 4]), np.float32([7, 7])]
    axes = ((), (), ())
    for k, kept in [
        (0, [[0, 0, 0], [0, 0], [0, 0]]),
        (1, [[0, 0, 0], [0, 0], [1, 0]]),  # of equal scores the larger weight
        (2, [[0, 0, 0], [0, 1], [1, 0]]),
        (3, [[0, 0, 1], [0, 1], [1, 0]]),
        (4, [[0, 0, 1], [0, 1], [1, 1]]),
        (5, [[0, 0, 1], [1, 1], [1, 1]]),
        (6, [[0, 1, 1], [1, 1], [1, 1]]),
        (7, [[1, 1, 1], [1, 1], [1, 1]]),
    ]:
        assert [m.astype(int).tolist() for m in found(weights, k, axes=axes)] == kept
    # layers of equal weights keep one each, before others that score more than the rest of them
    weights = [np.full(3, 5, np.float32), np.float32([2, 2]), np.float32([0, 0])]
    for k, kept in [
        (2, [[1, 0, 0], [1, 0], [0, 0]]),
        (3, [[1, 0, 0], [1, 0], [1, 0]]),
        (4, [[1, 0, 0], [1, 1], [1, 0]]),  # 1/2
        (5, [[1, 1, 0], [1, 1], [1, 0]]),  # 1/3
        (7, [[1, 1, 1], [1, 1], [1, 1]]),
    ]:
        assert [m.astype(int).tolist() for m in found(weights, k, axes=axes)] == kept
    # NaN goes last
    weights = [np.float32([0, np.nan, 0]), np.float32([np.nan, 1]), np.float32([np.nan, np.nan])]
    for k, kept in [
        (1, [[0, 0, 0], [0, 1], [0, 0]]),
        (2, [[1, 0, 0], [0, 1], [0, 0]]),
        (3, [[1, 0, 0], [0, 1], [1, 0]]),
        (4, [[1, 0, 1], [0, 1], [1, 0]]),
        (5, [[1, 1, 1], [0, 1], [1, 0]]),
        (7, [[1, 1, 1], [1, 1], [1, 1]]),
    ]:
        assert [m.astype(int).tolist() for m in found(weights, k, axes=axes)] == kept


def test_the_scale_of_a_layer_does_not_matter():
    rng = np.random.default_rng(5)
    weights = [np.abs(rng.normal(size=s)).astype(np.float32) for s in SHAPES]
    for scale in (1e-30, 1e-22, 1e-12, 1e12, 1e25, 1e37):
        scaled = [weights[0] * np.float32(scale), *weights[1:]]
        for k in (6, 25, 45):
            assert_lamp(found(scaled, k), scaled, k, [np.ones(s, bool) for s in SHAPES], AXES)


def test_infinite_weights_are_the_largest():
    weights = [np.float32([[1, np.inf, 2, 3, 4]] * 4), np.ones((3, 2, 4), np.float32)]
    weights.append(np.float32([np.inf, np.inf, 1, 2, 3, np.nan, 0]))
    masks = found(weights, 30)
    assert sum(int(m.sum()) for m in masks) == 30
    assert np.asarray(masks[0])[:, 1].all() and masks[2][:2].all()


def test_units_of_several_weights_and_half_precision():
    """At least k weights by whole units, and fewer without the last."""
    rng = np.random.default_rng(6)
    sizes = [np.int32([[3, 3, 3, 1]] * 3), 5]
    weights = np.concatenate([sizes[0].ravel(), np.full(12, 5)])
    run = quick_jit(lambda s, k: lamp_masks(s, k, sizes=sizes, stack_axes=[(), (0,)]))
    for draw in (rng.normal, lambda size: np.ones(size)):  # distinct scores, and ties
        scores = [np.abs(draw(size=s)).astype(ml_dtypes.bfloat16) for s in [(3, 4), (2, 6)]]
        lamp = all_scores(scores, [np.ones(s.shape, bool) for s in scores], [(), (0,)])
        first = np.argsort(-np.concatenate([s.ravel() for s in lamp]), kind="stable")
        for k in (9, 20, 41, 60, 72, 90, 200):
            masks = np.concatenate([np.asarray(m).ravel() for m in run(scores, np.int32(k))])
            number = int(np.searchsorted(np.cumsum(weights[first]), min(k, 90))) + 1
            assert masks.sum() == number
            assert weights[masks].sum() >= min(k, 90)
            if k > 15:  # past the three ties at 1
                assert set(np.flatnonzero(masks)) == set(first[:number])


def test_a_count_of_more_than_31_bits():
    weights = [np.ones(s, np.float32) for s in SHAPES]
    assert all(bool(m.all()) for m in found(weights, 2**33 + 3))


def test_the_same_on_meshes_and_nothing_moves():
    rng = np.random.default_rng(7)
    weights = [
        np.abs(rng.normal(size=(64, 32)) * np.exp2(rng.integers(-9, 1, (64, 32)))),
        np.abs(rng.normal(size=(4, 16, 32))),
    ]
    weights = [w.astype(np.float32) for w in weights]
    axes = ((), (0,))
    run = jax.jit(lambda w, k: lamp_masks(w, k, stack_axes=axes))
    expected = run(weights, 900)
    assert_lamp(expected, weights, 900, [np.ones(w.shape, bool) for w in weights], axes)
    devices = mesh(2, 4)
    placed = [put(devices, weights[0], "x", "y"), put(devices, weights[1], None, "y", "x")]
    program = run.lower(placed, jnp.int32(900)).compile()
    for mask, reference in zip(program(placed, jnp.int32(900)), expected, strict=True):
        np.testing.assert_array_equal(mask, reference)
    assert_moves_no_weight(program.as_text(), largest=6)
