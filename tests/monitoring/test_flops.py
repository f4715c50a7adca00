import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import quick_jit
from plans import make_plan

import t5x_sparsity as ts
from t5x_sparsity.algorithms import choose, magnitudes, scheduled_kept
from t5x_sparsity.core import packing
from t5x_sparsity.core.train_step import init_state, train_step
from t5x_sparsity.monitoring import flops
from t5x_sparsity.monitoring.mask_metrics import scheduled_sparsities
from t5x_sparsity.monitoring.matrix_products import Products

SIZE = 40 * 50
UPDATES = ts.Periodic(begin=0, end=1000, period=11)


def cost(algorithm, density, steps, pattern=None):
    """Mean FLOPs of train steps, in forward passes through the dense weight."""
    plan = make_plan(
        {"w": jax.ShapeDtypeStruct((40, 50), jnp.float32)},
        sparsity=1 - density,
        algorithm=algorithm,
        pattern=pattern,
    )
    assert flops.dense_forward_flops(plan) == 2 * SIZE
    total = sum(flops.train_step_flops(plan, {"w": density}, step) for step in steps)
    return total / len(steps) / (2 * SIZE)


def test_rigl_is_the_papers_formula():
    # f_S = 0.2 f_D; a period of 10 plain steps and one update (appendix H)
    found = cost(ts.RigL(updates=UPDATES), 0.2, range(1, 12))
    assert found == pytest.approx((3 * 0.2 * 10 + 2 * 0.2 + 1) / 11)


@pytest.mark.parametrize(
    ("algorithm", "step", "forwards"),
    [
        (ts.Static(), 3, 3 * 0.2),
        (ts.SET(updates=UPDATES), 11, 3 * 0.2),
        (ts.Magnitude(updates=UPDATES), 11, 3 * 0.2),
        (ts.RigL(updates=UPDATES), 11, 2 * 0.2 + 1),
        (ts.SNFS(updates=UPDATES), 3, 2 * 0.2 + 1),
        (ts.MagnitudeSTE(updates=UPDATES), 3, 2 * 0.2 + 1),
        # 0.5 of the weights, at 0.625 of a sparsity of 0.8, until exploration ends
        (ts.TopKAST(updates=UPDATES), 3, 2 * 0.2 + 0.5),
        (ts.TopKAST(updates=UPDATES), 1001, 3 * 0.2),
        # dense until nothing of pruned weights is left
        (ts.DecayingMask(updates=UPDATES), 999, 3),
        (ts.DecayingMask(updates=UPDATES), 1000, 3 * 0.2),
        (ts.DecayingMask(updates=UPDATES, straight_through=True), 1000, 2 * 0.2 + 1),
    ],
)
def test_a_step_by_hand(algorithm, step, forwards):
    assert cost(algorithm, 0.2, [step]) == pytest.approx(forwards)


def test_structure_decay_computes_with_its_mask():
    pattern = ts.NByM(n=2, m=4)
    algorithm = ts.StructureDecay(updates=UPDATES)
    assert cost(algorithm, 0.5, [3], pattern) == pytest.approx(1.5)
    full = ts.StructureDecay(updates=UPDATES, straight_through=True)
    assert cost(full, 0.5, [3], pattern) == pytest.approx(2)


def test_forward_passes_of_several_algorithms():
    plan = make_plan(
        {p: jax.ShapeDtypeStruct((8, 8), jnp.float32) for p in ("a", "b")},
        sparsity=0.5,
        algorithm=ts.RigL(updates=UPDATES),
        rules=[ts.Rule(path="b", algorithm=ts.DecayingMask(updates=UPDATES))],
    )
    densities = {"a": 0.5, "b": 0.25}
    assert flops.forward_flops(plan, densities, 3) == 2 * 64 * (0.5 + 1)
    assert flops.forward_flops(plan, densities, 1000) == 2 * 64 * (0.5 + 0.25)


RUN = 1000
RUN_UPDATES = ts.Periodic(begin=100, end=900, period=100)


