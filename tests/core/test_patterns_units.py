"""Patterns whose units are blocks, channels or the weights of a neuron, and the joint selection."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, mesh, put, quick_jit
from selection_oracles import chosen, group_oracle

from t5x_sparsity.algorithms.lamp import lamp_masks
from t5x_sparsity.core.patterns import Block, Channel, ConstantFanIn, NByM, Unstructured
from t5x_sparsity.core.selection import Choice, select_jointly, select_masks
from t5x_sparsity.core.topk import Count


def unit_ids(pattern, shape):
    """For every weight of a slice, the number of its unit, in the order of units."""
    at = np.indices(shape)
    if isinstance(pattern, Channel):
        return at[pattern.axis]
    if isinstance(pattern, Block):
        height, width = pattern.height or shape[-2], pattern.width or shape[-1]
        wide = math.ceil(shape[-1] / width)
        block = at[-2] // height * wide + at[-1] // width
        lead = np.ravel_multi_index(tuple(at[:-2]), shape[:-2]) if shape[:-2] else 0
        return lead * (wide * math.ceil(shape[-2] / height)) + block
    return np.arange(math.prod(shape)).reshape(shape)


def unit_scores(pattern, scores, ids):
    """The score of every unit, in float64; NaN where one of its weights is."""
    parts = [np.abs(scores[ids == u].astype(np.float64)) for u in range(ids.max() + 1)]
    if isinstance(pattern, Block):
        return [p.mean() if pattern.pooling == "mean" else p.max() for p in parts]
    return [p.sum() for p in parts] if isinstance(pattern, Channel) else scores.ravel()


def by_slice(shape, stack_axes):
    """The index of every slice, with its place in the stack."""
    for at in np.ndindex(*(shape[a] for a in stack_axes)):
        index = [slice(None)] * len(shape)
        for axis, i in zip(stack_axes, at, strict=True):
            index[axis] = i
        yield at, tuple(index)


def best(scores, k, keep, where):
    """Units kept in any case, and the best of the others up to k; of equals the lower index."""
    others = [
        (np.isnan(s), -s if s == s else 0, i)
        for i, s in enumerate(scores)
        if where[i] and not keep[i]
    ]
    mask = keep.copy()
    mask[[i for *_, i in sorted(others)[: max(k - keep.sum(), 0)]]] = True
    return mask


def unit_oracle(pattern, scores, k, keep, where, stack_axes):
    mask = np.zeros(scores.shape, bool)
    for at, index in by_slice(scores.shape, stack_axes):
        parts = [(index, k[at])]
        if isinstance(pattern, ConstantFanIn):
            last = next(a for a in reversed(range(scores.ndim)) if a not in stack_axes)
            neurons = scores.shape[last]
            parts = [
                (tuple(j if a == last else i for a, i in enumerate(index)), k[at] // neurons)
                for j in range(neurons)
            ]
        for part, number in parts:
            ids = unit_ids(pattern, scores[part].shape)
            marked = [
                np.array([m[part][ids == u].any() for u in range(ids.max() + 1)])
                for m in (keep, where)
            ]
            found = best(unit_scores(pattern, scores[part], ids), number, *marked)
            mask[part] = found[ids]
    return mask


UNIT_CASES = [
    (Block(height=2, width=2), (4, 6), ()),
    (Block(height=2, width=3), (5, 7), ()),
    (Block(height=3, width=2, pooling="max"), (5, 3, 7), (1,)),
    (Block(height=4, width=1), (2, 3, 6, 2), (1,)),
    (Block(height=0, width=2), (3, 4, 5), (0,)),
    (Block(height=2, width=0, pooling="max"), (4, 5, 3), (2,)),
    (Block(height=1, width=1), (2, 3, 2, 2), (0, 3)),
    (Channel(), (4, 5), ()),
    (Channel(axis=-2), (4, 3, 5), (1,)),
    (Channel(axis=0), (2, 4, 2, 3), (0,)),
    (Channel(axis=1), (3, 4, 2), ()),
    (ConstantFanIn(), (6, 4), ()),
    (ConstantFanIn(), (3, 4, 2, 3), (1,)),
    (ConstantFanIn(), (5, 3, 2), (2,)),
]


@pytest.mark.parametrize("pattern,shape,stack_axes", UNIT_CASES, ids=str)
def test_equals_an_oracle(pattern, shape, stack_axes):
    slice_shape = tuple(n for a, n in enumerate(shape) if a not in stack_axes)
    stacked = tuple(shape[a] for a in stack_axes)
    units = unit_ids(pattern, slice_shape).max() + 1
    assert pattern.units(slice_shape) == units

    @given(st.integers(0, 2**32 - 1), st.sampled_from([0, 0.1, 0.5]), st.booleans(), st.booleans())
    @settings(max_examples=15)
    def check(seed, kept, barred, nan):
        rng = np.random.default_rng(seed)
        # few values, so that there are ties, of sums and means too; all of them exact in float32
        scores = rng.integers(-3, 4, shape).astype(np.float32)
        if nan:
            scores[rng.random(shape) < 0.1] = np.nan
        keep = rng.random(shape) < kept
        where = rng.random(shape) < (0.6 if barred else 2)
        k = rng.integers(0, units + 2, stacked)
        mask = chosen(pattern, scores, k, keep, where, stack_axes)
        expected = unit_oracle(pattern, scores, np.asarray(k), keep, where, stack_axes)
        np.testing.assert_array_equal(mask, expected)

    check()


@pytest.mark.parametrize("pattern,shape,stack_axes", UNIT_CASES, ids=str)
def test_units_sizes_and_back(pattern, shape, stack_axes):
    """Sizes are those of the units, and expanding gives each weight its unit's mark."""
    mask = np.random.default_rng(1).random(shape) < 0.2
    pooled = np.asarray(pattern.pool_mask(jnp.asarray(mask), stack_axes))
    assert pooled.ndim == len(shape)
    assert [pooled.shape[a] for a in stack_axes] == [shape[a] for a in stack_axes]
    sizes = np.broadcast_to(pattern.sizes(shape, stack_axes), pooled.shape)
    back = np.asarray(pattern.expand(jnp.asarray(pooled), shape, stack_axes))
    assert back.shape == shape
    for _, index in by_slice(shape, stack_axes):
        ids = unit_ids(pattern, mask[index].shape)
        marked = np.array([mask[index][ids == u].any() for u in range(ids.max() + 1)])
        np.testing.assert_array_equal(pooled[index].ravel(), marked)
        np.testing.assert_array_equal(sizes[index].ravel(), np.bincount(ids.ravel()))
        np.testing.assert_array_equal(back[index], marked[ids])


