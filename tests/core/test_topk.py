import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, collectives, mesh, put, quick_jit
from selection_oracles import DTYPES, POOL, as_float64, oracle, random_scores

from t5x_sparsity.core import topk
from t5x_sparsity.core.topk import Count, joint_top_k_masks, top_k_mask, top_k_masks


@st.composite
def score_arrays(draw, shape, dtype):
    float_type, uint = DTYPES[dtype]
    size = int(np.prod(shape))
    if draw(st.booleans()):
        places = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
        bits = np.array(POOL[dtype], uint)[places % len(POOL[dtype])]
    else:
        length = size * np.dtype(uint).itemsize
        bits = np.frombuffer(draw(st.binary(min_size=length, max_size=length)), uint)
    return bits.view(float_type).reshape(shape)


@functools.cache
def compiled(stack_axes):
    return quick_jit(
        lambda scores, k, where: top_k_mask(scores, k, where=where, stack_axes=stack_axes)
    )


def kept(scores, k, where=None, stack_axes=()):
    scores = np.asarray(scores)
    where = np.ones(scores.shape, bool) if where is None else where
    return np.asarray(compiled(tuple(stack_axes))(scores, np.asarray(k, np.int32), where))


CASES = [
    ((11,), ()),
    ((4, 6), ()),
    ((3, 7), (0,)),
    ((5, 2, 3), (1,)),
    ((2, 3, 4), (0, 2)),
    ((2, 3, 2, 2), (1, 2)),
    ((3, 2, 2, 2), ()),
    ((2, 3), (0, 1)),
]


@pytest.mark.parametrize(
    "shape,stack_axes,dtype",
    [(*case, "float32") for case in CASES]
    + [(*case, dtype) for case in CASES[1:4] for dtype in ("bfloat16", "float16")],
)
def test_equals_a_stable_sort(shape, stack_axes, dtype):
    stacked = tuple(shape[a] for a in stack_axes)
    size = int(np.prod(shape)) // int(np.prod(stacked, initial=1))

    @given(st.data())
    @settings(max_examples=25)
    def check(data):
        scores = data.draw(score_arrays(shape, dtype))
        flags = data.draw(st.binary(min_size=scores.size, max_size=scores.size))
        share = data.draw(st.sampled_from([0, 128, 255]))
        where = (np.frombuffer(flags, np.uint8) >= share).reshape(shape) | (share == 0)
        number = int(np.prod(stacked, initial=1))
        k = data.draw(st.lists(st.integers(0, size + 2), min_size=number, max_size=number))
        k = np.array(k, np.int32).reshape(stacked)
        mask = kept(scores, k, where, stack_axes)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, oracle(scores, k, where, stack_axes))

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_k(dtype):
    scores = random_scores(np.random.default_rng(3), (5, 8), dtype)
    for k in range(43):
        np.testing.assert_array_equal(kept(scores, k), oracle(scores, k))


def test_by_hand():
    scores = np.array([[0.0, 3.0, -0.0], [3.0, -np.inf, np.nan]], np.float32)
    masks = [
        [[0, 0, 0], [0, 0, 0]],
        [[0, 1, 0], [0, 0, 0]],
        [[0, 1, 0], [1, 0, 0]],
        [[1, 1, 0], [1, 0, 0]],
        [[1, 1, 1], [1, 0, 0]],
        [[1, 1, 1], [1, 1, 0]],
        [[1, 1, 1], [1, 1, 1]],
        [[1, 1, 1], [1, 1, 1]],
    ]
    for k, mask in enumerate(masks):
        np.testing.assert_array_equal(kept(scores, k), np.array(mask, bool))


def test_indices_past_16_bits_settle_ties():
    scores = np.zeros((3, 70_000), np.float32)
    scores[1, 5] = 1
    k = 65_536 + 70_001
    np.testing.assert_array_equal(kept(scores, k), oracle(scores, k))


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537])
def test_ties_around_a_digit_of_the_index(size):
    scores = np.ones(size, np.float32)
    for k in (1, size - 1, size):
        mask = kept(scores, k)
        assert mask[:k].all() and not mask[k:].any()


def test_one_k_serves_all_slices_and_axes_count_from_the_end():
    scores = random_scores(np.random.default_rng(5), (3, 4, 5))
    for axes in [(0,), (-3,), (2, 0), (-1, -3)]:
        positive = tuple(sorted(a % 3 for a in axes))
        np.testing.assert_array_equal(
            kept(scores, 2, stack_axes=axes), oracle(scores, 2, None, positive)
        )


