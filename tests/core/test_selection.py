"""Selections whose entries count for several weights, and scores that a compiler may round anew."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from meshes import quick_jit
from selection_oracles import as_float64, order, random_scores

from t5x_sparsity.core.topk import joint_top_k_masks, top_k_mask


def sized_oracle(scores, sizes, k, where):
    """The first units, by a stable sort, that hold k weights together."""
    flat = np.concatenate([as_float64(s).ravel() for s in scores])
    weights = np.concatenate(
        [np.broadcast_to(n, s.shape).ravel() for n, s in zip(sizes, scores, strict=True)]
    )
    free = np.concatenate([w.ravel() for w in where])
    ranked = [i for i in order(flat, free) if free[i]]
    mask, total = np.zeros(flat.size, bool), 0
    for i in ranked:
        if total >= k:
            break
        mask[i] = True
        total += weights[i]
    ends = np.cumsum([s.size for s in scores])
    return [m.reshape(s.shape) for m, s in zip(np.split(mask, ends[:-1]), scores, strict=True)]


def test_joint_search_over_units_of_several_sizes():
    shapes = [(3, 5), (7,), (2, 4)]
    sizes = [np.array([[4, 4, 4, 4, 1]] * 2 + [[2, 2, 2, 2, 3]], np.int32), 6, 1]
    run = quick_jit(lambda s, k, w: joint_top_k_masks(s, k, where=w, sizes=sizes))

    @given(st.integers(0, 2**32 - 1), st.integers(0, 110), st.booleans())
    def check(seed, k, barred):
        rng = np.random.default_rng(seed)
        scores = [random_scores(rng, s) for s in shapes]
        where = [rng.random(s) < (0.6 if barred else 2) for s in shapes]
        found = run(scores, np.int32(k), where)
        expected = sized_oracle(scores, sizes, k, where)
        for mask, reference in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mask, reference)

    check()


def test_units_by_hand():
    """Six weights in units of 3, 1, 2, best first; then all equal."""
    scores, sizes = [jnp.array([9.0, 8.0]), jnp.array([7.0])], [np.int32([3, 1]), 2]
    run = quick_jit(lambda s, k: jnp.concatenate(joint_top_k_masks(s, k, sizes=sizes)))
    for values in (scores, [jnp.ones(2), jnp.ones(1)]):
        for k, units in [(0, 0), (1, 1), (3, 1), (4, 2), (5, 3), (6, 3), (7, 3)]:
            assert run(values, k).tolist() == [i < units for i in range(3)], k


def test_scores_that_end_in_a_multiply_add_are_counted_as_they_are_chosen():
    """A compiler may fuse a*b + c, or not, at each place that reads it: counts must not suffer."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=(16, 16)).astype(np.float32) for _ in range(3))

    @quick_jit
    def run(a, b, c, where, k):
        return top_k_mask(jnp.abs(a * b + c), k, where=where, stack_axes=(1,))

    w = np.abs(a * b + c)
    for k in (16, 15, 8, 1):
        mask = np.asarray(run(a, b, c, np.ones(w.shape, bool), k))
        assert mask.sum(axis=0).tolist() == [k] * 16
        kept, pruned = np.where(mask, w, np.inf), np.where(mask, 0, w)
        assert (kept.min(axis=0) >= pruned.max(axis=0) * (1 - 1e-6)).all()
