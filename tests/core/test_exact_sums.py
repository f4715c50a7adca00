import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, mesh, put, quick_jit

from t5x_sparsity.core.exact_sums import BITS, fixed_point, integer_sum, ordered_sum

TINY = 2.0**-126  # below it a float32 is subnormal, and some platforms take it for 0


@functools.cache
def compiled(axes):
    return quick_jit(lambda x: ordered_sum(x, axes))


def total(x, axes):
    return np.asarray(compiled(axes)(x))


def assert_sums(x, axes):
    """Within 2**-29 of the largest term times their number, and a rounding to float32."""
    found = total(x, axes)
    terms = np.abs(np.asarray(x).astype(np.float64))
    expected = terms.sum(axis=axes, keepdims=True)
    largest = terms.max(axis=axes, keepdims=True)
    number = math.prod(x.shape[a] for a in axes)
    assert found.dtype == np.float32 and found.shape == expected.shape
    allowed = number * (largest * 2.0**-29 + TINY) + expected * 2.0**-23
    assert (np.abs(found - expected) <= allowed).all(), (found, expected)
    assert (found <= expected * (1 + 2.0**-23)).all()  # terms are cut, never raised
    return found


CASES = [
    ((7,), (0,)),
    ((4, 6), (0, 1)),
    ((4, 6), (1,)),
    ((3, 4, 5), (0, 2)),
    ((3, 4, 5), (1,)),
    ((2, 3, 2, 4), (3, 1)),
]


@pytest.mark.parametrize("shape,axes", CASES)
def test_equals_a_float64_sum(shape, axes):
    @given(st.integers(0, 2**32 - 1), st.integers(-140, 120), st.integers(0, 40))
    @settings(max_examples=20)
    def check(seed, exponent, spread):
        rng = np.random.default_rng(seed)
        scale = np.exp2(rng.integers(-spread, 1, shape) + exponent)
        x = (rng.uniform(-1, 1, shape) * scale).astype(np.float32)
        assert_sums(x, axes)
        found = assert_sums(x.astype(ml_dtypes.bfloat16), axes)
        np.testing.assert_array_equal(found, total(-x.astype(ml_dtypes.bfloat16), axes))

    check()


def test_by_hand():
    x = np.array([[1, -2, 0.5], [0, -0.0, 0]], np.float32)
    np.testing.assert_array_equal(total(x, (1,)), [[3.5], [0]])
    np.testing.assert_array_equal(total(x, (0, 1)), [[3.5]])
    np.testing.assert_array_equal(total(x, ()), np.abs(x))
    # 2**-30 of a largest term of 1 - 2**-24 is the last bit that counts
    x = np.array([1 - 2.0**-24, *[2.0**-30] * 64, *[2.0**-31] * 64], np.float32)
    assert total(x, (0,)) == np.float32(1)  # 1 - 2**-24 + 2**-24, the halves of it cut


@pytest.mark.parametrize(
    "terms,expected",
    [
        ([0.0, -0.0, 0.0], 0.0),
        ([1.0, np.nan, np.inf], np.nan),
        ([np.nan, np.nan, np.nan], np.nan),
        ([1.0, -np.inf, 2.0], np.inf),
        ([3e38, 3e38, 3e38], np.inf),
        ([float(np.finfo(np.float32).max), 0.0, 0.0], float(np.finfo(np.float32).max)),
        ([2.0**-126, 2.0**-126, 2.0**-125], 2.0**-124),
    ],
)
def test_special_values(terms, expected):
    x = np.array([terms, [1, 2, 3]], np.float32)
    found = total(x, (1,))
    np.testing.assert_array_equal(found, np.float32([[expected], [6]]))


def test_subnormal_terms_do_no_harm():
    x = np.array([[1e-45, 1e-40, -3e-39], [1e-45, 1e-40, 1]], np.float32)
    found = total(x, (1,))
    assert 0 <= found[0, 0] <= 3.2e-39
    assert found[1, 0] == 1


