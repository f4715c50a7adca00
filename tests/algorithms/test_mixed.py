"""Rules with algorithms of their own in one run, dense weights under `sparsify`, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_algorithms
import optax
import pytest
from algorithm_runs import Case, draw, uniform, unpacked
from meshes import quick_jit
from numpy_algorithms import Optimizer

import t5x_sparsity as ts
from t5x_sparsity.algorithms import DENSE
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.plan import update_schedules
from t5x_sparsity.core.schedules import Never
from t5x_sparsity.core.train_step import forward_weights, init_state, train_step

ONCE = ts.OneShot(step=0)
RULES = {
    "fisher": ts.Rule(
        path="fisher", algorithm=ts.AdamFisher(updates=ts.OneShot(step=1), reset_optimizer=True)
    ),
    "n_by_m": ts.Rule(
        path="n_by_m",
        pattern=ts.NByM(n=2, m=4),
        algorithm=ts.Magnitude(updates=ts.Periodic(begin=1, end=5, period=2)),
    ),
    "rigl": ts.Rule(
        path="rigl",
        sparsity=0.875,
        algorithm=ts.RigL(updates=ts.OneShot(step=3), drop_fraction=ts.Constant(value=0.5)),
    ),
    "set": ts.Rule(
        path="set",
        sparsity=0.5,
        algorithm=ts.SET(updates=ts.Listed(steps=(2, 4)), drop_fraction=ts.Constant(value=0.5)),
    ),
    "snfs": ts.Rule(
        path="snfs",
        algorithm=ts.SNFS(
            updates=ts.OneShot(step=4), momentum=0.5, drop_fraction=ts.Constant(value=0.5)
        ),
    ),
    "ste": ts.Rule(
        path="ste",
        algorithm=ts.MagnitudeSTE(updates=ts.Periodic(begin=0, end=6, period=1)),
    ),
}
SHAPES = {
    "fisher": (4, 7),
    "n_by_m": (8, 2),
    "rigl": (4, 8),
    "run": (4, 6),
    "set": (6, 4),
    "snfs": (3, 8),
    "ste": (4, 4),
}


@pytest.mark.slow
def test_each_weight_does_as_it_would_alone():
    config = ts.SparsityConfig(
        algorithm=ts.Static(), sparsity=0.75, rules=list(RULES.values()), seed=3
    )
    shapes = {**SHAPES, "bias": (5,)}
    plan = config.plan({p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()})
    assert set(plan) == set(SHAPES)
    assert plan["n_by_m"].sparsity == 0.5 and plan["rigl"].kept == 4

    @functools.partial(quick_jit, static_argnames="updates_masks")
    def step(state, weights, optimizer, grads, count, updates_masks):
        result = train_step(
            plan, state, step=count, weights=weights, grads=grads, optimizer_state=optimizer,
            gradient_step=functools.partial(Optimizer.step, jnp), updates_masks=updates_masks,
        )  # fmt: skip
        return (
            result.state,
            result.weights,
            zero_slots(result.optimizer_state, result.reset, weights),
        )

    rng = np.random.default_rng(0)
    start = draw(rng, shapes)
    optimizer = Optimizer.start(start)
    alone = {}
    for p, layer in plan.items():
        case = Case(layer.algorithm, config, {p: SHAPES[p]}, {p: layer})
        own = {name: {p: slots[p]} for name, slots in optimizer.items()}
        alone[p] = numpy_algorithms.Reference(
            layer.algorithm, case.plan, {p: start[p]}, own, functools.partial(uniform, case)
        )
    state = quick_jit(lambda w: init_state(config, plan, w))(start)
    weights = jax.tree.map(jnp.asarray, forward_weights(plan, state, start))
    optimizer = jax.tree.map(jnp.asarray, optimizer)
    moves = dict.fromkeys(plan, 0)
    for t in range(8):
        grads = draw(rng, shapes, 4)
        due = any(schedule.is_update(t) for schedule in update_schedules(plan))
        assert due == (t <= 6)
        old, old_masks = weights, unpacked(plan, state.masks)
        old_optimizer, old_dense = optimizer, state.slots[DENSE]
        state, weights, optimizer = step(
            state, weights, optimizer, grads, jnp.int32(t), updates_masks=due
        )
        masks = unpacked(plan, state.masks)
        for p, one in alone.items():
            # RigL's update takes the place of the gradient step for all weights
            one.step(t, {p: grads[p]}, replaced=t == 3)
            np.testing.assert_array_equal(masks[p], one.masks[p], err_msg=f"{t} {p}")
            np.testing.assert_array_equal(weights[p], one.weights[p], err_msg=f"{t} {p}")
            for slot in ("mu", "nu"):
                np.testing.assert_array_equal(optimizer[slot][p], one.optimizer[slot][p])
            moves[p] += (masks[p] != old_masks[p]).sum()
        np.testing.assert_array_equal(state.slots[DENSE]["ste"], alone["ste"].dense["ste"])
        np.testing.assert_array_equal(
            state.slots["momentum"]["snfs"], alone["snfs"].slots["momentum"]["snfs"]
        )
        assert set(state.slots) == {DENSE, "momentum"}
        if t == 3:  # nothing but what the masks and the zeroed slots change
            np.testing.assert_array_equal(weights["bias"], old["bias"])
            np.testing.assert_array_equal(state.slots[DENSE]["ste"], old_dense["ste"])
            for p in ("run", "set", "snfs", "ste"):
                np.testing.assert_array_equal(weights[p], old[p])
                np.testing.assert_array_equal(optimizer["mu"][p], old_optimizer["mu"][p])
        else:
            moved, _ = Optimizer.step(
                np,
                {"bias": np.asarray(old["bias"])},
                grads,
                jax.tree.map(np.asarray, old_optimizer),
            )
            np.testing.assert_array_equal(weights["bias"], moved["bias"])
    assert moves.pop("run") == 0 and all(moves.values()), moves
    assert step._cache_size() == 2


def params_and_dense(algorithm, inner, steps, **kwargs):
    """Params after every step of `sparsify`, with its state. Optimized code fuses additions."""
    tx = ts.sparsify(inner, algorithm, sparsity=0.75, **kwargs)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = quick_jit(tx.init)(params)
    params = ts.apply_masks(params, state)
    for _ in range(steps):
        grads = {"w": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)}
        params, state = step(params, state, grads)
        mask = unpacked({"w": params["w"]}, state.sparsity.masks)["w"]
        yield np.asarray(params["w"]), mask, state
    assert step._cache_size() == 1


def test_params_are_the_dense_weights_under_the_mask():
    algorithm = ts.MagnitudeSTE(updates=ts.Periodic(begin=0, end=30, period=3))
    for params, mask, state in params_and_dense(algorithm, optax.adam(0.1), 60):
        dense = np.asarray(state.sparsity.slots[DENSE]["w"])
        assert (params[~mask] == 0).all()
        # to the rounding of one addition: what has been rounded off must not add up
        assert (np.abs(params - dense)[mask] <= np.spacing(np.abs(dense[mask]))).all()
        assert mask.sum() == 24


def test_what_a_decaying_mask_leaves():
    algorithm = ts.DecayingMask(updates=ts.Periodic(begin=2, end=6, period=2))
    runs = params_and_dense(algorithm, optax.sgd(0.5), 9)
    for t, (params, mask, state) in enumerate(runs):
        dense = np.asarray(state.sparsity.slots[DENSE]["w"])
        left = min(max(1 - (t + 1 - 2) / 4, 0), 1)
        assert (mask.sum() == 24) == (t >= 2)
        np.testing.assert_allclose(
            params, np.where(mask, dense, left * dense), rtol=1e-5, atol=1e-6
        )
    assert (params[~mask] == 0).all() and (dense[~mask] != 0).all()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: ts.ACDC(updates=ONCE), "ACDC.updates must be Periodic, .* got OneShot"),
        (
            lambda: ts.GlobalMagnitude(updates=ONCE, normalization="l1"),
            r"normalization \(NORMALIZATION\) must be one of \('norm', 'lamp', None\), got 'l1'",
        ),
        (lambda: ts.GlobalSaliency(updates=ONCE, normalization=1), "must be one of .* got 1"),
        (
            lambda: ts.GlobalSaliency(updates=ONCE, gradient_steps=0),
            r"gradient_steps \(GRADIENT_STEPS\) must be an integer of at least 1, got 0",
        ),
        (lambda: ts.Saliency(updates=ONCE, gradient_steps=0), "at least 1, got 0"),
        (lambda: ts.Saliency(updates=ONCE, gradient_steps=True), "at least 1, got True"),
        (lambda: ts.Saliency(updates=ONCE, gradient_steps=1.5), "at least 1, got 1.5"),
        (
            lambda: ts.GraNet(updates=ONCE, initial_sparsity=1.5),
            r"initial_sparsity \(INITIAL_SPARSITY\) must be a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: ts.MEST(updates=ONCE, gradient_weight=-1.0),
            r"gradient_weight \(GRADIENT_WEIGHT\) must not be negative, got -1.0",
        ),
        (lambda: ts.MEST(updates=ONCE, gradient_weight=float("nan")), "negative, got nan"),
        (
            lambda: ts.SNFS(updates=ONCE, momentum=1.0),
            r"momentum \(MOMENTUM\) must be a number in \[0, 1\), got 1.0",
        ),
        (
            lambda: ts.SRigL(updates=ONCE, ablation_threshold=-0.1),
            r"ablation_threshold \(ABLATION_THRESHOLD\) must be a number in \[0, 1\], got -0.1",
        ),
        (
            lambda: ts.SRSTE(updates=ONCE, decay=-1.0),
            r"decay \(PRUNED_WEIGHT_DECAY\) must not be negative, got -1.0",
        ),
        (
            lambda: ts.TopKAST(updates=ONCE, regularizer=-1.0),
            r"regularizer \(REGULARIZER\) must not be negative, got -1.0",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bounds_are_allowed():
    ts.GraNet(updates=ONCE, initial_sparsity=0)
    ts.GraNet(updates=ONCE, initial_sparsity=1)
    ts.MEST(updates=ONCE, gradient_weight=0)
    ts.SNFS(updates=ONCE, momentum=0)
    ts.SRigL(updates=ONCE, ablation_threshold=1)
    ts.SRSTE(updates=ONCE, decay=0)
    ts.TopKAST(updates=ONCE, regularizer=0)
    assert isinstance(ts.Static().updates, Never) and isinstance(ts.Dense().updates, Never)


@pytest.mark.parametrize(
    "algorithm,name",
    [
        (ts.SRigL(updates=ONCE), "ConstantFanIn"),
        (ts.IterativeNM(updates=ONCE), "NByM"),
        (ts.StructureDecay(updates=ONCE), "NByM"),
    ],
)
def test_needed_patterns(algorithm, name):
    tx = ts.sparsify(
        optax.sgd(0.1),
        algorithm,
        pattern=getattr(ts, name)(**({"n": 2, "m": 4} if name == "NByM" else {})),
        rules=[ts.Rule(path="other", pattern=ts.Unstructured())],
    )
    fits = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    other = {"other": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    message = (
        rf"{type(algorithm).__name__} needs the pattern {name}, but the weights \['other'\] have "
        rf"another; bind SparsityConfig.pattern, .* @t5x_sparsity.{name}\(\)"
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.init, {**fits, **other})


def test_one_threshold_needs_units_chosen_together():
    tx = ts.sparsify(optax.sgd(0.1), ts.GlobalMagnitude(updates=ONCE), pattern=ts.ConstantFanIn())
    params = {"w": jnp.ones((8, 4))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"chooses part by part, .* weights \['w'\] have it"):
        jax.eval_shape(tx.update, params, state, params)


def test_adam_fisher_needs_second_moments():
    params = {"w": jnp.ones((8, 4))}
    tx = ts.sparsify(optax.sgd(0.1, momentum=0.9), ts.AdamFisher(updates=ONCE))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"no second moment \(nu or v\) of the weights \['w'\]"):
        jax.eval_shape(tx.update, params, state, params)