def run(algorithm, *, size=40 * 50, others=500.0, pattern=None, steps=RUN, sparsity=0.8):
    """(training, inference) FLOPs of a run against dense; one weight, and as much that is dense."""
    plan = make_plan(
        {"w": jax.ShapeDtypeStruct((40, 50), jnp.float32)},
        sparsity=sparsity,
        algorithm=algorithm,
        pattern=pattern,
    )
    of_weights = {"w": 2.0 * size, "embedding": 1000.0}
    found = flops.run_flops(plan, Products(of_weights, others), steps)
    assert found.dense_forward == 2 * size + 1500
    assert found.dense_training == 3 * steps * found.dense_forward
    return found.training / found.dense_training, found.forward / found.dense_forward


def mean(sparse_part):
    """A share of the sparse weight's FLOPs as one of all."""
    return (4000 * sparse_part + 1500) / 5500


def test_a_run_counts_dense_weights_and_its_schedule():
    training, inference = run(ts.RigL(updates=RUN_UPDATES))
    # nine updates need all gradients
    assert training == pytest.approx(mean((991 * 0.6 + 9 * 1.4) / 3000))
    assert inference == pytest.approx(mean(0.2))


STAGES = ts.NByM(n=2, m=8)


@pytest.mark.parametrize(
    ("algorithm", "pattern", "share"),
    [
        (ts.Static(), None, 0.2),
        # dense up to the update, which itself still computes with all weights
        (ts.Magnitude(updates=ts.OneShot(step=499)), None, (500 + 500 * 0.2) / 1000),
        # a straight line down, in eight stairs
        (
            ts.Magnitude(
                updates=RUN_UPDATES, level=ts.Polynomial(initial=0.0, final=1.0, power=1.0)
            ),
            None,
            (201 + sum(100 * (1 - 0.1 * i) for i in range(1, 8)) + 99 * 0.2) / 1000,
        ),
        (
            ts.MagnitudeSTE(updates=RUN_UPDATES, level=ts.Constant(value=0.5)),
            None,
            (0.6 * 2 + 1) / 3,
        ),
        # turns of sparse, dense, ..., and the last is sparse
        (ts.ACDC(updates=RUN_UPDATES), None, (101 + 400 * 0.2 + 400 + 99 * 0.2) / 1000),
        # half of all weights at the start
        (ts.GraNet(updates=ts.OneShot(step=999), initial_sparsity=0.5), None,
         (999 * 0.5 * 3 + 0.5 * 2 + 1) / 3000),
        # groups of eight keep 7, 4 and 2
        (ts.StructureDecay(updates=ts.Listed(steps=[0, 300, 600])), STAGES,
         (1 + 300 * 7 / 8 + 300 * 4 / 8 + 399 * 2 / 8) / 1000),
    ],
)  # fmt: skip
def test_masks_follow_their_schedule(algorithm, pattern, share):
    training, _ = run(algorithm, pattern=pattern, sparsity=0.75 if pattern else 0.8)
    # long runs are judged by samples
    assert training == pytest.approx(mean(share), rel=2e-3)


def test_an_update_counts_from_the_step_after_it():
    training, _ = run(ts.Magnitude(updates=ts.OneShot(step=4)), steps=10)
    assert training == pytest.approx(mean((5 + 5 * 0.2) / 10))


def test_a_long_run_is_judged_by_samples():
    updates = ts.Periodic(begin=0, end=0.75, period=100, total_steps=100_000)
    training, _ = run(ts.RigL(updates=updates), steps=100_000)
    assert training == pytest.approx(mean((99_249 * 0.6 + 751 * 1.4) / 300_000))


