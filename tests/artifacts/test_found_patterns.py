"""What is found of zeros, against loops over matrices, and against the patterns that made them."""

import functools
import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from meshes import quick_jit

import t5x_sparsity as ts
from t5x_sparsity.artifacts import structure
from t5x_sparsity.artifacts.checkpoint import sparsity
from t5x_sparsity.artifacts.found_patterns import PatternFinder
from t5x_sparsity.artifacts.structure import KeptBits
from t5x_sparsity.core.matrix_axes import MatrixAxes, matrix_axes
from t5x_sparsity.core.selection import Choice, select_masks


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    """Matrices of a test are of several bands, too."""
    monkeypatch.setattr(structure, "_BAND", 16)


def find(*slices, output_axes=1, expected=None):
    axes = range(slices[0].ndim)
    matrix = MatrixAxes(stack=(), inputs=axes[:-output_axes], outputs=axes[-output_axes:])
    finder = PatternFinder(matrix, expected)
    for mask in slices:
        bits = KeptBits(mask.shape, output_axes)
        bits.add(np.asarray(mask, bool))
        finder.add(bits)
    return SimpleNamespace(**finder.result())


def matrix(text):
    """A mask drawn with # and ."""
    return np.array([[c == "#" for c in row] for row in text.split()])


# by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drawn", "pattern", "dead"),
    [
        ("#### ####", "dense", (0, 0)),
        (".... ....", "all zero", (2, 4)),
        ("#.#. #.#. #.#.", "whole channels", (0, 2)),
        ("#.#. .... #.#.", "whole channels", (1, 2)),
        # every 2 rows hold exactly one of a column; and so has every output two
        ("##.. ..## #.#. .#.#", "1:2 along inputs; constant fan-out 2", (0, 0)),
        ("#.#. .#.# #.## .#..", "1:2 along inputs", (0, 0)),
        ("##.. ##.. ..## ..##", "blocks 2x2; constant fan-in 2; constant fan-out 2", (0, 0)),
        (
            "##.... ##.... ..##.. ..##..",
            "blocks 2x2; constant fan-in 2; constant fan-out 2",
            (0, 2),
        ),
        ("###. ###. ##.# ##.#", "blocks 2x1; constant fan-out 3", (0, 0)),
        ("#.# ##. .##", "constant fan-in 2; constant fan-out 2", (0, 0)),
        # an ablated output doesn't count
        ("#.#. ##.. .##.", "constant fan-in 2; constant fan-out 2", (0, 1)),
        ("##.# #.## .##. .#.#", "unstructured", (0, 0)),
        ("###. #.## ##.# .##.", "unstructured", (0, 0)),
        ("#", "dense", (0, 0)),
        (".#", "unstructured", None),
        ("#.#.", "1:2 along outputs", None),
    ],
)
def test_by_hand(drawn, pattern, dead):
    found = find(matrix(drawn))
    assert found.pattern == pattern
    if dead is not None:
        assert (found.dead_rows, found.dead_columns) == dead
    mask = matrix(drawn)
    assert (found.size, found.kept) == (mask.size, mask.sum())
    assert sparsity(found.kept, found.size) == 1 - mask.mean()


def test_the_tightest_n_by_m_is_found():
    group = matrix("#.# .#. .## #..")
    mask = np.concatenate([group, group[::-1], group])
    assert find(mask).n_by_m_inputs == (1, 2)
    mask = np.concatenate([matrix("##. .## #.. ..#"), matrix(".#. #.# ##. ..#")])
    found = find(mask)
    assert found.n_by_m_inputs == (2, 4) and found.n_by_m_outputs is None
    assert found.pattern == "2:4 along inputs" and found.at_most_2_4_inputs
    # a group with one less: no longer exact, but still fit for sparse tensor cores
    mask[0, 0] = False
    found = find(mask)
    assert found.n_by_m_inputs is None and found.at_most_2_4_inputs
    assert found.pattern == "unstructured, at most 2:4 along inputs"


def test_a_pattern_holds_in_every_slice_or_in_none():
    two_of_four = matrix("##. .## #.. ..# .#. #.# ##. ..#")
    one_of_two = matrix("##. ..# #.. .## .#. #.# ##. ..#")
    other = matrix("### #.# #.. ..# .#. #.# ##. ..#")
    assert find(one_of_two).n_by_m_inputs == (1, 2)
    assert find(one_of_two, two_of_four).n_by_m_inputs == (2, 4)
    assert find(two_of_four, one_of_two).n_by_m_inputs == (2, 4)
    assert find(two_of_four, other).n_by_m_inputs is None
    assert find(two_of_four, np.ones((8, 3))).n_by_m_inputs is None
    assert find(matrix("#. #."), matrix("## .#")).channels is False
    # as many in each output of a slice, but not of all slices
    found = find(matrix("#.. .#. ..#"), matrix("##. .## #.#"))
    assert found.fan_in == (1, 2) and "constant fan-in 1 to 2" in found.pattern
    assert found.rows == found.columns == 6