def test_the_same_in_any_order():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=240) * np.exp2(rng.integers(-20, 0, 240))).astype(np.float32)
    orders = np.stack([rng.permutation(x) for _ in range(40)])
    assert len({float(np.add.accumulate(np.abs(o))[-1]) for o in orders}) > 1  # a float sum isn't

    @quick_jit
    def run(orders):
        sums = [ordered_sum(orders, (1,)).ravel()]
        for shape in [(2, 120), (120, 2), (4, 6, 10)]:
            for axes in itertools.permutations(range(len(shape))):
                sums.append(ordered_sum(orders[0].reshape(shape), axes).ravel())
        return jnp.concatenate(sums)

    assert len(set(run(orders).tolist())) == 1


@pytest.mark.parametrize("shape", [(2, 2), (1, 8)], ids=str)
def test_the_same_on_meshes(shape):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(64, 32)) * np.exp2(rng.integers(-20, 0, (64, 32)))).astype(np.float32)
    run = quick_jit(lambda x: [ordered_sum(x, axes) for axes in ((0,), (1,), (0, 1))])
    devices = mesh(*shape)
    for spec in [("x", "y"), (None, ("x", "y"))]:
        placed = put(devices, x, *spec)
        program = run.lower(placed).compile()
        for found, axes in zip(program(placed), ((0,), (1,), (0, 1)), strict=True):
            np.testing.assert_array_equal(found, total(x, axes))
        assert_moves_no_weight(program.as_text(), largest=64)


LAST = 2**BITS - 1


@pytest.mark.parametrize(
    "shape,axes",
    [((2**21,), (0,)), ((2**11, 2**11), (0, 1)), ((3, 2**20), (1, 0)), ((2, 5, 2**19), (0, 2))],
)
def test_long_sums_carry(shape, axes):
    """Every digit as large as can be, of as many terms as add up at once, and of more."""
    for value in (LAST, 1, 2**20 - 1, 1023 << 10):
        found = quick_jit(lambda v: integer_sum(jnp.full(shape, v), axes))(np.int32(value))  # noqa: B023
        number = math.prod(shape[a] for a in axes)
        assert np.asarray(found).ravel()[0] == pytest.approx(value * number, rel=2.0**-23)
        assert {int(x) for x in np.asarray(found).ravel()} == {int(np.asarray(found).ravel()[0])}
        assert found.shape == tuple(1 if a in axes else n for a, n in enumerate(shape))


def test_a_sum_rises_with_its_terms():
    """Rounding keeps the order, which is what a bisection over such sums needs."""
    run = quick_jit(lambda x: integer_sum(x, (1,)))
    start = np.array([[LAST, LAST, 2**24 + 1, 0]], np.int32)
    x = np.repeat(start, 5000, axis=0)
    x[:, 3] = np.arange(5000)
    sums = np.asarray(run(x))[:, 0]
    exact = x.astype(np.int64).sum(axis=1)
    assert (np.diff(sums) >= 0).all() and sums[0] < sums[-1]
    np.testing.assert_allclose(sums, exact, rtol=2.0**-23)
    small = np.arange(4096, dtype=np.int32).reshape(1024, 4) * 1021
    np.testing.assert_array_equal(np.asarray(run(small))[:, 0], small.sum(axis=1))  # below 2**24


def test_fixed_point():
    x = np.array([[0.75, 0.5, 2.0**-31], [6, 2, 1], [0, 0, 0]], np.float32)
    fixed, exponent = quick_jit(lambda x: fixed_point(x, (1,)))(x)
    assert fixed.dtype == exponent.dtype == jnp.int32
    np.testing.assert_array_equal(exponent[:2, 0], [-30, -27])
    np.testing.assert_array_equal(
        fixed, [[3 << 28, 1 << 29, 0], [6 << 27, 2 << 27, 1 << 27], [0, 0, 0]]
    )


def test_an_axis_too_long():
    for shape, axes in [((2**21 + 1,), (0,)), ((2, 2**22), (0, 1))]:
        with pytest.raises(ValueError, match=rf"an axis of {shape[-1]} is too long .* split it"):
            jax.eval_shape(
                lambda x: ordered_sum(x, axes),  # noqa: B023
                jax.ShapeDtypeStruct(shape, jnp.float32),
            )
    many = jax.ShapeDtypeStruct((2**21, 2**21), jnp.float32)
    assert jax.eval_shape(lambda x: ordered_sum(x, (0, 1)), many).shape == (1, 1)