def test_a_number_per_slice_follows_the_order_of_the_axes():
    scores = random_scores(np.random.default_rng(6), (2, 5, 3))
    k = np.arange(6, dtype=np.int32).reshape(2, 3)
    np.testing.assert_array_equal(
        kept(scores, k, stack_axes=(0, 2)), oracle(scores, k, None, (0, 2))
    )


@pytest.mark.parametrize("k_dtype", [np.int8, np.uint8, np.int32, np.uint32])
def test_k_of_any_integer_dtype(k_dtype):
    scores = random_scores(np.random.default_rng(7), (20, 10))
    mask = quick_jit(top_k_mask)(scores, k_dtype(120))
    np.testing.assert_array_equal(mask, oracle(scores, 120))


def test_odd_shapes():
    assert kept(np.float32(3.0), 1).shape == ()
    assert kept(np.float32(np.nan), 1)
    assert not kept(np.float32(3.0), 0)
    assert kept(np.zeros((0, 4), np.float32), 2).shape == (0, 4)
    run = quick_jit(lambda scores: top_k_masks(scores, [2, 1]))
    empty, full = run([jnp.zeros((0, 4)), jnp.arange(3.0)])
    assert empty.shape == (0, 4) and full.tolist() == [False, False, True]
    assert top_k_masks([], []) == []
    assert joint_top_k_masks([], 3) == []


def test_several_tensors_in_one_search_do_not_mix():
    rng = np.random.default_rng(8)
    scores = [
        random_scores(rng, (4, 6), "float32"),
        random_scores(rng, (3, 5), "bfloat16"),
        random_scores(rng, (2, 7, 3), "float32"),
        random_scores(rng, (9,), "float16"),
        random_scores(rng, (4, 4), "bfloat16"),
    ]
    axes = [(), (0,), (1,), (), ()]
    where = [None, rng.random((3, 5)) < 0.6, None, rng.random(9) < 0.6, None]
    k = [7, np.array([0, 2, 5], np.int32), 3, 4, 40]
    run = quick_jit(lambda s, n, w: top_k_masks(s, n, where=w, stack_axes=axes))
    for found, s, n, w, a in zip(run(scores, k, where), scores, k, where, axes, strict=True):
        np.testing.assert_array_equal(found, oracle(s, n, w, a))


def joint_oracle(scores, k, where):
    flat = np.concatenate([as_float64(s).reshape(-1) for s in scores])
    free = np.concatenate(
        [
            np.ones(s.size, bool) if w is None else np.asarray(w).reshape(-1)
            for s, w in zip(scores, where, strict=True)
        ]
    )
    mask = oracle(flat, min(k, flat.size), free)
    ends = np.cumsum([s.size for s in scores])
    return [m.reshape(s.shape) for m, s in zip(np.split(mask, ends[:-1]), scores, strict=True)]


@pytest.mark.parametrize(
    "dtypes",
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "float16"),
    ],
)
def test_joint_search(dtypes):
    shapes = [(3, 5), (7,), (2, 2, 4)]
    run = quick_jit(lambda s, n, w: joint_top_k_masks(s, n, where=[w, None, None]))

    @given(st.data())
    def check(data):
        scores = [data.draw(score_arrays(s, d)) for s, d in zip(shapes, dtypes, strict=True)]
        where = np.array(data.draw(st.lists(st.booleans(), min_size=15, max_size=15)))
        where = where.reshape(3, 5)
        k = data.draw(st.integers(0, 40))
        found = run(scores, np.int32(k), where)
        for mask, expected in zip(found, joint_oracle(scores, k, [where, None, None]), strict=True):
            np.testing.assert_array_equal(mask, expected)

    check()


def test_joint_ties_go_to_the_earlier_tensor():
    run = quick_jit(joint_top_k_masks)
    masks = run([jnp.zeros(3), jnp.ones(2), jnp.zeros(4)], 6)
    assert [m.tolist() for m in masks] == [
        [True] * 3,
        [True] * 2,
        [True, False, False, False],
    ]