def test_heads_and_their_width_are_one_axis():
    assert matrix_axes(3, (), ["embed", "heads", "kv"]).outputs == (1, 2)
    assert matrix_axes(3, (), ["heads", "kv", "embed"]).outputs == (2,)
    stacked = matrix_axes(4, (1,), ["embed", "layers", "heads", "kv"])
    assert (stacked.stack, stacked.inputs, stacked.outputs) == ((1,), (0,), (2, 3))
    assert matrix_axes(3).outputs == (2,) and matrix_axes(3).inputs == (0, 1)
    # slices by head: what is left is no longer heads x kv
    assert matrix_axes(3, (1,), ["embed", "heads", "kv"]).outputs == (2,)
    assert matrix_axes(1).inputs == () and matrix_axes(0).outputs == ()
    mask = np.ones((3, 2, 4), bool)
    mask[:, 1, 2] = mask[0] = False
    found = find(mask, output_axes=2)
    assert (found.rows, found.columns, found.dead_rows, found.dead_columns) == (3, 8, 1, 1)
    assert found.pattern == "whole channels"
    found = find(mask.transpose(1, 2, 0))
    assert (found.rows, found.columns, found.dead_rows, found.dead_columns) == (8, 3, 1, 1)


# against loops ------------------------------------------------------------------------------------


