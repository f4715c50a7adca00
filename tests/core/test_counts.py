import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from t5x_sparsity.core.topk import Count


def value_of(count):
    return (np.asarray(count.high).astype(object) << 16) + np.asarray(count.low).astype(object)


EDGES = [0, 1, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 + 5, 2**46, 2**47 - 1]


@given(st.integers(0, 2**46 - 1), st.integers(0, 2**46))
@example(2**31, 2**31)
@example(2**16 - 1, 1)
def test_counts_are_python_integers(a, b):
    low, high = sorted((a, b))
    x, y = Count.of(high), Count.of(low)
    assert value_of(x) == high and value_of(y) == low
    assert value_of(x + y) == high + low
    assert value_of(x - y) == high - low
    assert bool(x.reaches(y)) and bool(y.reaches(x)) == (low == high)


def test_counts_at_the_edges():
    for value in EDGES:
        count = Count.of(value)
        assert value_of(count) == value
        assert 0 <= int(count.low) < 2**16
        assert Count.of(count) is count
        if value < 2**47 - 1:
            assert value_of(count + Count.of(1)) == value + 1
            assert not bool(count.reaches(count + Count.of(1)))
        if value:
            assert value_of(count - Count.of(1)) == value - 1
    arrays = Count.of(jnp.array([0, 2**16, 2**31 - 1], jnp.int32))
    assert value_of(arrays).tolist() == [0, 2**16, 2**31 - 1]
    total = sum([Count.of(2**31 - 1)] * 6, Count.of(0))
    assert value_of(total) == 6 * (2**31 - 1)


@given(st.integers(0, 2**47 - 1), st.integers(0, 2**15 - 1))
@example(2**32 + 5, 2**15 - 1)
@example(2**16 - 1, 2**15 - 1)
@example(2**32 - 1, 2**15 - 1)
@example(2**47 - 1, 1)
def test_times(value, factor):
    value = min(value, (2**47 - 1) // max(factor, 1))
    count = Count.of(value).times(factor)
    assert value_of(count) == value * factor
    assert 0 <= int(count.low) < 2**16


def test_times_of_arrays():
    counts = Count.of(jnp.array([0, 1, 2**31 - 1], jnp.int32)).times(30_000)
    assert value_of(counts).tolist() == [0, 30_000, (2**31 - 1) * 30_000]


@pytest.mark.parametrize(
    "values",
    [
        [0],
        [5, 2**16 - 1, 2**31 - 1],
        [2**46, 2**45, 2**45 - 1],
        [2**16 - 1] * (2**15 - 1),
        [2**31 - 1] * (2**15 - 1),
    ],
    ids=["none", "few", "large", "low halves", "many"],
)
def test_sum(values):
    parts = [divmod(v, 2**16) for v in values]
    vector = Count(*(jnp.array(column, jnp.int32) for column in zip(*parts, strict=True)))
    total = vector.sum()
    assert total.high.shape == total.low.shape == (1,)
    assert value_of(total).tolist() == [sum(values)]
    assert 0 <= int(total.low[0]) < 2**16
