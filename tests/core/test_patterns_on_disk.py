"""Patterns as files name them, and whether a mask on disk follows one."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import t5x_sparsity as ts
from t5x_sparsity.core.patterns import from_text, to_text

PATTERNS = [
    ts.Unstructured(),
    ts.NByM(n=2, m=4),
    ts.NByM(n=1, m=3, axis=-1),
    ts.Block(height=4, width=2),
    ts.Block(height=0, width=2, pooling="max"),
    ts.Channel(axis=-2),
    ts.Channel(),
    ts.ConstantFanIn(),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
def test_a_pattern_comes_back_from_its_text(pattern):
    assert from_text(to_text(pattern)) == pattern


def test_texts_of_today():
    assert to_text(ts.NByM(n=2, m=4)) == "NByM(n=2, m=4, axis=-2)"
    assert from_text("Block(height=4, width=2)") == ts.Block(height=4, width=2)


@pytest.mark.parametrize(
    "text",
    [
        *("", "a.B()", "(", "f(1)", "x", "f(a=g())", "NByM(2, 4)", "NByM(n=2)", "NByM(**{})"),
        *("Mine(a=1)", "NByM(n=5, m=4)", "Block(height='x', width=1)", "(" * 9999),
    ],
)
def test_other_texts_are_no_pattern_of_the_package(text):
    assert from_text(text) is None


def test_a_users_own_pattern_keeps_its_text():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        k: int

    assert to_text(Mine(3)).endswith("Mine(k=3)") and from_text("Mine(k=3)") is None


def drawn(text):
    return np.array([[c == "#" for c in row] for row in text.split()])


@pytest.mark.parametrize(
    ("pattern", "follows", "does_not"),
    [
        (ts.NByM(n=1, m=2), "#. .# .# #.", ["#. .# .# .#", "#. .# .#", "## .. .# .."]),
        (ts.NByM(n=1, m=3, axis=-1), "#.. .#. ..#", ["#.. ##. ..#", "#..."]),
        (ts.Block(height=2, width=2), "##. ##. ..# ..#", ["##. ##. ..# ...", ".## .## ... ..."]),
        (ts.Block(height=0, width=1), "#.# #.#", ["#.# #.."]),
        (ts.Channel(), "#.# #.#", ["#.# ###"]),
        (ts.Channel(axis=-2), "### ... ###", ["### .#. ###"]),
        (ts.ConstantFanIn(), "#.# ..# #..", ["#.# ##. .#.", "#.# #.. #.. ##."]),
    ],
)
def test_holds_by_hand(pattern, follows, does_not):
    for text, expected in ((follows, True), *((other, False) for other in does_not)):
        assert pattern.holds(drawn(text)) is expected, text
        assert ts.Unstructured().holds(drawn(text))


@given(st.data())
def test_stacked_axes_are_slices_of_their_own(data):
    pattern = data.draw(st.sampled_from(PATTERNS))
    stack_axes = tuple(sorted(data.draw(st.sets(st.integers(0, 3), max_size=2))))
    shape = [data.draw(st.sampled_from([2, 4, 6])) for _ in range(4)]
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape) < 0.5
    if data.draw(st.booleans()):  # alike along all axes but some
        free = [a for a in range(4) if a not in stack_axes]
        for axis in data.draw(st.sets(st.sampled_from(free))):
            mask = np.repeat(mask.take([0], axis), shape[axis], axis)
    slices = np.moveaxis(mask, stack_axes, range(len(stack_axes)))
    slices = slices.reshape(-1, *slices.shape[len(stack_axes) :])
    assert pattern.holds(mask, stack_axes) == all(pattern.holds(s) for s in slices)


@pytest.mark.parametrize(
    "pattern", [ts.NByM(n=1, m=2), ts.Channel(axis=2), ts.Block(height=1, width=1)]
)
def test_an_axis_that_is_not_there(pattern):
    with pytest.raises(ValueError, match="is not an axis of a slice of shape"):
        pattern.holds(np.ones(4, bool))
