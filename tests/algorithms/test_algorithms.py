import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import assert_moves_no_weight, collectives, mesh, put, quick_jit
from plans import make_plan
from selection_oracles import oracle

from t5x_sparsity.algorithms import SET, Dense, Magnitude, RigL, Static, Update
from t5x_sparsity.algorithms.common import choose, random_scores, scheduled_kept
from t5x_sparsity.core.patterns import NByM
from t5x_sparsity.core.plan import Rule
from t5x_sparsity.core.schedules import Constant, Cosine, Listed, OneShot, Periodic, Polynomial

UPDATES = Periodic(begin=1, end=6, period=2)  # at 1, 3, 5 and 6
STEPS = (1, 3, 5, 6)

# Every algorithm has a row here, and so goes through the contract.
ALGORITHMS = {
    "dense": Dense(),
    "static": Static(),
    "set": SET(updates=UPDATES),
    "rigl": RigL(updates=UPDATES),
    "rigl, everything dropped": RigL(updates=UPDATES, drop_fraction=Constant(value=1.0)),
    "magnitude": Magnitude(updates=UPDATES),
    "magnitude at once": Magnitude(updates=OneShot(step=3)),
    "magnitude, listed, linear": Magnitude(
        updates=Listed(steps=STEPS), level=Polynomial(initial=0.5, power=1)
    ),
}

SHAPES = {
    "dense_by_erk": (2, 2),
    "moe": (2, 12, 2, 20),
    "none_left": (4, 6),
    "one_left": (16, 6),
    "two_of_four": (16, 2, 8),
}
AXES = {
    "moe": ("expert", "embed", "layers", "mlp"),
    "two_of_four": ("embed", "layers", "mlp"),
}


@functools.cache
def the_plan():
    plan = make_plan(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()},
        sparsity=0.8,
        distribution="erk",
        rules=[
            Rule(path="two_of_four", pattern=NByM(n=2, m=4)),
            Rule(path="none_left", sparsity=1.0),
            Rule(path="one_left", sparsity=0.99),
        ],
        axes=AXES,
    )
    assert plan["dense_by_erk"].kept == 4
    assert plan["one_left"].kept == 1 and plan["none_left"].kept == 0
    return plan


