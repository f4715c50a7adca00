"""Runs of every algorithm by `train_step`, and all that must hold after each of their steps."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy_algorithms
from meshes import quick_jit
from numpy_algorithms import Optimizer, parts_of, slices_of, units_of

import t5x_sparsity as ts
from t5x_sparsity.algorithms import DENSE, GradualPruning, random_scores
from t5x_sparsity.core import packing
from t5x_sparsity.core.optimizer_slots import zero_slots
from t5x_sparsity.core.schedules import last_update
from t5x_sparsity.core.train_step import forward_weights, init_state, train_step

UPDATES = ts.Periodic(begin=1, end=6, period=2)  # at 1, 3, 5 and 6
STEPS = 9
HALF = ts.Constant(value=0.5)

# Every algorithm has a row here, and so goes through the contract.
ALGORITHMS = {
    "acdc": ts.ACDC(updates=UPDATES),
    "acdc, reset": ts.ACDC(updates=ts.Periodic(begin=1, end=7, period=2), reset_optimizer=True),
    "adam_fisher": ts.AdamFisher(updates=UPDATES),
    "adam_fisher, reset": ts.AdamFisher(updates=UPDATES, reset_optimizer=True),
    "decaying_mask": ts.DecayingMask(updates=ts.Periodic(begin=1, end=5, period=2)),
    "decaying_mask, straight": ts.DecayingMask(
        updates=ts.Periodic(begin=1, end=5, period=2), straight_through=True
    ),
    "dense": ts.Dense(),
    "global_magnitude": ts.GlobalMagnitude(updates=UPDATES),
    "global_magnitude, lamp": ts.GlobalMagnitude(updates=UPDATES, normalization="lamp"),
    "global_magnitude, raw": ts.GlobalMagnitude(updates=UPDATES, normalization=None),
    "global_saliency": ts.GlobalSaliency(updates=UPDATES, gradient_steps=2),
    "granet": ts.GraNet(updates=UPDATES),
    "iterative_nm": ts.IterativeNM(updates=UPDATES),
    "magnitude": ts.Magnitude(updates=UPDATES),
    "magnitude_ste": ts.MagnitudeSTE(updates=ts.Periodic(begin=0, end=6, period=1)),
    "mest": ts.MEST(updates=UPDATES, gradient_weight=0.5),
    "random": ts.RandomPruning(updates=UPDATES),
    "random_ste": ts.RandomSTE(updates=UPDATES, level=ts.Polynomial(initial=0.5, final=1.0)),
    "rigl": ts.RigL(updates=UPDATES),
    "rigl, gradient step too": ts.RigL(
        updates=UPDATES, drop_fraction=HALF, take_gradient_step=True
    ),
    "saliency": ts.Saliency(updates=UPDATES),
    "saliency, 3 gradients": ts.Saliency(
        updates=ts.Listed(steps=(1, 5, 7)), gradient_steps=3
    ),
    "set": ts.SET(updates=UPDATES),
    "snfs": ts.SNFS(updates=UPDATES, drop_fraction=HALF, momentum=0.5),
    "srigl": ts.SRigL(updates=UPDATES, drop_fraction=HALF),
    "srigl, no ablation": ts.SRigL(updates=UPDATES, drop_fraction=HALF, ablation_threshold=0),
    "sr_ste": ts.SRSTE(updates=ts.Periodic(begin=0, end=6, period=1), decay=0.25),
    "static": ts.Static(),
    "structure_decay": ts.StructureDecay(updates=UPDATES),
    "top_kast": ts.TopKAST(updates=UPDATES, regularizer=0.25),
}  # fmt: skip

SHAPES = {
    "channel": (6, 2, 8),
    "fan_in": (2, 8, 4),
    "largest": (6, 7),
    "mean": (3, 7, 6),
    "n_by_m": (8, 2, 6),
    "stack": (2, 8, 2, 6),
}
AXES = {
    "channel": ("embed", "layers", "mlp"),
    "fan_in": ("layers", "embed", "mlp"),
    "mean": ("layers", "embed", "mlp"),
    "n_by_m": ("embed", "layers", "mlp"),
    "stack": ("expert", "embed", "layers", "mlp"),
}
PATTERNS = {
    "channel": ts.Channel(),
    "fan_in": ts.ConstantFanIn(),
    "largest": ts.Block(height=4, width=2, pooling="max"),
    "mean": ts.Block(height=2, width=4),  # ragged on both sides
    "n_by_m": ts.NByM(n=2, m=4),
}
# what some algorithms need in place of the above
GROUPS = {"n_by_m": ts.NByM(n=2, m=8), "stack": ts.NByM(n=1, m=4, axis=-1)}
GROUP_SHAPES = {"n_by_m": (8, 2, 6), "stack": (2, 3, 2, 8)}
NEURON_SHAPES = {"fan_in": (2, 8, 4), "stack": (2, 3, 2, 4)}
# variants of others; two weights suffice
SMALL = (
    "acdc, reset", "adam_fisher, reset", "decaying_mask, straight", "global_magnitude, raw",
    "global_saliency", "random_ste", "rigl, gradient step too", "saliency, 3 gradients", "sr_ste",
)  # fmt: skip
# start by the same functions, and so need not be compiled anew
STARTS_AS = {"set": "rigl", "mest": "rigl"}


class Case(NamedTuple):
    """An algorithm and the plan that it is to follow."""

    algorithm: ts.Algorithm
    config: ts.SparsityConfig
    shapes: dict
    plan: dict

    @classmethod
    def of(cls, algorithm, shapes, patterns, axes, sparsity=0.75):
        config = ts.SparsityConfig(
            algorithm=algorithm,
            sparsity=sparsity,
            rules=[ts.Rule(path=f"^{p}$", pattern=x) for p, x in patterns.items() if p in shapes],
            seed=3,
        )
        like = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
        return cls(algorithm, config, shapes, config.plan(like, axes))


@functools.cache
def case_of(name):
    algorithm, shapes, patterns = ALGORITHMS[name], SHAPES, PATTERNS
    if isinstance(algorithm, ts.IterativeNM | ts.StructureDecay):
        shapes, patterns = GROUP_SHAPES, GROUPS
    if isinstance(algorithm, ts.SRigL):
        shapes = NEURON_SHAPES
        patterns = dict.fromkeys(shapes, ts.ConstantFanIn())
    if isinstance(algorithm, ts.GlobalMagnitude):
        shapes = {p: x for p, x in shapes.items() if p != "fan_in"}
    if name in SMALL:
        shapes = {p: shapes[p] for p in ("mean", "stack")}
    elif name not in ("snfs", "magnitude"):
        shapes = {p: x for p, x in shapes.items() if p != "largest"}
    return Case.of(algorithm, shapes, patterns, AXES)


def key_of(config, step=None):
    key = jax.random.key(config.seed, impl="threefry2x32")
    return key if step is None else jax.random.fold_in(key, step)


def draw(rng, shapes, unit=8):
    """Values of few bits, so that all arithmetic is exact, with ties."""
    return {p: np.float32(np.round(rng.normal(size=s) * unit) / unit) for p, s in shapes.items()}


class Programs(NamedTuple):
    """A start, and train steps with and without a mask update."""

    start: Callable
    step: Callable


@functools.cache
def programs(name):
    found = programs_of(case_of(name))
    if name not in STARTS_AS:
        return found
    case, other = case_of(name), case_of(STARTS_AS[name])
    for function in ("initial_masks", "initial_slots"):
        own, others = (getattr(type(x.algorithm), function) for x in (case, other))
        assert own is others and case.shapes == other.shapes
    return found._replace(start=programs(STARTS_AS[name]).start)


def programs_of(case):
    _, config, _, plan = case

    @quick_jit
    def start(weights):
        state = init_state(config, plan, weights)
        return state, forward_weights(plan, state, weights)

    @functools.partial(quick_jit, static_argnames="updates_masks")
    def step(state, weights, optimizer, grads, count, updates_masks):
        result = train_step(
            plan, state, step=count, weights=weights, grads=grads, optimizer_state=optimizer,
            gradient_step=functools.partial(Optimizer.step, jnp), updates_masks=updates_masks,
        )  # fmt: skip
        optimizer = zero_slots(result.optimizer_state, result.reset, weights)
        return result.state, result.weights, optimizer, result.alive, result.reset

    return Programs(start, step)


_DRAWN = {}


def uniform(case, step):
    """The random scores of a step, or of the start."""
    for path, layer in case.plan.items():
        if (path, layer.shape) not in _DRAWN:
            one = {path: layer}
            _DRAWN[path, layer.shape] = quick_jit(lambda key, one=one: random_scores(one, key))
    key = key_of(case.config, step)
    return {p: np.asarray(_DRAWN[p, x.shape](key)[p]) for p, x in case.plan.items()}


def assert_equal(found, expected, message=""):
    assert set(found) == set(expected), message
    for path in found:
        np.testing.assert_array_equal(
            np.asarray(found[path]), expected[path], err_msg=f"{message} {path}"
        )


def unpacked(plan, stored):
    return {p: np.asarray(packing.unpack(stored[p], layer.shape)) for p, layer in plan.items()}


def units_kept(layer, mask):
    """Units kept by every part of every slice; asserts that they are whole."""
    counts = []
    for at in slices_of(layer):
        flat = mask[at].reshape(-1)
        units = [flat[unit] for unit in units_of(layer.pattern, layer.slice_shape)]
        assert all(unit.all() or not unit.any() for unit in units)
        alive = np.array([unit.any() for unit in units])
        counts.append([alive[part].sum() for part in parts_of(layer.pattern, layer.slice_shape)])
    return np.array(counts)


def types_of(tree):
    leaves = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    return jax.tree.structure(tree), leaves


def check_counts(algorithm, plan, masks, step):
    """The numbers kept after the step: from the definition of each family."""
    schedule = algorithm.updates
    updated = schedule.last is not None and step >= getattr(schedule, "begin", 0)
    finished = schedule.last is not None and step >= schedule.last
    if isinstance(algorithm, ts.GlobalMagnitude):
        if finished:
            rest = {p: x for p, x in plan.items() if not isinstance(x.pattern, ts.NByM)}
            total = sum(round(x.slice_size * x.kept / x.units) * x.slices for x in rest.values())
            largest = max(len(u) for x in rest.values() for u in units_of(x.pattern, x.slice_shape))
            found = sum(int(masks[p].sum()) for p in rest)
            assert total <= found < total + largest
        plan = {p: x for p, x in plan.items() if isinstance(x.pattern, ts.NByM)}
    for path, layer in plan.items():
        found = units_kept(layer, masks[path])
        if isinstance(algorithm, ts.SRigL):
            for of_slice in found:  # neurons have none, or as many as the others
                assert len(set(of_slice) - {0}) == 1
                assert layer.kept - (of_slice > 0).sum() < of_slice.sum() <= layer.kept
                if not algorithm.ablation_threshold:
                    assert of_slice.sum() == layer.kept
            continue
        always = isinstance(
            algorithm, ts.RigL | ts.SET | ts.SNFS | ts.MEST | ts.Static | ts.TopKAST
        ) or type(algorithm) in (ts.MagnitudeSTE, ts.SRSTE)
        once = isinstance(algorithm, ts.DecayingMask) and updated
        if always or once or finished:
            assert (found.sum(axis=1) == layer.kept).all(), path
            assert (found == found[0, 0]).all() or found.shape[1] == 1, path
        else:
            assert (found.sum(axis=1) == found[0].sum()).all(), path


def check_densities(algorithm, plan, masks, step):
    """What masks keep after the step is what the algorithm says of it, but for rounding."""
    densities = algorithm.mask_densities(plan, last_update(algorithm.updates, step + 1))
    assert set(densities) == set(plan)
    total, slack = 0, 1
    for path, layer in plan.items():
        assert type(densities[path]) is float and 0 <= densities[path] <= 1
        units = units_of(layer.pattern, layer.slice_shape)
        parts = len(parts_of(layer.pattern, layer.slice_shape))
        total += masks[path].sum() - densities[path] * layer.size
        slack += max(len(unit) for unit in units) * parts * layer.slices
        if not (algorithm.is_global and layer.in_budget):
            found = units_kept(layer, masks[path]).sum(axis=1)
            assert (abs(found - densities[path] * layer.units) <= parts).all(), path
    assert abs(total) <= slack


def run(case, programs, seed, unit=8):
    """A run, with all that must hold after each of its steps, beside the reference's.

    Returns how many weights a drop-and-grow algorithm has brought back.
    """
    algorithm, _, shapes, plan = case
    start, step = programs
    rng = np.random.default_rng(seed)
    dense = draw(rng, shapes, unit)
    state, weights = start(dense)
    optimizer = jax.tree.map(jnp.asarray, Optimizer.start(dense))
    whole = numpy_algorithms.Reference(
        algorithm, plan, dense, Optimizer.start(dense), functools.partial(uniform, case)
    )
    assert_equal(unpacked(plan, state.masks), {p: whole.masks[p] for p in plan}, "start:")
    check_densities(algorithm, plan, unpacked(plan, state.masks), -1)
    assert_slots(plan, state, whole)
    types = None
    swapped = 0
    for t in range(STEPS):
        grads = draw(rng, shapes, min(unit, 4))
        due = bool(algorithm.updates.is_update(t))
        before, old = whole.masks, state
        state, weights, optimizer, alive, reset = step(
            state,
            weights,
            optimizer,
            jax.tree.map(jnp.asarray, grads),
            jnp.int32(t),
            updates_masks=due,
        )
        whole.step(t, grads)
        masks = unpacked(plan, state.masks)
        message = f"step {t}:"
        assert_equal(masks, {p: whole.masks[p] for p in plan}, message)
        assert_equal(weights, {p: whole.weights.get(p, x) for p, x in weights.items()}, message)
        for slot in ("mu", "nu"):
            assert_equal(optimizer[slot], whole.optimizer[slot], f"{message} {slot}")
        assert_slots(plan, state, whole)
        assert_equal(alive, {p: whole.masks[p] & before[p] for p in plan}, message)
        for p, x in reset.items():
            np.testing.assert_array_equal(x, whole.reset[p])
        check_counts(algorithm, plan, masks, t)
        check_densities(algorithm, plan, masks, t)
        # said once more, for the reference may err as the code does
        for p in plan:
            if not isinstance(algorithm, ts.DecayingMask) or t >= algorithm.updates.last:
                assert (np.asarray(weights[p])[~masks[p]] == 0).all(), p
            grown = masks[p] & ~before[p]
            if isinstance(algorithm, ts.RigL | ts.SET | ts.SNFS | ts.MEST | ts.GraNet):
                swapped += grown.sum()
                assert (np.asarray(weights[p])[grown] == 0).all(), p
                for slot in ("mu", "nu"):
                    assert (np.asarray(optimizer[slot][p])[grown] == 0).all(), p
            if isinstance(algorithm, GradualPruning):
                assert not grown.any(), p
        now = types_of((state, weights, optimizer))
        assert types in (None, now)
        types = now
        assert types_of(old)[0] == types_of(state)[0]
    assert step._cache_size() <= 2
    return swapped


def assert_slots(plan, state, whole):
    for name, slots in state.slots.items():
        if name == DENSE:
            expected = {p: whole.dense[p] for p in plan}
        elif name == "backward":
            slots, expected = unpacked(plan, slots), whole.slots["backward"]
        elif name == "gradient_sums":
            continue  # seen in the masks
        else:
            expected = whole.slots[name]
        assert_equal(slots, expected, name)
