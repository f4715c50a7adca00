import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5x_sparsity.core.schedules import (
    Constant,
    Cosine,
    Exponential,
    Listed,
    Never,
    OneShot,
    Periodic,
    Polynomial,
    resolve_step,
)


def steps_of(schedule, until):
    return [t for t in range(until) if schedule.is_update(t)]


def assert_traced_agrees(schedule, until):
    """The compiled rule, on every step at once, says what the rule on the host says."""
    steps = jnp.arange(until, dtype=jnp.int32)
    traced = jax.jit(jax.vmap(schedule.is_update))(steps)
    assert traced.dtype == bool
    assert np.flatnonzero(traced).tolist() == steps_of(schedule, until)
    progress = jax.jit(jax.vmap(schedule.progress))(steps)
    assert progress.dtype == jnp.float32
    for step in (0, 1, until // 2, until - 1):
        assert float(schedule.progress(step)) == float(progress[step])
        assert schedule.progress(step).dtype == jnp.float32


@pytest.mark.parametrize(
    "begin,end,period,steps",
    [
        (0, 10, 5, [0, 5, 10]),
        (3, 10, 3, [3, 6, 9, 10]),
        (3, 3, 100, [3]),
        (2, 6, 1, [2, 3, 4, 5, 6]),
        (4, 6, 10, [4, 6]),
    ],
)
def test_periodic(begin, end, period, steps):
    schedule = Periodic(begin=begin, end=end, period=period)
    assert schedule.last == end
    assert steps_of(schedule, 20) == steps
    assert_traced_agrees(schedule, 20)


SCHEDULES = [
    Periodic(begin=0, end=10, period=5),
    Periodic(begin=3, end=10, period=3),
    Periodic(begin=3, end=3, period=100),
    Periodic(begin=2, end=6, period=1),
    Periodic(begin=4, end=6, period=10),
    Periodic(begin=0.25, end=1.0, period=4, total_steps=24),
    OneShot(step=0),
    OneShot(step=7),
    Listed(steps=[2, 3, 12]),
    Listed(steps=[0]),
    Never(),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_until_next_counts_the_steps(schedule):
    due = steps_of(schedule, 30)
    expected = [min((t - s for t in due if t >= s), default=2**30) for s in range(30)]
    traced = jax.jit(jax.vmap(schedule.until_next))(jnp.arange(30, dtype=jnp.int32))
    assert traced.dtype == jnp.int32
    assert traced.tolist() == expected
    for step in (0, 3, 4, 29):
        assert int(schedule.until_next(step)) == expected[step]
    assert int(schedule.until_next(2**30)) == 2**30


def test_until_next_of_a_long_run():
    far = Periodic(begin=2**30 - 7, end=2**30, period=5)
    assert int(far.until_next(jnp.int32(0))) == 2**30 - 7
    assert [int(far.until_next(jnp.int32(2**30 - n))) for n in (7, 6, 2, 1, 0, -1)] == [
        *(0, 4, 0, 1, 0),
        2**30,
    ]


def test_periodic_against_a_loop():
    traced = jax.jit(
        lambda begin, end, period, steps: jax.vmap(
            lambda t: ((begin <= t) & (t <= end) & ((t - begin) % period == 0)) | (t == end)
        )(steps)
    )

    @given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40))
    def check(begin, length, period):
        schedule = Periodic(begin=begin, end=begin + length, period=period)
        due, t = set(), begin
        while t <= begin + length:
            due.add(t)
            t += period
        due.add(begin + length)
        assert steps_of(schedule, 100) == sorted(due)
        steps = traced(begin, begin + length, period, jnp.arange(100))
        assert np.flatnonzero(steps).tolist() == sorted(due)
        assert float(schedule.progress(begin + length)) == 1.0
        assert float(schedule.progress(begin + length + 5)) == 1.0
        if length:
            assert float(schedule.progress(begin)) == 0.0

    check()