def arrays(seed, *, ties=True):
    """Values for every weight of the plan; multiples of 1/4 where there are to be ties."""
    rng = np.random.default_rng(seed)
    values = {p: rng.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
    return {p: np.round(4 * x) / 4 for p, x in values.items()} if ties else values


def counts(layer, mask):
    """Weights kept by every slice."""
    mask = np.moveaxis(np.asarray(mask), layer.stack_axes, range(len(layer.stack_axes)))
    return mask.reshape(layer.slices, -1).sum(axis=1)


def key(seed=0):
    return jax.random.key(seed, impl="threefry2x32")


@functools.cache
def compiled(name):
    algorithm = ALGORITHMS[name]
    return (
        quick_jit(lambda w: algorithm.initial_masks(the_plan(), w, key())),
        quick_jit(lambda update: algorithm.update_masks(the_plan(), update)),
    )


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for path in found:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_contract(name):
    algorithm, plan = ALGORITHMS[name], the_plan()
    initial, update_masks = compiled(name)
    dense_first = isinstance(algorithm, Magnitude | Dense)
    masks = initial(arrays(0))
    assert_equal(initial(arrays(7)), masks)  # of the weights' shapes alone
    for path, layer in plan.items():
        assert masks[path].dtype == bool and masks[path].shape == SHAPES[path]
        expected = layer.slice_size if dense_first else layer.kept
        assert (counts(layer, masks[path]) == expected).all(), path
    for i, step in enumerate(STEPS):
        weights = {p: w * np.asarray(masks[p]) for p, w in arrays(10 + i).items()}
        if algorithm.masks_gradients is False:  # the optimizer has moved pruned weights off 0
            weights = {p: w + 100 * ~np.asarray(masks[p]) for p, w in weights.items()}
        grads = arrays(20 + i)
        if step == 3:
            grads = {p: np.full_like(g, np.nan) for p, g in grads.items()}
        update = Update(
            step=jnp.int32(step), weights=weights, grads=grads, masks=masks, key=key(step)
        )
        before, masks = masks, update_masks(update)
        assert_equal(update_masks(update), masks)
        for path, layer in plan.items():
            assert masks[path].dtype == bool and masks[path].shape == SHAPES[path]
            found = counts(layer, masks[path])
            if not dense_first:
                assert (found == layer.kept).all(), path
            elif isinstance(algorithm, Dense):
                assert (found == layer.slice_size).all()
            elif not isinstance(layer.pattern, NByM):
                level = algorithm.level(algorithm.updates.progress(step))
                expected = layer.slice_size - (layer.slice_size - layer.kept) * float(level)
                assert abs(found - expected).max() <= 0.5 + 1e-3, path
                assert (found == found[0]).all()
            else:  # whole groups, which all keep as many
                level = algorithm.level(algorithm.updates.progress(step))
                of_group = np.ceil(4 - 2 * float(level) - 1e-3)
                assert (found == layer.slice_size // 4 * of_group).all()
            back = np.asarray(masks[path]) & ~np.asarray(before[path])
            if algorithm.resets(before, masks):
                np.testing.assert_array_equal(algorithm.resets(before, masks)[path], back)
            else:
                assert not back.any(), path
    for path, layer in plan.items():
        if not isinstance(algorithm, Dense):
            assert (counts(layer, masks[path]) == layer.kept).all(), path
    if algorithm.resets(masks, masks):
        moved = [p for p in plan if (np.asarray(masks[p]) != np.asarray(initial({})[p])).any()]
        assert set(moved) >= {"moe", "two_of_four"}
        assert "dense_by_erk" not in moved and "none_left" not in moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl", "magnitude"])
def test_without_jit(name):
    plan = {p: the_plan()[p] for p in ("one_left", "two_of_four")}
    initial, update_masks = compiled(name)
    masks = initial({})
    update = Update(jnp.int32(3), arrays(1), arrays(2), masks, key(3))
    expected = update_masks(update)
    with jax.disable_jit():
        eager = ALGORITHMS[name].update_masks(plan, update)
    assert_equal(eager, {p: expected[p] for p in plan})


MESH_SHAPES = {"b": (64, 4, 32), "c": (32, 16)}
MESH_SPECS = {"b": ("y", None, "x"), "c": (None, "x")}


@functools.cache
def mesh_plan():
    return make_plan(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in MESH_SHAPES.items()},
        sparsity=0.8,
        rules=[Rule(path="c", pattern=NByM(n=2, m=4))],
        axes={"b": ("embed", "layers", "mlp")},
    )


@functools.cache
def mesh_run(name):
    algorithm = ALGORITHMS[name]

    @jax.jit
    def run(weights, grads):
        first = algorithm.initial_masks(mesh_plan(), weights, key())
        step = jnp.int32(5)
        return first, algorithm.update_masks(
            mesh_plan(), Update(step, weights, grads, first, key(1))
        )

    return run


@functools.cache
def mesh_values():
    rng = np.random.default_rng(0)
    weights, grads = (
        {p: np.round(8 * rng.normal(size=s)).astype(np.float32) for p, s in MESH_SHAPES.items()}
        for _ in range(2)
    )
    return weights, grads


@pytest.mark.parametrize(
    "name,shape",
    [("set", (2, 2)), ("rigl", (2, 1)), ("rigl", (1, 2)), ("rigl", (2, 2)), ("magnitude", (2, 2))],
)
def test_the_same_bit_for_bit_on_meshes(name, shape):
    weights, grads = mesh_values()
    alone = mesh_run(name)(weights, grads)
    devices = mesh(*shape)
    placed = [
        {p: put(devices, x, *MESH_SPECS[p]) for p, x in tree.items()} for tree in (weights, grads)
    ]
    program = mesh_run(name).lower(*placed).compile()
    for found, expected in zip(program(*placed), alone, strict=True):
        assert_equal(found, expected)
    text = program.as_text()
    assert collectives(text, "all-reduce")
    assert_moves_no_weight(text, largest=sum(x.slices for x in mesh_plan().values()))


# ---- each algorithm against its paper


def slices_of(layer):
    """Indices of every slice of a weight."""
    for at in np.ndindex(*(layer.shape[a] for a in layer.stack_axes)):
        index = [slice(None)] * len(layer.shape)
        for axis, i in zip(layer.stack_axes, at, strict=True):
            index[axis] = i
        yield tuple(index)


def stay_oracle(weights, mask, number):
    """The `number` active weights of largest magnitude."""
    flat = np.abs(weights).reshape(-1)
    active = [i for i in np.flatnonzero(mask.reshape(-1))]
    stay = sorted(active, key=lambda i: (-flat[i], i))[:number]
    out = np.zeros(flat.size, bool)
    out[stay] = True
    return out.reshape(weights.shape)


def rigl_oracle(weights, grads, mask, kept, fraction):
    """Algorithm 1 of arXiv:1911.11134, one layer."""
    dropped = int(np.round(np.float32(fraction) * np.float32(kept)))
    stay = stay_oracle(weights, mask, kept - dropped).reshape(-1)
    flat = np.abs(grads).reshape(-1)
    free = [i for i in range(flat.size) if not stay[i]]
    grown = sorted(free, key=lambda i: (np.isnan(flat[i]), -np.nan_to_num(flat[i]), i))[:dropped]
    out = stay.copy()
    out[grown] = True
    return out.reshape(mask.shape)


@pytest.mark.parametrize("name", ["rigl", "rigl, everything dropped"])
def test_rigl_is_the_papers(name):
    algorithm, plan = ALGORITHMS[name], the_plan()
    initial, update_masks = compiled(name)
    masks = initial({})
    for i, step in enumerate(STEPS):
        weights = {p: w * np.asarray(masks[p]) for p, w in arrays(30 + i).items()}
        grads = arrays(40 + i)
        grads["moe"][:, ::5] = np.nan
        found = update_masks(Update(jnp.int32(step), weights, grads, masks, key(step)))
        fraction = float(algorithm.drop_fraction(algorithm.updates.progress(step)))
        for path, layer in plan.items():
            if isinstance(layer.pattern, NByM):
                continue
            for at in slices_of(layer):
                expected = rigl_oracle(
                    weights[path][at], grads[path][at], np.asarray(masks[path][at]),
                    layer.kept, fraction,
                )  # fmt: skip
                np.testing.assert_array_equal(found[path][at], expected, err_msg=path)
        masks = found


def small(shape, algorithm, weights, grads, mask, *, step=0, kept=None, pattern=None):
    """One update of one weight."""
    kept = int(np.sum(mask)) if kept is None else kept
    plan = make_plan(
        {"w": jax.ShapeDtypeStruct(shape, jnp.float32)},
        sparsity=1 - kept / np.prod(shape),
        pattern=pattern,
    )
    assert plan["w"].kept == kept
    update = Update(
        jnp.int32(step),
        {"w": jnp.asarray(weights, jnp.float32)},
        {"w": jnp.asarray(grads, jnp.float32)},
        {"w": jnp.asarray(mask, bool)},
        key(),
    )
    return np.asarray(quick_jit(lambda u: algorithm.update_masks(plan, u))(update)["w"]).astype(int)


def test_rigl_by_hand():
    half = RigL(updates=OneShot(step=0), drop_fraction=Constant(value=0.5))
    mask = [[1, 1, 0, 0], [0, 1, 1, 0]]
    weights = [[0.9, -0.1, 0, 0], [0, -0.5, 0.3, 0]]
    # 0.1 and 0.3 are dropped; grown are -0.9 and 0.8
    grads = [[7.0, 0.2, -0.9, 0.1], [0.3, 9.0, 0.2, 0.8]]
    found = small((2, 4), half, weights, grads, mask)
    assert found.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    # what was just dropped may grow again; of equal gradients the lower index grows
    grads = [[0.0, 5.0, 0.4, 0.4], [0.4, 0.0, 0.0, 0.4]]
    found = small((2, 4), half, weights, grads, mask)
    assert found.tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]
    # of equal weights the higher index is dropped
    weights = [[0.2, 0.2, 0, 0], [0, -0.2, 0.2, 0]]
    grads = [[0, 0, 0, 1], [0, 0, 0, np.nan]]
    found = small((2, 4), half, weights, grads, mask)
    assert found.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_rigl_moves_within_n_by_m_and_keeps_it():
    pattern = NByM(n=2, m=4)
    quarter = RigL(updates=OneShot(step=0), drop_fraction=Constant(value=0.25))
    mask = [[1, 0], [1, 1], [0, 1], [0, 0], [1, 1], [1, 1], [0, 0], [0, 0]]
    weights = [[5, 0], [1, 6], [0, 7], [0, 0], [8, 2], [9, 6], [0, 0], [0, 0]]
    grads = [[0, 3], [1, 0], [2, 0], [4, 5], [0, 1], [0, 0], [9, 3], [9, 2]]
    # 1 and 2, the smallest of all, are dropped; each group grows back to two
    found = small((8, 2), quarter, weights, grads, mask, pattern=pattern)
    expected = [[1, 0], [0, 1], [0, 1], [1, 0], [1, 0], [1, 1], [0, 1], [0, 0]]
    assert found.tolist() == expected