def test_nothing_sparse_is_dense():
    found = flops.run_flops({}, Products({"w": 10.0}, 2.0), 7)
    assert found == flops.RunFlops(12, 12, 252, 252)


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (ts.Magnitude(updates=ts.Periodic(begin=50, end=150, period=100)), "50, 150"),
        (ts.GraNet(updates=ts.Periodic(begin=0, end=100, period=40)), "0, 40, 80, 100"),
        (ts.Magnitude(updates=ts.Periodic(begin=50, end=150, period=25)), None),
        (ts.Magnitude(updates=ts.OneShot(step=50)), None),
        (ts.Magnitude(updates=ts.Periodic(begin=50, end=50, period=25)), None),
        (ts.RigL(updates=ts.Periodic(begin=50, end=150, period=100)), None),
        (ts.ACDC(updates=ts.Periodic(begin=50, end=150, period=50)), None),
        (ts.Static(), None),
    ],
)
def test_a_ramp_of_few_updates_is_warned_of(algorithm, steps):
    shapes = {"w": jax.ShapeDtypeStruct((40, 50), jnp.float32)}
    found = flops.ramp_warnings(make_plan(shapes, sparsity=0.8, algorithm=algorithm))
    if steps is None:
        assert not found
    else:
        (warning,) = found
        assert f"at steps {steps}; for a smooth ramp lower MASK_UPDATE_PERIOD" in warning


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateRamp(ts.Algorithm):
    """A user's own algorithm: a straight ramp, which starts half-way for weights named 'late'."""

    updates: ts.Periodic

    def share(self, path, step):
        progress = self.updates.progress(step)
        return jnp.maximum(2 * progress - 1, 0) if "late" in path else progress

    def update_masks(self, plan, update):
        kept = {}
        for path, layer in plan.items():
            kept |= scheduled_kept({path: layer}, self.share(path, update.step))
        return choose(plan, magnitudes(plan, update.weights), kept)

    def mask_densities(self, plan, updated):
        if updated is None:
            return dict.fromkeys(plan, 1.0)
        return {p: 1 - x.level * float(self.share(p, updated)) for p, x in plan.items()}


def test_an_algorithm_of_the_users_own_is_counted_by_its_own_ramp():
    config = ts.SparsityConfig(
        algorithm=LateRamp(updates=ts.Periodic(begin=2, end=8, period=2)), sparsity=0.75
    )
    weights = {
        p: np.random.default_rng(n).normal(size=(40, 50)).astype(np.float32)
        for n, p in enumerate(("early", "late"))
    }
    plan = config.plan(weights)
    state = init_state(config, plan, weights)

    @quick_jit
    def update(state, weights, step):
        found = train_step(
            plan,
            state,
            step=step,
            weights=weights,
            grads=weights,
            optimizer_state=None,
            gradient_step=lambda w, g, s: (w, s),
            updates_masks=True,
        )
        return found.state, found.weights

    def sparsities():
        kept = {p: packing.unpack(m, plan[p].shape).mean() for p, m in state.masks.items()}
        return {p: 1 - float(x) for p, x in kept.items()}

    products = Products({p: 2.0 * SIZE for p in plan}, 0.0)
    so_far, training, seen = flops.FlopsSoFar(plan, products), 0.0, []
    for step in range(12):
        found = scheduled_sparsities(plan, step)
        assert found == pytest.approx(
            {**sparsities(), "total": np.mean([*sparsities().values()])}, abs=1e-3
        )
        training += sum(3 * 2 * SIZE * (1 - x) for x in sparsities().values())
        if config.algorithm.updates.is_update(step):
            state, weights = update(state, weights, jnp.int32(step))
            seen.append(sparsities())
        counted = so_far.advance(step + 1)
        assert counted.training == pytest.approx(training, rel=1e-3)
        assert counted.forward == pytest.approx(
            sum(2 * SIZE * (1 - x) for x in sparsities().values()), rel=1e-3
        )
        whole = flops.run_flops(plan, products, step + 1)
        assert (whole.training, whole.forward) == (pytest.approx(counted.training), counted.forward)
    assert [x["early"] for x in seen] == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-3)
    assert [x["late"] for x in seen] == pytest.approx([0, 0, 0.25, 0.75], abs=1e-3)
    (warning,) = flops.ramp_warnings(plan)
    assert "the level of LateRamp rises in 4 mask updates only, at steps 2, 4, 6, 8" in warning
