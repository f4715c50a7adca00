import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_sparsity.core.distributions import DISTRIBUTIONS, check_distribution, distribute


def total_density(levels, shapes, slices=None):
    weights = {p: math.prod(s) * (slices or {}).get(p, 1) for p, s in shapes.items()}
    return sum((1 - levels[p]) * w for p, w in weights.items()) / sum(weights.values())


def test_uniform():
    shapes = {"a": (4, 4), "b": (100, 3)}
    assert distribute("uniform", shapes, 0.7) == {"a": 0.7, "b": 0.7}


def test_er_by_hand():
    # raw densities 20/100 and 50/400; their weights 20 and 50; the budget of 250 gives eps = 25/7,
    # and 5/7 and 25/56
    levels = distribute("er", {"a": (10, 10), "b": (10, 40)}, 0.5)
    assert levels["a"] == pytest.approx(1 - 5 / 7)
    assert levels["b"] == pytest.approx(1 - 25 / 56)


def test_er_takes_the_last_two_dims_erk_all():
    shapes = {"conv": (3, 3, 10, 10), "b": (20, 20)}
    # er: both raw densities times sizes: 900 * 20/100 = 180 and 400 * 40/400 = 40; budget 130
    levels = distribute("er", shapes, 0.9)
    assert levels["conv"] == pytest.approx(1 - 130 / 220 * 0.2)
    assert levels["b"] == pytest.approx(1 - 130 / 220 * 0.1)
    # erk: 900 * 26/900 = 26, and 40
    levels = distribute("erk", shapes, 0.9)
    assert levels["conv"] == pytest.approx(1 - 130 / 66 * 26 / 900)
    assert levels["b"] == pytest.approx(1 - 130 / 66 * 0.1)


def test_a_layer_past_full_density_is_dense_and_the_rest_solved_again():
    # raw 1 and 0.02 with weights 4 and 200: at 50% eps would be 5002/204 = 24.5, above 1 for a
    levels = distribute("erk", {"a": (2, 2), "b": (100, 100)}, 0.5)
    assert levels["a"] == 0
    assert levels["b"] == pytest.approx(1 - (5002 - 4) / 10_000)


def test_ties_go_dense_together():
    shapes = {"b": (100, 100), "a": (2, 2), "c": (2, 2)}
    levels = distribute("erk", shapes, 0.5)
    assert levels["a"] == levels["c"] == 0
    assert levels["b"] == pytest.approx(1 - (5004 - 8) / 10_000)


def test_dense_one_after_another():
    shapes = {"a": (2, 2), "b": (3, 3), "c": (50, 50)}
    levels = distribute("erk", shapes, 0.1)
    assert levels["a"] == levels["b"] == 0
    assert levels["c"] == pytest.approx(0.1 * 2513 / 2500)


def test_slices_weigh_in_and_share_a_level():
    # as 3 layers of (10, 10) beside one of (10, 40)
    stacked = distribute("er", {"a": (10, 10), "b": (10, 40)}, 0.5, {"a": 3})
    apart = distribute("er", {"a0": (10, 10), "a1": (10, 10), "a2": (10, 10), "b": (10, 40)}, 0.5)
    assert stacked["a"] == pytest.approx(apart["a0"])
    assert stacked["b"] == pytest.approx(apart["b"])


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_edge_cases(name):
    assert distribute(name, {}, 0.9) == {}
    for sparsity in (0.0, 0.3, 0.999999, 1.0):
        one = distribute(name, {"a": (3, 50)}, sparsity)
        assert one["a"] == pytest.approx(sparsity, abs=1e-12)
    shapes = {"a": (2, 2), "b": (30, 40), "c": (8, 8, 8)}
    assert all(s == pytest.approx(0, abs=1e-12) for s in distribute(name, shapes, 0.0).values())
    assert all(s == 1 for s in distribute(name, shapes, 1.0).values())
    equal = distribute(name, {"a": (6, 4), "b": (6, 4), "c": (4, 6)}, 0.35, {"b": 5})
    assert all(s == pytest.approx(0.35, abs=1e-12) for s in equal.values())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_budget_is_met(name):
    dims = st.lists(st.integers(1, 300), min_size=2, max_size=4)
    layers = st.lists(st.tuples(dims, st.integers(1, 12)), min_size=1, max_size=12)

    @given(layers, st.floats(0, 1))
    def check(layers, sparsity):
        shapes = {f"layer{i}": tuple(shape) for i, (shape, _) in enumerate(layers)}
        slices = {f"layer{i}": number for i, (_, number) in enumerate(layers)}
        levels = distribute(name, shapes, sparsity, slices)
        assert list(levels) == list(shapes)
        assert all(-1e-12 <= s <= 1 for s in levels.values())
        assert total_density(levels, shapes, slices) == pytest.approx(1 - sparsity, abs=1e-9)
        if name != "uniform":  # a layer of larger raw density is nowhere sparser
            tail = -2 if name == "er" else 0
            raw = {p: sum(s[tail:]) / math.prod(s[tail:]) for p, s in shapes.items()}
            ordered = sorted(shapes, key=lambda p: raw[p])
            for low, high in zip(ordered, ordered[1:], strict=False):
                assert levels[high] <= levels[low] + 1e-9
                if levels[high] > 1e-9:  # no more density than its share
                    ratio = (1 - levels[low]) * raw[high] - (1 - levels[high]) * raw[low]
                    assert ratio == pytest.approx(0, abs=1e-9)

    check()


def test_unknown_name():
    with pytest.raises(
        ValueError,
        match=r"'erdos' \(SPARSITY_DISTRIBUTION\); choose one of 'uniform', 'er', 'erk'",
    ):
        distribute("erdos", {"a": (2, 2)}, 0.5)
    with pytest.raises(ValueError, match="unknown sparsity distribution"):
        check_distribution("")