def test_set_drops_the_smallest_and_grows_evenly():
    rng = np.random.default_rng(5)
    shape, kept = (8, 10), 20
    algorithm = SET(updates=OneShot(step=0), drop_fraction=Constant(value=0.3))
    mask = np.zeros(80, bool)
    mask[rng.permutation(80)[:kept]] = True
    mask = mask.reshape(shape)
    weights = rng.normal(size=shape).astype(np.float32) * mask
    plan = make_plan({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, sparsity=0.75)

    @quick_jit
    @jax.vmap
    def run(key):
        update = Update(jnp.int32(0), {"w": weights}, {"w": weights}, {"w": mask}, key)
        return algorithm.update_masks(plan, update)["w"]

    runs = 600
    found = np.asarray(run(jax.random.split(key(), runs)))
    assert (found.sum(axis=(1, 2)) == kept).all()
    stay = stay_oracle(weights, mask, 14)
    assert found[:, stay].all()
    # 6 grow among 66, the dropped ones included
    share = found[:, ~stay].mean(axis=0)
    p = 6 / 66
    assert share.shape == (66,)
    assert np.abs(share - p).max() < 5 * np.sqrt(p * (1 - p) / runs)
    together = found[:, ~stay].astype(float)
    assert np.abs(np.corrcoef(together, rowvar=False) - np.eye(66)).max() < 0.25


def test_magnitude_along_the_cubic_ramp():
    updates = Periodic(begin=10, end=50, period=10)
    algorithm = Magnitude(updates=updates)
    shape = (20, 50)
    plan = make_plan({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, sparsity=0.9)
    run = quick_jit(lambda u: algorithm.update_masks(plan, u))
    masks = {"w": jnp.ones(shape, bool)}
    for step, share in [(10, 0), (20, 0.25), (30, 0.5), (40, 0.75), (50, 1)]:
        weights = np.random.default_rng(step).normal(size=shape).astype(np.float32)
        before = np.asarray(masks["w"])
        masks = run(Update(jnp.int32(step), {"w": weights}, {"w": weights}, masks, key()))
        kept = 1000 - round(900 * (1 - (1 - share) ** 3))
        expected = oracle(np.abs(weights), kept, before)
        np.testing.assert_array_equal(masks["w"], expected)
    assert int(masks["w"].sum()) == 100


def test_magnitude_by_hand():
    weights = [[0.4, -0.9, 0.1, 0.2], [-0.3, 0.2, 0.0, np.nan]]
    mask = np.ones((2, 4), bool)
    found = small((2, 4), Magnitude(updates=OneShot(step=0)), weights, weights, mask, kept=4)
    assert found.tolist() == [[1, 1, 0, 1], [1, 0, 0, 0]]


def test_scheduled_counts_are_exact_at_the_ends():
    plan = make_plan({"w": jax.ShapeDtypeStruct((40_000, 50_001), jnp.bfloat16)}, sparsity=0.77)
    size, kept = 40_000 * 50_001, plan["w"].kept
    assert int(scheduled_kept(plan, jnp.float32(0))["w"]) == size
    assert int(scheduled_kept(plan, jnp.float32(1))["w"]) == kept
    middle = int(scheduled_kept(plan, jnp.float32(0.5))["w"])
    assert middle == pytest.approx(size - (size - kept) / 2, rel=1e-6)


# ---- randomness


def test_a_weights_stream_is_its_own():
    plan = the_plan()
    run = quick_jit(lambda k: random_scores(plan, k))
    whole = run(key(1))
    part = quick_jit(lambda k: random_scores({"moe": plan["moe"]}, k))(key(1))
    np.testing.assert_array_equal(part["moe"], whole["moe"])
    assert (np.asarray(run(key(2))["moe"]) != np.asarray(whole["moe"])).any()
    assert all(x.dtype == jnp.float32 for x in whole.values())
    flat = np.concatenate([np.asarray(x).reshape(-1) for x in whole.values()])
    assert len(np.unique(flat)) > 0.99 * flat.size  # no stream is used twice
    with jax.enable_x64(True):
        found = jax.eval_shape(lambda: random_scores(plan, key(1)))
        assert all(x.dtype == jnp.float32 for x in found.values())


def test_random_masks_keep_every_weight_as_often():
    plan = make_plan({"w": jax.ShapeDtypeStruct((6, 10), jnp.float32)}, sparsity=0.8)
    runs = 600
    keys = jax.random.split(key(3), runs)
    found = np.asarray(
        quick_jit(jax.vmap(lambda k: choose(plan, random_scores(plan, k))["w"]))(keys)
    )
    assert (found.sum(axis=(1, 2)) == 12).all()
    assert np.abs(found.mean(axis=0) - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / runs)


def test_configurations_are_frozen_and_compare():
    rigl = RigL(updates=UPDATES)
    assert rigl == RigL(updates=UPDATES, drop_fraction=Cosine(initial=0.3))
    assert hash(rigl) == hash(RigL(updates=UPDATES))
    assert rigl != SET(updates=UPDATES)
    with pytest.raises(AttributeError):
        rigl.take_gradient_step = True
    assert rigl.replaces_gradient_step
    assert not RigL(updates=UPDATES, take_gradient_step=True).replaces_gradient_step