def test_progress():
    schedule = Periodic(begin=10, end=30, period=7)
    shares = [float(schedule.progress(t)) for t in (0, 10, 15, 20, 29, 30, 99)]
    assert shares == pytest.approx([0, 0, 0.25, 0.5, 0.95, 1, 1])
    assert shares[-3] < 1
    late = Periodic(begin=0, end=2**30, period=2**30)
    assert float(late.progress(2**29)) == 0.5
    assert float(late.progress(2**30)) == 1


def test_shares_of_the_run():
    schedule = Periodic(begin=0.25, end=0.75, period=10, total_steps=200)
    assert (schedule.begin, schedule.end) == (50, 150)
    # the last step of a run of 200 is 199: an update at 200 would never come
    assert Periodic(begin=0.0, end=1.0, period=50, total_steps=200).last == 199
    assert OneShot(step=1.0, total_steps=200).last == 199
    assert OneShot(step=0.5, total_steps=201).last == 100
    assert resolve_step(1, 10, "begin") == 1
    assert resolve_step(0.0, 0, "begin") == 0


def test_one_shot_listed_and_never():
    shot = OneShot(step=4)
    assert shot.last == 4 and steps_of(shot, 10) == [4]
    assert [float(shot.progress(t)) for t in (0, 3, 4, 5)] == [0, 0, 1, 1]
    assert_traced_agrees(shot, 10)
    listed = Listed(steps=[2, 3, 12])
    assert listed.last == 12 and steps_of(listed, 20) == [2, 3, 12]
    assert [float(listed.progress(t)) for t in (0, 2, 7, 12, 13)] == [0, 0, 0.5, 1, 1]
    assert_traced_agrees(listed, 20)
    never = Never()
    assert never.last is None and steps_of(never, 20) == []
    assert_traced_agrees(never, 20)