def test_blocks_by_hand():
    scores = np.array([[1, 9, 4], [1, 1, 4], [5, -5, 6]], np.float32)
    # means: 3 and 4, and of the ragged edge 5 and 6
    means = Block(height=2, width=2)
    assert chosen(means, scores, 2).astype(int).tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert chosen(means, scores, 3).astype(int).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]
    # the largest: 9 and 4, 5 and 6
    largest = Block(height=2, width=2, pooling="max")
    assert chosen(largest, scores, 2).astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    # equal blocks: the lower one stays
    same = np.ones((2, 4), np.float32)
    assert chosen(Block(height=2, width=2), same, 1).astype(int).tolist() == [[1, 1, 0, 0]] * 2
    rows = Block(height=1, width=0)  # sums 14, 6, 16
    assert chosen(rows, scores, 1).astype(int).tolist() == [[0] * 3, [0] * 3, [1] * 3]


def test_channels_and_fan_in_by_hand():
    scores = np.array([[1, -9, 4], [2, 1, 5], [0, 0, 2]], np.float32)
    # sums of columns: 3, 10, 11; of rows: 14, 8, 2
    assert chosen(Channel(), scores, 2).astype(int).tolist() == [[0, 1, 1]] * 3
    assert chosen(Channel(axis=-2), scores, 2).astype(int).tolist() == [[1] * 3, [1] * 3, [0] * 3]
    assert chosen(Channel(axis=0), scores, 1).astype(int).tolist() == [[1] * 3, [0] * 3, [0] * 3]
    # ConstantFanIn chooses by the scores as they are: two of every column, then one
    found = chosen(ConstantFanIn(), scores, 6)
    assert found.astype(int).tolist() == [[1, 0, 1], [1, 1, 1], [0, 1, 0]]
    assert chosen(ConstantFanIn(), scores, 3).astype(int).tolist() == [
        [0, 0, 0],
        [1, 1, 1],
        [0] * 3,
    ]


