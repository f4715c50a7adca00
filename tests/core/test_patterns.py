import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, mesh, put, quick_jit
from selection_oracles import chosen, group_oracle, oracle, random_scores

from t5x_sparsity.core.patterns import Channel, NByM, Unstructured
from t5x_sparsity.core.selection import Choice, select_masks


def target(pattern, shape, stack_axes=(), sparsity=0.5):
    """Units of a slice that the pattern keeps."""
    return pattern.kept([n for a, n in enumerate(shape) if a not in stack_axes], sparsity)


NM_CASES = [
    (NByM(n=2, m=4), (8, 3), ()),
    (NByM(n=1, m=4, axis=-1), (3, 8), ()),
    (NByM(n=2, m=3, axis=0), (6, 5), ()),
    (NByM(n=3, m=4, axis=-2), (4, 2, 3), (1,)),
    (NByM(n=1, m=2), (2, 4, 3, 2), (0, 2)),
    (NByM(n=4, m=8, axis=1), (3, 16, 2), (2,)),
    (NByM(n=2, m=2), (4, 3), ()),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern,shape,stack_axes", NM_CASES)
def test_n_by_m_equals_a_sort_of_every_group(pattern, shape, stack_axes, dtype):
    @given(st.integers(0, 2**32 - 1), st.booleans())
    @settings(max_examples=10)
    def check(seed, ties):
        scores = random_scores(np.random.default_rng(seed), shape, dtype, ties)
        mask = chosen(pattern, scores, target(pattern, shape, stack_axes), stack_axes=stack_axes)
        expected = group_oracle(scores, pattern.n, pattern.m, pattern.axis, stack_axes=stack_axes)
        np.testing.assert_array_equal(mask, expected)
        assert mask.sum() == mask.size // pattern.m * pattern.n

    check()


@pytest.mark.parametrize("pattern,shape,stack_axes", NM_CASES[:5])
def test_n_by_m_with_keep_and_where(pattern, shape, stack_axes):
    k = target(pattern, shape, stack_axes)
    groups = k // pattern.n

    @given(st.integers(0, 2**32 - 1), st.integers(-pattern.n * groups, groups * pattern.m))
    @settings(max_examples=15)
    def check(seed, more):
        rng = np.random.default_rng(seed)
        scores = rng.integers(-2, 3, shape).astype(np.float32)
        keep = group_oracle(
            rng.random(shape), pattern.n, pattern.m, pattern.axis, stack_axes=stack_axes
        )
        keep &= rng.random(shape) < 0.5
        where = rng.random(shape) < 0.5
        for now in (k, min(max(k + more, 0), groups * pattern.m)):
            n = -(-now // groups)  # as many of every group, rounded up
            mask = chosen(pattern, scores, now, keep, where, stack_axes)
            expected = group_oracle(scores, n, pattern.m, pattern.axis, keep, where, stack_axes)
            np.testing.assert_array_equal(mask, expected)
            if n >= pattern.n:
                assert (mask >= keep).all()
            assert not (mask & ~keep & ~where).any()

    check()


def test_n_by_m_on_the_way_to_its_level():
    pattern = NByM(n=1, m=4)
    scores = np.array([[4, 1], [3, 2], [2, 3], [1, 4]], np.float32)  # two groups
    for k, n in [(0, 0), (1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (7, 4), (8, 4)]:
        mask = chosen(pattern, scores, k)
        np.testing.assert_array_equal(mask, group_oracle(scores, n, 4, 0))
        assert mask.sum() == 2 * n


def test_n_by_m_with_a_number_a_slice():
    rng = np.random.default_rng(5)
    pattern = NByM(n=2, m=4)
    scores = random_scores(rng, (3, 8, 2, 5))
    k = np.arange(6).reshape(3, 2) * 10  # of 10 groups a slice
    mask = chosen(pattern, scores, k, stack_axes=(0, 2))
    for i, j in np.ndindex(3, 2):
        expected = group_oracle(scores[i, :, j], min(k[i, j] // 10, 4), 4, 0)
        np.testing.assert_array_equal(mask[i, :, j], expected)


def test_two_four_by_hand():
    scores = np.array([[1, 5], [-2, 5], [3, 5], [3, 5], [0, 1], [0, np.nan], [0, 2], [0, -9]])
    kept = [[0, 1], [0, 1], [1, 0], [1, 0], [1, 1], [1, 0], [0, 1], [0, 0]]
    mask = chosen(NByM(n=2, m=4), scores.astype(np.float32), 8)
    np.testing.assert_array_equal(mask, np.array(kept, bool))
    infinite = np.array([[-np.inf], [np.nan], [np.inf], [-np.inf]], np.float32)
    mask = chosen(NByM(n=2, m=4), infinite, 2)
    assert mask[:, 0].tolist() == [True, False, True, False]


def test_unstructured_completes_what_is_kept():
    rng = np.random.default_rng(2)
    scores = random_scores(rng, (3, 6, 5))
    keep = rng.random((3, 6, 5)) < 0.2
    where = rng.random((3, 6, 5)) < 0.8
    for k in (0, 4, 15, 31):
        mask = chosen(Unstructured(), scores, k, keep, where, stack_axes=(0,))
        for i in range(3):
            missing = max(k - int(keep[i].sum()), 0)
            grown = oracle(scores[i], missing, where[i] & ~keep[i])
            np.testing.assert_array_equal(mask[i], keep[i] | grown)


def test_mixed_patterns_in_one_selection():
    rng = np.random.default_rng(3)
    scores = {
        "a": random_scores(rng, (8, 6)),
        "b": rng.normal(size=(8, 6)).astype(np.float32),
        "c": random_scores(rng, (2, 5, 4), "bfloat16"),
    }
    patterns = {"a": Unstructured(), "b": NByM(n=2, m=4), "c": Unstructured()}

    @quick_jit
    def run(scores):
        return select_masks(
            {
                path: Choice(patterns[path], x, 24 if path == "b" else 7, (0,) * (path == "c"))
                for path, x in scores.items()
            }
        )

    masks = run(scores)
    np.testing.assert_array_equal(masks["a"], oracle(scores["a"], 7))
    np.testing.assert_array_equal(masks["b"], group_oracle(scores["b"], 2, 4, -2))
    np.testing.assert_array_equal(masks["c"], oracle(scores["c"], 7, None, (0,)))
    assert list(select_masks({})) == []


@pytest.mark.parametrize("spec", [("x",), (None, "y"), ("y", "x")], ids=str)
def test_n_by_m_on_a_mesh(spec):
    pattern = NByM(n=2, m=4)
    scores = random_scores(np.random.default_rng(4), (64, 32))
    devices = mesh(2, 2)
    run = jax.jit(lambda s: select_masks({"w": Choice(pattern, s, 64 * 32 // 2)})["w"])
    placed = put(devices, scores, *spec)
    program = run.lower(placed).compile()
    np.testing.assert_array_equal(program(placed), group_oracle(scores, 2, 4, 0))
    # groups need nothing of each other; one number is what settles the scores
    assert_moves_no_weight(program.as_text(), largest=1)


def test_levels_and_counts():
    whole = Unstructured()
    assert whole.fixed_level is None
    assert [whole.kept((10, 10), s) for s in (0, 0.804, 0.99, 0.999, 1)] == [100, 20, 1, 1, 0]
    assert whole.kept((3, 7), 0.5) == 10
    half = NByM(n=2, m=4)
    assert half.fixed_level == 0.5
    assert half.kept((8, 6), 0.9) == 24
    assert half.relaxed == whole.relaxed == whole


class HalfOfTheChannels(Channel):
    """A user's own pattern, with a level of its own, whose units are searched for."""

    fixed_level = 0.5

    def kept(self, shape, sparsity):
        return shape[self.axis] // 2


def test_a_pattern_of_fixed_level_may_be_searched_all_the_same():
    scores = np.arange(24, dtype=np.float32).reshape(4, 6)
    pattern = HalfOfTheChannels()
    assert (pattern.searched, NByM(n=1, m=2).searched) == (True, False)
    mask = chosen(pattern, scores, target(pattern, (4, 6)))
    assert mask.tolist() == [[False] * 3 + [True] * 3] * 4


def test_errors():
    for n, m in [(0, 4), (5, 4), (-1, 2)]:
        with pytest.raises(ValueError, match=f"0 < n <= m, got n={n}, m={m}"):
            NByM(n=n, m=m)
    with pytest.raises(ValueError, match=r"2:4 needs axis -2 .* multiple of 4, but it has 6 of"):
        NByM(n=2, m=4).validate((6, 8))
    with pytest.raises(ValueError, match=r"axis 2 is not an axis of a slice of shape \(4, 4\)"):
        NByM(n=2, m=4, axis=2).validate((4, 4))
    NByM(n=2, m=4).validate((8, 6))
    with pytest.raises(TypeError, match="scores must be one of .* got int32"):
        select_masks({"w": Choice(NByM(n=1, m=2), jnp.ones((2, 2), jnp.int32), 0)})