def test_joint_k_past_31_bits():
    run = quick_jit(lambda k: joint_top_k_masks([jnp.zeros(3), jnp.ones((2, 2))], k))
    for k in (5 * 2**31, 2**40):
        assert all(bool(m.all()) for m in run(Count.of(k)))
    assert [int(m.sum()) for m in run(Count.of(5))] == [1, 4]
    found = quick_jit(lambda s: joint_top_k_masks(s, 5 * 2**31))([jnp.zeros(3), jnp.ones(2)])
    assert all(bool(m.all()) for m in found)


# ---- errors


def test_errors():
    with pytest.raises(TypeError, match="float32, bfloat16, float16, got int32; cast them"):
        top_k_mask(jnp.ones(4, jnp.int32), 2)
    with pytest.raises(TypeError, match="got float8_e4m3fn"):
        joint_top_k_masks([jnp.ones(4, jnp.float8_e4m3fn)], 2)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        top_k_mask(jnp.ones(4), -1)
    with pytest.raises(TypeError, match="must be an integer, got float32"):
        top_k_mask(jnp.ones(4), jnp.float32(2))
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"shape \(65536, 32768\) spans 2\*\*31 weights or more"):
        jax.eval_shape(lambda s: top_k_mask(s, 5), huge)
    sliced = jax.eval_shape(lambda s: top_k_mask(s, 5, stack_axes=(0,)), huge)
    assert sliced.shape == huge.shape


# ---- meshes

SHARDED = {
    "rows": (("x",), (None, "x", None), ("x", None)),
    "columns": ((None, "y"), (None, None, "y"), (None, ("x", "y"))),
    "both and stacked": (("x", "y"), ("x", None, "y"), (("x", "y"),)),
}


@functools.cache
def mesh_case():
    rng = np.random.default_rng(11)
    scores = (
        random_scores(rng, (64, 48)),
        random_scores(rng, (4, 16, 40)),
        random_scores(rng, (32, 64), "bfloat16"),
    )
    where = rng.random((64, 48)) < 0.7
    k = (np.int32(600), np.array([0, 17, 640, 200], np.int32), np.int32(1024))
    masks = (
        oracle(scores[0], k[0], where),
        oracle(scores[1], k[1], None, (0,)),
        oracle(scores[2], k[2]),
        *joint_oracle(scores[:2], 2000, [where, None]),
    )
    return scores, where, k, masks


@jax.jit
def on_mesh(scores, where, k):
    apart = top_k_masks(scores, k, where=[where, None, None], stack_axes=[(), (0,), ()])
    together = joint_top_k_masks(scores[:2], 2000, where=[where, None])
    return *apart, *together


@pytest.mark.parametrize("specs", SHARDED)
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 2), (2, 4)], ids=str
)
def test_the_same_bit_for_bit_on_meshes_and_nothing_moves(shape, specs):
    scores, where, k, masks = mesh_case()
    devices = mesh(*shape)
    layout = SHARDED[specs]
    placed = tuple(put(devices, s, *spec) for s, spec in zip(scores, layout, strict=True))
    args = placed, put(devices, where, *layout[0]), k
    program = on_mesh.lower(*args).compile()
    for found, expected in zip(program(*args), masks, strict=True):
        np.testing.assert_array_equal(found, expected)
    text = program.as_text()
    # the numbers of one slice a tensor and of four, at most, in one vector
    assert_moves_no_weight(text, largest=6, gathers=specs == "both and stacked")
    if specs == "rows" or shape != (2, 1):
        assert collectives(text, "all-reduce")  # the check has seen the search


def test_on_one_device_there_is_no_sort():
    scores, where, k, masks = mesh_case()
    program = on_mesh.lower(scores, where, k).compile()
    for found, expected in zip(program(scores, where, k), masks, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert_moves_no_weight(program.as_text(), largest=0)


def test_strict_promotion_and_any_float_order():
    with jax.numpy_dtype_promotion("strict"):
        scores = random_scores(np.random.default_rng(13), (6, 6))
        np.testing.assert_array_equal(quick_jit(top_k_mask)(scores, 9), oracle(scores, 9))
    keys = topk.ordered_keys(jnp.array([jnp.nan, -jnp.inf, -1.0, -0.0, 0.0, 1e-45, 1.0]))
    keys = np.asarray(keys).astype(np.int64)
    assert keys[0] > 0 and keys[3] == keys[4]
    assert (np.diff(keys)[[0, 1, 2, 4, 5]] > 0).all()