def test_levels():
    assert Block(height=2, width=3).kept((5, 7), 0.5) == round(9 * 0.5)
    assert Block(height=2, width=3).units((4, 5, 7)) == 4 * 9
    assert Channel(axis=-2).kept((10, 3), 0.75) == 2
    # as many a neuron, at least one
    for sparsity, k in [(0, 8), (0.5, 4), (0.8, 2), (0.99, 1), (1, 0)]:
        assert ConstantFanIn().kept((4, 2, 5), sparsity) == 5 * k
    for pattern in (Block(height=1, width=2), Channel(), ConstantFanIn()):
        assert pattern.fixed_level is None
        assert pattern.kept((6, 8), 1) == 0 and pattern.kept((6, 8), 0.9999) >= 1
    for pattern in (Block(height=1, width=2), Channel()):
        assert pattern.relaxed == pattern
    assert ConstantFanIn().relaxed == Unstructured()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Block(height=-1, width=2), "Block.height must be an integer of .* got -1"),
        (
            lambda: Block(height=2, width=2.0),
            "Block.width must be .* 0 for the whole axis, got 2.0",
        ),
        (lambda: Block(height=True, width=2), "Block.height must be .* got True"),
        (lambda: Block(height=1, width=1, pooling="sum"), "'mean' or 'max', got 'sum'"),
        (
            lambda: Block(height=5, width=2).validate((3, 4, 8)),
            r"Block.height is 5, but a slice of shape \(3, 4, 8\) has 4; choose a smaller block",
        ),
        (lambda: Block(height=0, width=9).validate((4, 8)), "Block.width is 9, .* has 8"),
        (lambda: Channel(axis=2).validate((4, 4)), r"Channel axis 2 is not an axis .* \(4, 4\)"),
        (lambda: Channel(axis=-3).validate((4, 4)), "Channel axis -3 is not an axis"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patterns_that_fit():
    for pattern in (Block(height=4, width=8), Block(height=0, width=0), Channel(axis=-2)):
        pattern.validate((4, 8))
    ConstantFanIn().validate((4, 8))


# ---- all weights together

JOINT = {
    "blocks": (Block(height=2, width=3), (5, 2, 7), (1,)),  # of 6, 3, 2 and 1 weights
    "channels": (Channel(axis=0), (3, 4), ()),
    "groups": (NByM(n=1, m=2, axis=-1), (2, 6), ()),
    "maxima": (Block(height=2, width=2, pooling="max"), (3, 4), ()),
    "weights": (Unstructured(), (2, 5), (0,)),
}
# each searched as one stack with the one that it is like, and ties go by this order all the same
JOINT |= {f"{p} too": JOINT[p] for p in ("weights", "blocks", "channels")}


def units_of(pattern, shape, stack_axes):
    """unit_ids over the whole weight, in flat order of the pooled array."""
    pooled = jax.eval_shape(
        lambda s: pattern.pool(s, stack_axes), jax.ShapeDtypeStruct(shape, jnp.float32)
    ).shape
    order = np.arange(math.prod(pooled)).reshape(pooled)
    ids = np.zeros(shape, int)
    for _, index in by_slice(shape, stack_axes):
        ids[index] = order[index].ravel()[unit_ids(pattern, ids[index].shape)]
    return ids


def joint_oracle(scores, k, where):
    """Units from the best on, of all weights but 'groups', until they hold k weights."""
    ids = {p: units_of(*JOINT[p]) for p in scores if p != "groups"}
    units = []
    for number, (path, unit) in enumerate(ids.items()):
        pooled = unit_scores(JOINT[path][0], scores[path], unit)
        for u in range(unit.max() + 1):
            if where[path][unit == u].any():
                score = pooled[u]
                units.append((np.isnan(score), -score if score == score else 0, number, u, path))
    masks = {p: np.zeros(s.shape, bool) for p, s in scores.items()}
    kept, last = 0, 0
    for *_, u, path in sorted(units):
        if kept >= k:
            break
        masks[path] |= ids[path] == u
        last = (ids[path] == u).sum()
        kept += last
    masks["groups"] = group_oracle(scores["groups"], 1, 2, -1, where=where["groups"])
    return masks, kept, last


@functools.cache
def joint():
    def run(scores, k, where):
        return select_jointly(
            {
                p: Choice(JOINT[p][0], scores[p], 6, JOINT[p][2], where[p], sharding="axes")
                for p in ("groups", *(p for p in JOINT if p != "groups"))
            },
            k,
        )

    return quick_jit(run)


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.integers(0, 220), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_jointly_by_units_of_several_sizes(seed, k, barred, nan):
    rng = np.random.default_rng(seed)
    scores = {p: rng.integers(-3, 4, c[1]).astype(np.float32) for p, c in JOINT.items()}
    if nan:
        scores = {p: np.where(rng.random(s.shape) < 0.05, np.nan, s) for p, s in scores.items()}
        scores = {p: s.astype(np.float32) for p, s in scores.items()}
    where = {p: rng.random(s.shape) < (0.6 if barred else 2) for p, s in scores.items()}
    found = joint()(scores, np.int32(k), where)
    expected, kept, last = joint_oracle(scores, k, where)
    for path in JOINT:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    total = sum(int(found[p].sum()) for p in JOINT if p != "groups")
    everything = sum(s.size for p, s in scores.items() if p != "groups")
    assert total == kept
    if k and not barred:
        assert min(k, everything) <= total < k + last


@given(st.integers(0, 2**32 - 1), st.integers(0, 50))
@settings(max_examples=20)
def test_lamp_scores_of_stacks_are_those_of_each(seed, k):
    rng = np.random.default_rng(seed)
    shapes = {"a": (2, 6), "b": (4, 3), "c": (2, 6), "d": (2, 6)}
    scores = {p: rng.integers(0, 5, s).astype(np.float32) for p, s in shapes.items()}
    where = {p: rng.random(s) < 0.8 for p, s in shapes.items()}
    apart, stacked = (lamp(sharding)(scores, where, np.int32(k)) for sharding in (None, "axes"))
    for p in shapes:
        np.testing.assert_array_equal(apart[p], stacked[p])


@functools.cache
def lamp(sharding):
    def run(scores, where, k):
        choices = {
            p: Choice(Unstructured(), x, 0, (0,) if p == "c" else (), where[p], sharding=sharding)
            for p, x in scores.items()
        }
        return select_jointly(choices, k, search=lamp_masks)

    return quick_jit(run)


def test_jointly_by_hand():
    choices = {
        "a": Choice(Block(height=1, width=2), jnp.array([[1.0, 3, 2, 2, 9]]), 0),  # 2, 2, 9
        "b": Choice(Unstructured(), jnp.array([[2.0, 8]]), 0),
        "c": Choice(NByM(n=1, m=2, axis=-1), jnp.array([[1.0, 0]]), 1),
    }
    run = quick_jit(lambda k: select_jointly(choices, k))
    for k, a, b in [
        (0, [0, 0, 0, 0, 0], [0, 0]),
        (1, [0, 0, 0, 0, 1], [0, 0]),
        (2, [0, 0, 0, 0, 1], [0, 1]),
        (3, [1, 1, 0, 0, 1], [0, 1]),  # a block of two, of which one is asked for
        (4, [1, 1, 0, 0, 1], [0, 1]),
        (6, [1, 1, 1, 1, 1], [0, 1]),
        (7, [1, 1, 1, 1, 1], [1, 1]),
        (99, [1, 1, 1, 1, 1], [1, 1]),
    ]:
        found = run(k)
        assert found["a"].astype(int).tolist() == [a] and found["b"].astype(int).tolist() == [b]
        assert found["c"].tolist() == [[True, False]]
    alone = quick_jit(lambda k: select_jointly({"c": choices["c"]}, Count.of(k)))(0)
    assert alone["c"].tolist() == [[True, False]]
    assert select_jointly({}, 3) == {}


def test_jointly_refuses_what_chooses_part_by_part():
    choices = {
        "a": Choice(Unstructured(), jnp.ones((2, 2)), 1),
        "b": Choice(ConstantFanIn(), jnp.ones((2, 2)), 2),
    }
    with pytest.raises(
        ValueError,
        match=r"ConstantFanIn\(\) chooses part by part, and can't have one threshold over all "
        r"layers, but the weights \['b'\] have it; give them another pattern or algorithm",
    ):
        select_jointly(choices, 3)


@pytest.mark.slow
def test_equal_units_tie_on_every_mesh():
    """Units of the same terms in another order are equal, whatever devices add them up."""
    rng = np.random.default_rng(4)
    terms = (rng.normal(size=32) * np.exp2(rng.integers(-12, 0, 32))).astype(np.float32)
    rows = np.stack([rng.permutation(terms) for _ in range(64)])
    assert len({float(np.add.accumulate(np.abs(r))[-1]) for r in rows}) > 1  # a float sum differs
    # as blocks of 8 x 4: 8 by 8 of them
    blocks = rows.reshape(8, 8, 8, 4).transpose(0, 2, 1, 3).reshape(64, 32)

    @jax.jit
    def run(rows, blocks, more):
        apart = select_masks(
            {
                "rows": Choice(Channel(axis=-2), rows, 20),
                "blocks": Choice(Block(height=8, width=4), blocks, 13),
            }
        )
        together = {
            "rows": Choice(Channel(axis=-2), rows, 0),
            "more rows": Choice(Channel(axis=-2), more, 0),
        }
        return apart, select_jointly(together, 70 * 32)

    for devices, spec in [(mesh(2, 2), ("x", "y")), (mesh(1, 8), (None, "y")), (None, None)]:
        placed = [put(devices, s, *spec) if devices else s for s in (rows, blocks, rows[::-1])]
        program = run.lower(*placed).compile()
        apart, together = program(*placed)
        # the first ones, as all are equal
        assert np.asarray(apart["rows"]).all(axis=1).tolist() == [True] * 20 + [False] * 44
        kept = np.asarray(apart["blocks"])
        assert kept[:8].all() and kept[8:16, :20].all() and kept.sum() == 13 * 32
        assert together["rows"].all()
        assert np.asarray(together["more rows"]).all(axis=1).tolist() == [True] * 6 + [False] * 58
        assert_moves_no_weight(program.as_text(), largest=64)


def test_a_joint_search_on_a_mesh():
    rng = np.random.default_rng(5)
    scores = [rng.normal(size=(64, 32)).astype(np.float32) for _ in range(3)]
    patterns = [Block(height=5, width=3), Channel(axis=-2), Unstructured()]

    @jax.jit
    def run(scores):
        choices = [Choice(p, s, 0) for p, s in zip(patterns, scores, strict=True)]
        return select_jointly({str(i): c for i, c in enumerate(choices)}, 1500)

    placed = [put(mesh(2, 2), s, "x", "y") for s in scores]
    for found, expected in zip(run(placed).values(), run(scores).values(), strict=True):
        np.testing.assert_array_equal(found, expected)