def test_configurations_compare_and_hash():
    assert Periodic(begin=0, end=4, period=2) == Periodic(begin=0, end=4, period=2)
    assert len({Listed(steps=[1, 2]), Listed(steps=(1, 2))}) == 1


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Periodic(begin=-1, end=4, period=1), "begin .*must not be negative, got -1"),
        (lambda: Periodic(begin=0, end=1.5, period=1), r"end \(MASK_UPDATE_END\).*got 1.5"),
        (lambda: Periodic(begin=0, end=math.nan, period=1), "must be in .*got nan"),
        (lambda: Periodic(begin=0.5, end=9, period=1), r"needs total_steps \(gin: TRAIN_STEPS\)"),
        (lambda: Periodic(begin="0", end=9, period=1), "must be a step .* got '0'"),
        (lambda: Periodic(begin=True, end=9, period=1), "must be a step .* got True"),
        (lambda: Periodic(begin=0, end=9, period=0), "MASK_UPDATE_PERIOD.* at least 1, got 0"),
        (lambda: Periodic(begin=0, end=9, period=2.0), "must be an integer .* got 2.0"),
        (lambda: Periodic(begin=9, end=5, period=1), "end at step 5 before they begin at step 9"),
        (lambda: OneShot(step=-3), "step must not be negative, got -3"),
        (lambda: Listed(steps=[]), "non-empty, increasing list"),
        (lambda: Listed(steps=[3, 3]), "non-empty, increasing list, got .3, 3."),
        (lambda: Listed(steps=[-1, 3]), "steps must not be negative, got -1"),
        (lambda: Listed(steps=[0.5]), "share of the run .0.5., which needs total_steps"),
        (lambda: Constant(value=1.1), "value must be a number in .0, 1., got 1.1"),
        (lambda: Constant(value=True), "got True"),
        (lambda: Polynomial(initial=-0.1), "initial must be a number in .0, 1., got -0.1"),
        (lambda: Polynomial(final=2), "final must be .* got 2"),
        (lambda: Polynomial(power=0), "power must be above 0, got 0"),
        (lambda: Exponential(initial=-1), "Exponential.initial must be .* got -1"),
        (lambda: Exponential(final=1.5), "Exponential.final must be .* got 1.5"),
        (lambda: Exponential(rate=0), "Exponential.rate must be above 0, got 0"),
        (lambda: Exponential(rate=-1.0), "Exponential.rate must be above 0, got -1.0"),
        (lambda: Cosine(initial=1.2), "initial must be .* got 1.2"),
        (lambda: Cosine(initial=0.3, final=math.nan), "final must be .* got nan"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def at(schedule, *shares):
    values = jax.jit(jax.vmap(schedule))(jnp.array(shares, jnp.float32))
    assert values.dtype == jnp.float32
    for share, value in zip(shares, values, strict=True):
        assert float(schedule(jnp.float32(share))) == pytest.approx(float(value), abs=1e-6)
    return values.tolist()


def test_values():
    assert at(Constant(value=0.25), 0, 0.5, 1) == [0.25] * 3
    cubic = at(Polynomial(), 0, 0.5, 0.75, 1)
    assert cubic == pytest.approx([0, 0.875, 1 - 1 / 64, 1])
    assert cubic[0] == 0 and cubic[-1] == 1  # exactly
    linear = at(Polynomial(initial=0.5, final=0.1, power=1), 0, 0.25, 1)
    assert linear == pytest.approx([0.5, 0.4, 0.1])
    assert linear[-1] == np.float32(0.1)
    cosine = at(Cosine(initial=0.3), 0, 1 / 3, 0.5, 1)
    assert cosine == pytest.approx([0.3, 0.225, 0.15, 0], abs=1e-6)
    assert cosine[-1] == 0
    raised = at(Cosine(initial=0.2, final=0.6), 0, 0.5, 1)
    assert raised == pytest.approx([0.2, 0.4, 0.6])
    decay = at(Exponential(), 0, 0.2, 0.5, 1)
    assert decay == pytest.approx([1, math.exp(-1), math.exp(-2.5), 0], abs=1e-6)
    assert decay[0] == 1 and decay[-1] == 0  # exactly
    rise = at(Exponential(initial=0.2, final=0.6, rate=2.0), 0, 0.5, 1)
    assert rise == pytest.approx([0.2, 0.6 - 0.4 * math.exp(-1), 0.6])
    assert rise[-1] == np.float32(0.6)
    # at a rate of 5 the last step down is one of less than 1%
    assert 0 < at(Exponential(), 0.999)[0] < 0.01


def test_shares_are_of_the_steps_from_the_start():
    schedule = Periodic(begin=0.25, end=0.75, period=100, total_steps=1400, start_step=1000)
    assert (schedule.begin, schedule.end) == (1100, 1300)
    assert steps_of(schedule, 1400) == [1100, 1200, 1300]
    assert float(schedule.progress(1200)) == 0.5
    assert Periodic(begin=0.0, end=1.0, period=1, total_steps=1400, start_step=1000).end == 1399
    assert OneShot(step=0.5, total_steps=1400, start_step=1000).step == 1200


def test_no_update_comes_before_the_start():
    schedule = Periodic(begin=0, end=0.75, period=100, total_steps=1400, start_step=1000)
    assert (schedule.begin, schedule.end) == (1000, 1300)
    assert float(schedule.progress(1000)) == 0
    assert Periodic(begin=1200, end=1300, period=5, start_step=1000).begin == 1200


@pytest.mark.parametrize("start", [-1, 0.5, True, "10"])
def test_start_must_be_a_step(start):
    with pytest.raises(ValueError, match="start_step must be an integer of at least 0, got"):
        Periodic(begin=0, end=10, period=1, start_step=start)
    with pytest.raises(ValueError, match="start_step must be an integer of at least 0, got"):
        OneShot(step=3, start_step=start)


def test_a_run_must_end_after_its_start():
    with pytest.raises(
        ValueError, match=r"starts at step 1000 and total_steps \(gin: TRAIN_STEPS\) is 100, which"
    ):
        Periodic(begin=0.0, end=0.75, period=1, total_steps=100, start_step=1000)
    with pytest.raises(ValueError, match="end at step 500 before the run starts at step 1000"):
        Periodic(begin=0, end=500, period=1, start_step=1000)