def oracle(slices):
    """What is found, by trying everything."""

    def n_by_m(axis):
        length = slices[0].shape[axis]
        for m in range(2, min(structure.MAX_GROUP, length // 2) + 1):
            if length % m:
                continue
            counts = set()
            for s in slices:
                s = np.moveaxis(s, axis, 0)
                groups = (s[i : i + m].sum(0) for i in range(0, length, m))
                counts |= {int(c) for g in groups for c in g}
            if len(counts) == 1 and 0 < min(counts) < m:
                return counts.pop(), m
        return None

    def at_most(axis):
        moved = [np.moveaxis(s, axis, 0) for s in slices]
        return all(len(s) % 4 == 0 for s in moved) and all(
            (s[i : i + 4].sum(0) <= 2).all() for s in moved for i in range(0, len(s), 4)
        )

    def runs(axis):
        moved = [np.moveaxis(s, axis, 0) for s in slices]
        length = len(moved[0])
        return max(
            n
            for n in range(1, length + 1)
            if all((s[i : i + n] == s[i]).all() for s in moved for i in range(0, length, n))
        )

    def fan(axis):
        found = []
        for s in slices:
            counts = s.sum(axis)
            live = set(counts[counts > 0].tolist())
            if len(live) > 1:
                return None
            found += live
        rows = slices[0].shape[axis]
        trivial = slices[0].shape[1 - axis] < 2 or not found or min(found) == rows
        return None if trivial else (min(found), max(found))

    def channels():
        wide = min(slices[0].shape) > 1
        return wide and all((s == np.outer(s.any(1), s.any(0))).all() for s in slices)

    block = runs(0), runs(1)
    has_block = block != (1, 1) and not channels() and min(slices[0].shape) > 1
    return {
        "size": sum(s.size for s in slices),
        "kept": sum(int(s.sum()) for s in slices),
        "dead_rows": sum(int((~s.any(1)).sum()) for s in slices),
        "dead_columns": sum(int((~s.any(0)).sum()) for s in slices),
        "channels": channels(),
        "n_by_m_inputs": n_by_m(0),
        "n_by_m_outputs": n_by_m(1),
        "block": block if has_block else None,
        "fan_in": fan(0),
        "fan_out": fan(1),
        "at_most_2_4_inputs": at_most(0),
        "at_most_2_4_outputs": at_most(1),
    }


@st.composite
def structured(draw):
    """Slices of one shape, each random or in some pattern."""
    rows, columns = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    share = draw(st.sampled_from([0.1, 0.3, 0.5, 0.9]))
    m, height, width = (draw(st.integers(1, 4)) for _ in range(3))
    kind = draw(st.sampled_from(["random", "groups", "groups", "blocks", "channels", "fan"]))

    def one():
        scores = rng.random((rows, columns))
        if kind == "groups":
            n = max(1, round(share * m))
            mask = np.zeros((rows, columns), bool)
            for i in range(0, rows, m):
                order = np.argsort(scores[i : i + m], axis=0)[:n]
                np.put_along_axis(mask[i : i + m], order, True, axis=0)
            return mask
        if kind == "blocks":
            coarse = scores[::height, ::width] < share
            return np.repeat(np.repeat(coarse, height, 0), width, 1)[:rows, :columns]
        if kind == "channels":
            return np.outer(scores[:, 0] < share, rng.random(columns) < share)
        if kind == "fan":
            k = max(1, round(share * rows))
            return np.argsort(np.argsort(scores, axis=0), axis=0) < k
        return scores < share

    masks = [one() for _ in range(draw(st.integers(1, 3)))]
    return [m.T for m in masks] if draw(st.booleans()) else masks


@given(structured())
def test_it_finds_what_loops_find(slices):
    found = find(*slices)
    expected = oracle(slices)
    if found.kept in (0, found.size):  # nothing to look for
        expected = {k: expected[k] for k in ("size", "kept", "dead_rows", "dead_columns")}
    assert {k: getattr(found, k) for k in expected} == expected


@given(st.data())
def test_parts_make_the_whole(data):
    shape = tuple(data.draw(st.integers(1, 11)) for _ in range(data.draw(st.integers(1, 3))))
    output_axes = data.draw(st.integers(1, len(shape)))
    mask = np.random.default_rng(data.draw(st.integers(0, 999))).random(shape) < 0.5
    cuts = []
    for n in shape:
        inner = data.draw(st.sets(st.integers(0, n)))
        cuts.append([slice(a, b) for a, b in itertools.pairwise(sorted({0, n} | inner))])
    bits = KeptBits(shape, output_axes)
    for at in itertools.product(*cuts):
        bits.add(mask[at], at)
    flat = mask.reshape(bits.rows, bits.columns)
    np.testing.assert_array_equal(bits.band(0, bits.rows), flat)
    np.testing.assert_array_equal(
        np.concatenate([bits.band(*span) for span in bits.spans(multiple=3)]), flat
    )
    assert bits.size == mask.size


# against the patterns that masks are made by ------------------------------------------------------

SHAPE = (4, 8, 12)
PATTERNS = [
    ts.Unstructured(),
    ts.NByM(n=2, m=4),
    ts.NByM(n=1, m=2, axis=-1),
    ts.Block(height=4, width=2),
    ts.Block(height=3, width=5),
    ts.Block(height=0, width=2),
    ts.Channel(axis=-2),
    ts.Channel(),
    ts.ConstantFanIn(),
]


@functools.cache
def masks():
    """A mask of half the weights by each pattern."""
    scores = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)

    @quick_jit
    def select():
        return select_masks(
            {
                str(i): Choice(pattern=p, scores=scores, k=p.kept(SHAPE, 0.5), stack_axes=())
                for i, p in enumerate(PATTERNS)
            }
        )

    found = select()
    return [np.array(found[str(i)]) for i in range(len(PATTERNS))]


@pytest.mark.parametrize("output_axes", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_mask_follows_the_pattern_that_made_it(pattern, output_axes):
    mask = masks()[PATTERNS.index(pattern)]
    assert find(mask, output_axes=output_axes, expected=repr(pattern)).follows is True
    # and a weight less is against it, in whichever slice
    spoilt = mask.copy()
    spoilt[tuple(np.argwhere(mask)[20])] = False
    for slices in ((mask, spoilt), (spoilt, mask)):
        found = find(*slices, output_axes=output_axes, expected=repr(pattern))
        assert found.follows is isinstance(pattern, ts.Unstructured)


@pytest.mark.parametrize(
    "text",
    [
        *("Mine(a=1)", "NByM(n=2)", "Channel(axis=7)", "Channel(axis='x')", "NByM(n=1, m=2.0)"),
        *("Block(height='x', width=1)", "", "a.B()", "(", "f(1)", "x", "f(a=g())"),
    ],
)
def test_a_pattern_that_is_not_known_is_not_compared_with(text):
    assert find(matrix("#. ##"), expected=text).follows is None


def test_matrices_without_weights_have_no_pattern():
    found = find(np.zeros((0, 4)), np.zeros((0, 4)))
    assert (found.size, sparsity(found.kept, found.size), found.pattern) == (0, 0.0, "dense")
