"""Every pattern through one contract: a new one joins by one line of PATTERNS.

What each must choose, weight for weight, is in test_patterns.py and test_patterns_units.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_moves_no_weight, mesh, put, quick_jit

import t5x_sparsity as ts
from t5x_sparsity.core import patterns
from t5x_sparsity.core.selection import Choice, select_masks

PATTERNS = {
    "unstructured": ts.Unstructured(),
    "block": ts.Block(height=4, width=2),
    "block, largest": ts.Block(height=2, width=8, pooling="max"),
    "block, whole columns": ts.Block(height=0, width=4),
    "channel": ts.Channel(),
    "channel, inputs": ts.Channel(axis=-2),
    "constant_fan_in": ts.ConstantFanIn(),
    "n_by_m": ts.NByM(n=2, m=4),
    "n_by_m, outputs": ts.NByM(n=1, m=8, axis=-1),
}
SHAPE, STACK_AXES, SLICE = (64, 2, 32), (1,), (64, 32)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def test_every_pattern_has_a_row():
    public = {x for x in vars(patterns).values() if isinstance(x, type) and hasattr(ts, x.__name__)}
    assert {type(x) for x in PATTERNS.values()} == public


def draw(seed):
    """Scores of few bits, which every dtype holds, with ties."""
    return np.float32(np.random.default_rng(seed).integers(0, 64, SHAPE) / 8)


def choose(pattern, k, scores, stack_axes=STACK_AXES):
    return select_masks({"w": Choice(pattern, scores, k, stack_axes)})["w"]


def at_half(pattern):
    return functools.partial(choose, pattern, pattern.kept(SLICE, 0.5))


@functools.cache
def jitted(pattern):
    return quick_jit(at_half(pattern))


def pooled(pattern, mask):
    """The mask of units, and whether each is whole."""
    units = pattern.pool_mask(jnp.asarray(mask), STACK_AXES)
    np.testing.assert_array_equal(pattern.expand(units, SHAPE, STACK_AXES), mask)
    return np.asarray(units)


@every_pattern
def test_counts_and_whole_units(pattern):
    pattern.validate(SLICE)
    fixed = pattern.fixed_level
    levels = [0.0, 0.3, 0.5, 0.99, 1.0] if fixed is None else [fixed]
    parts = np.prod([SHAPE[a] for a in pattern.split_axes(3, STACK_AXES)])
    run = quick_jit(functools.partial(choose, pattern))
    for level in levels:
        k = pattern.kept(SLICE, level)
        mask = np.asarray(run(np.int32(k), draw(0)))
        assert pooled(pattern, mask).sum(axis=(0, 2)).tolist() == [k, k]
        assert abs(k / pattern.units(SLICE) - (1 - level)) <= parts / pattern.units(SLICE)
    assert run._cache_size() == 1
    ends = {0.0: pattern.units(SLICE), 1.0: 0}
    assert all(pattern.kept(SLICE, x) == ends[x] for x in levels if x in ends)


@every_pattern
def test_units_hold_all_weights(pattern):
    sizes = np.broadcast_to(
        pattern.sizes(SHAPE, STACK_AXES), pooled(pattern, np.ones(SHAPE, bool)).shape
    )
    assert sizes.sum() == np.prod(SHAPE)
    assert sizes.size == 2 * pattern.units(SLICE)


@every_pattern
def test_the_largest_are_kept(pattern):
    scores = draw(1)
    mask = np.asarray(jitted(pattern)(scores))
    kept = np.where(mask, scores, 0).sum(axis=(0, 2))
    rest = np.where(mask, 0, scores).sum(axis=(0, 2))
    share = mask.mean(axis=(0, 2))
    assert (kept / share > rest / np.maximum(1 - share, 1e-9)).all()
    if pattern.searched:
        units, chosen = np.asarray(pattern.pool(scores, STACK_AXES)), pooled(pattern, mask)
        parts = (1, *pattern.split_axes(3, STACK_AXES))
        within = tuple(a for a in range(3) if a not in parts)
        smallest = np.where(chosen, units, np.inf).min(axis=within)
        assert (smallest >= np.where(chosen, -np.inf, units).max(axis=within)).all()


@every_pattern
def test_a_stack_is_as_its_slices(pattern):
    scores = draw(2)
    mask = np.asarray(jitted(pattern)(scores))
    alone = quick_jit(functools.partial(at_half(pattern), stack_axes=()))
    for i in range(2):
        np.testing.assert_array_equal(mask[:, i], alone(scores[:, i]))


@pytest.mark.slow
@every_pattern
def test_the_same_without_jit_and_in_every_dtype(pattern):
    scores = draw(3)
    mask = np.asarray(jitted(pattern)(scores))
    assert mask.dtype == bool and mask.shape == SHAPE
    np.testing.assert_array_equal(at_half(pattern)(jnp.asarray(scores)), mask)
    for dtype in ("bfloat16", "float16"):
        np.testing.assert_array_equal(jitted(pattern)(jnp.asarray(scores, dtype)), mask)


@every_pattern
def test_the_second_call_compiles_nothing(pattern):
    run = quick_jit(at_half(pattern))
    for seed in range(3):
        run(draw(seed))
    assert run._cache_size() == 1
    assert hash(pattern) == hash(type(pattern)(**vars(pattern)))


@every_pattern
def test_the_same_on_a_mesh(pattern):
    scores = draw(4)
    placed = put(mesh(2, 2), scores, "y", None, "x")
    program = jax.jit(at_half(pattern)).lower(placed).compile()
    np.testing.assert_array_equal(program(placed), jitted(pattern)(scores))
    # numbers of channels, neurons and slices
    apart = bool(pattern.split_axes(3, STACK_AXES))
    assert_moves_no_weight(program.as_text(), largest=128, gathers=apart)
