import jax
import jax.numpy as jnp
import pytest

import t5x_sparsity as ts
from t5x_sparsity import flops
from t5x_sparsity.plan import make_plan

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
