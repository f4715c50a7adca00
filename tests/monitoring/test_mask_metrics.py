"""What a run reports of its masks, against counts by numpy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import assert_moves_no_weight, mesh, put, quick_jit
from plans import make_plan

import t5x_sparsity as ts
from t5x_sparsity.core import packing, schedules
from t5x_sparsity.core.train_step import EXPLORED, init_state, train_step
from t5x_sparsity.monitoring import flops
from t5x_sparsity.monitoring.mask_metrics import (
    IMAGE_CELLS,
    flops_scalars,
    mask_counts,
    mask_pictures,
    mask_scalars,
    pictured,
    scheduled_sparsities,
)
from t5x_sparsity.monitoring.matrix_products import Products

SHAPES = {"a/kernel": (64, 10), "b/kernel": (10, 20), "c/kernel": (3, 16, 64)}
AXES = {"c/kernel": ("layers", "embed", "mlp")}


def plan_of(shapes=SHAPES, axes=AXES, **kwargs):
    arrays = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
    return make_plan(arrays, **{"sparsity": 0.8, "axes": axes, **kwargs})


def random_masks(plan, seed, density):
    rng = np.random.default_rng(seed)
    return {p: rng.random(layer.shape) < density for p, layer in plan.items()}


def packed(plan, own):
    return {p: packing.pack(jnp.asarray(own[p]), layer.pack_axis) for p, layer in plan.items()}


@settings(max_examples=15, deadline=None)
@given(seeds=st.integers(0, 10**6), before=st.floats(0, 1), after=st.floats(0, 1))
def test_counts_and_shares_are_numpys(seeds, before, after):
    plan = plan_of()
    old, new = random_masks(plan, seeds, before), random_masks(plan, seeds + 1, after)
    ever = {p: old[p] | new[p] for p in plan}
    counts = quick_jit(mask_counts)(packed(plan, new), packed(plan, old), packed(plan, ever))
    assert counts.shape == (4, 3) and counts.dtype == jnp.float32
    found = mask_scalars(plan, np.asarray(counts), targets={}, updated=set(plan), explored=True)
    for path in [*plan, "total"]:
        some = [path] if path in plan else list(plan)

        def count(own, some=some):
            return sum(int(own[p].sum()) for p in some)

        size = sum(layer.size for p, layer in plan.items() if p in some)
        grown = count({p: new[p] & ~old[p] for p in plan})
        assert found[f"sparsity/{path}"] == pytest.approx(1 - count(new) / size)
        assert found[f"mask_grown/{path}"] == grown
        assert found[f"mask_dropped/{path}"] == count({p: old[p] & ~new[p] for p in plan})
        assert found[f"mask_churn/{path}"] == pytest.approx(grown / max(count(new), 1))
        assert found[f"mask_explored/{path}"] == pytest.approx(count(ever) / size)


def test_names_say_what_happened():
    plan = plan_of()
    own = packed(plan, random_masks(plan, 0, 0.5))
    counts = np.asarray(mask_counts(own, own, {}))
    assert (counts[1:] == 0).all()
    names = mask_scalars(plan, counts, targets={"total": 0.5}, updated=set())
    assert {n.split("/")[0] for n in names} == {"sparsity", "sparsity_target"}
    assert names["sparsity_target/total"] == 0.5
    assert len([n for n in names if n.startswith("sparsity/")]) == 4
    assert mask_scalars({}, np.zeros((4, 0)), targets={}, updated=set()) == {}


def test_churn_is_of_the_weights_that_were_updated():
    plan = plan_of()
    old, new = random_masks(plan, 0, 0.5), random_masks(plan, 1, 0.5)
    counts = np.asarray(mask_counts(packed(plan, new), packed(plan, old), {}))
    names = mask_scalars(plan, counts, targets={}, updated={"a/kernel", "c/kernel"})
    churned = {n.split("/", 1)[1] for n in names if n.startswith("mask_churn/")}
    assert churned == {"a/kernel", "c/kernel", "total"}
    both = [(old[p], new[p]) for p in ("a/kernel", "c/kernel")]
    grown = sum(int((b & ~a).sum()) for a, b in both)
    assert names["mask_grown/total"] == grown
    assert names["mask_dropped/total"] == sum(int((a & ~b).sum()) for a, b in both)
    assert names["mask_churn/total"] == pytest.approx(grown / sum(b.sum() for _, b in both))


def test_targets_follow_the_schedule():
    # the cubic ramp of gradual pruning, by hand: 1 - (1 - 1/2)^3 of the level at half way
    plan = plan_of(
        algorithm=ts.Magnitude(updates=ts.Periodic(begin=10, end=30, period=10)),
        rules=[ts.Rule(path="b/", sparsity=0.5, algorithm=ts.Static())],
    )
    assert scheduled_sparsities(plan, 10)["a/kernel"] == 0
    for step, share in ((11, 0), (20, 0), (21, 0.875), (30, 0.875), (31, 1), (1000, 1)):
        found = scheduled_sparsities(plan, step)
        assert found["a/kernel"] == pytest.approx(0.8 * share, abs=1e-3), step
        assert found["b/kernel"] == 0.5
        sizes = {p: layer.size for p, layer in plan.items()}
        total = sum(found[p] * n for p, n in sizes.items()) / sum(sizes.values())
        assert found["total"] == pytest.approx(total)


def test_layers_under_one_threshold_have_no_target_of_their_own():
    updates = ts.Periodic(begin=0, end=10, period=10)
    plan = plan_of(algorithm=ts.GlobalMagnitude(updates=updates))
    assert scheduled_sparsities(plan, 11) == {"total": pytest.approx(0.8, abs=1e-3)}
    assert scheduled_sparsities({}, 11) == {}


SCHEDULES = [
    ts.Periodic(begin=3, end=20, period=4),
    ts.Periodic(begin=0, end=7, period=100),
    ts.OneShot(step=5),
    ts.Listed(steps=[2, 3, 11]),
    ts.Never(),
]


@pytest.mark.parametrize("updates", SCHEDULES, ids=repr)
def test_the_last_update_is_the_one_a_search_finds(updates):
    for since in (0, 4, 12):
        for step in range(30):
            due = [t for t in range(since, step) if updates.is_update(t)]
            assert schedules.last_update(updates, step, since) == max(due, default=None)


@pytest.mark.parametrize("updates", SCHEDULES[:4], ids=repr)
@pytest.mark.parametrize("algorithm", [ts.RigL, ts.Magnitude, ts.MagnitudeSTE, ts.ACDC])
def test_flops_add_up_in_whatever_periods(algorithm, updates):
    plan = (
        plan_of(algorithm=algorithm(updates=updates))
        if algorithm is not ts.ACDC
        else plan_of(algorithm=ts.ACDC(updates=SCHEDULES[0]))
    )
    products = Products({p: 7.0 * layer.size for p, layer in plan.items()}, 500.0)
    counter = flops.FlopsSoFar(plan, products)
    for step in (1, 2, 9, 9, 30):
        found = counter.advance(step)
        whole = flops.run_flops(plan, products, step)
        assert found == pytest.approx(whole)
    # from another first step: what comes after it alone
    rest = flops.FlopsSoFar(plan, products, 9).advance(30)
    first = flops.run_flops(plan, products, 9)
    assert rest.training == pytest.approx(found.training - first.training)
    assert rest.dense_training == pytest.approx(3 * products.total * 21)
    with pytest.raises(ValueError, match="counted up to 30 already, got 29"):
        counter.advance(29)


def test_flops_by_hand():
    plan = plan_of({"w": (10, 10)}, {}, algorithm=ts.Static(), sparsity=0.75)
    found = flops_scalars(flops.FlopsSoFar(plan, Products({"w": 400.0}, 100.0)).advance(2))
    assert found == {
        "flops/training": 2 * 3 * (100 + 100),
        "flops/training_dense": 2 * 3 * 500,
        "flops/training_share": 0.4,
        "flops/inference": 200,
        "flops/inference_dense": 500,
        "flops/inference_share": 0.4,
    }
    assert "flops/training_share" not in flops_scalars(flops.RunFlops(0, 0, 0, 0))


PICTURES = {
    "small": ((6, 5), None, ()),
    "large": ((300, 700), None, ()),
    "query": ((40, 4, 8), ("embed", "heads", "kv"), ()),
    "out": ((4, 8, 40), ("heads", "kv", "embed"), ()),
    "stacked": ((200, 3, 30), ("embed", "layers", "mlp"), (1,)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_share_kept_in_each_cell(name):
    shape, names, stacks = PICTURES[name]
    plan = plan_of({name: shape}, {name: names} if names else {})
    own = random_masks(plan, 0, 0.3)
    image, fan_in = quick_jit(lambda m: mask_pictures(plan, m))(packed(plan, own))[name]
    mask = own[name]
    for axis in stacks:
        mask = mask.take(0, axis)
    outputs = 2 if name == "query" else 1
    matrix = mask.reshape(int(np.prod(mask.shape[:-outputs])), -1)
    rows, columns = (-(-n // IMAGE_CELLS) for n in matrix.shape)
    slow = [
        [matrix[r : r + rows, c : c + columns].mean() for c in range(0, matrix.shape[1], columns)]
        for r in range(0, matrix.shape[0], rows)
    ]
    assert max(image.shape) <= IMAGE_CELLS
    np.testing.assert_allclose(image, slow, rtol=1e-6)
    np.testing.assert_array_equal(fan_in, matrix.sum(0))
    if name in ("small", "query"):
        np.testing.assert_array_equal(image, matrix)


@pytest.mark.parametrize("spec", [("x", "y"), ("y", None), (None, ("x", "y"))])
def test_no_weight_moves_for_a_picture_or_a_count(spec):
    plan = plan_of({"w": (2048, 1024)}, {})
    own = random_masks(plan, 1, 0.2)
    stored = {"w": put(mesh(2, 4), packed(plan, own)["w"], *spec)}
    everywhere = jax.sharding.NamedSharding(mesh(2, 4), jax.sharding.PartitionSpec())

    def both(stored):
        return mask_counts(stored, stored, stored), mask_pictures(plan, stored)

    compiled = jax.jit(both, out_shardings=everywhere).lower(stored).compile()
    # a cell's row of a whole weight may move, by whatever collective: a sixteenth of it here
    assert_moves_no_weight(compiled.as_text(), IMAGE_CELLS * 1024, gathers=True)
    counts, pictures = compiled(stored)
    assert int(counts[0, 0]) == own["w"].sum()
    np.testing.assert_array_equal(pictures["w"][1], own["w"].sum(0))


def test_few_weights_are_pictured():
    names = [f"layer_{i:03}/kernel" for i in range(50)]
    plan = plan_of(dict.fromkeys(names, (8, 8)), {})
    shown = pictured(plan)
    assert len(shown) == len(set(shown)) == 12
    assert shown[0] == names[0] and shown[-1] == names[-1]
    assert pictured(plan_of()) == list(SHAPES)


def explored_run(algorithm, steps=12):
    """The masks of every step of a run, and the explored share's slot at the end."""
    config = ts.SparsityConfig(algorithm=algorithm, sparsity=0.8, track_explored=True)
    weights = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    plan = config.plan(weights)
    state = init_state(config, plan, weights)
    seen = [np.asarray(packing.unpack(state.masks["w"], (64, 32)))]

    for step in range(steps):
        grads = {"w": jax.random.normal(jax.random.key(step + 1), (64, 32))}
        result = train_step(
            plan,
            state,
            step=step,
            weights=weights,
            grads=grads,
            optimizer_state=(),
            gradient_step=lambda w, g, s: ({p: w[p] - 0.1 * g[p] for p in w}, s),
            updates_masks=bool(algorithm.updates.is_update(step)),
        )
        weights, state = result.weights, result.state
        seen.append(np.asarray(packing.unpack(state.masks["w"], (64, 32))))
    return seen, state.slots


@pytest.mark.parametrize("algorithm", [ts.SET, ts.SNFS, ts.TopKAST, ts.Magnitude])
def test_the_explored_weights_are_those_ever_kept(algorithm):
    seen, slots = explored_run(algorithm(updates=ts.Periodic(begin=1, end=9, period=2)))
    ever = np.asarray(packing.unpack(slots[EXPLORED]["w"], (64, 32)))
    np.testing.assert_array_equal(ever, np.logical_or.reduce(seen))
    assert ever.sum() > seen[-1].sum()


def test_a_slot_may_not_take_the_name():
    class Mine(ts.Static):
        def initial_slots(self, plan, weights, masks):
            return {"explored": packing}

    config = ts.SparsityConfig(algorithm=Mine())
    weights = {"w": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="'rng', 'explored' and names with '/' are taken"):
        init_state(config, config.plan(weights), weights)
