"""Every method, from its gin file, over stacked layers, on the host in use."""

import functools

import gin
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_t5
from flax import traverse_util
from jax.sharding import PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity.algorithms import DENSE
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten

METHODS = sorted(
    p.stem
    for p in (tiny_t5.ROOT / "gin/sparsity").glob("*.gin")
    if p.stem not in ("base", "from_dense")
)
UNMOVED = ("dense", "static")
# The level of these never changes, at an update or between.
ALWAYS_SPARSE = ("magnitude_ste", "mest", "random_ste", "rigl", "set", "snfs", "sr_ste", "srigl")
ALWAYS_SPARSE += ("static", "top_kast")
GLOBAL = ("global_magnitude", "global_saliency", "lamp")
SLOTS = {
    "decaying_mask": {DENSE},
    "global_saliency": {"gradient_sums"},
    "magnitude_ste": {DENSE},
    "random_ste": {DENSE},
    "saliency": {"gradient_sums"},
    "snfs": {"momentum"},
    "sr_ste": {DENSE},
    "structure_decay": {DENSE},
    "top_kast": {DENSE, "backward"},
}

STEPS, UPDATES = 7, (1, 3, 5)
BINDINGS = ["TRAIN_STEPS = 10", "MASK_UPDATE_BEGIN = 1", "MASK_UPDATE_END = 5"]
BINDINGS += ["MASK_UPDATE_PERIOD = 2"]
MORE = {
    "acdc": ["RESET_OPTIMIZER = True"],
    "adam_fisher": ["RESET_OPTIMIZER = True"],
    "global_saliency": ["GRADIENT_STEPS = 2"],
    "saliency": ["GRADIENT_STEPS = 2"],
}

# Each method runs by itself under one of the two optimizers, and as a rule among others under the
# other: compiling is what a run costs.
ALONE = {m: ("adafactor-factored", "adamw")[i % 2] for i, m in enumerate(METHODS)}
ALONE["adam_fisher"] = "adafactor-whole"
TOGETHER = {
    "adafactor-factored": "adamw",
    "adafactor-whole": "adamw",
    "adamw": "adafactor-factored",
}


def config_of(method):
    """What a run with this include is given."""
    bindings = [] if method in UNMOVED else BINDINGS
    with tiny_t5.gin_script() as parse:
        parse(f"include 'sparsity/{method}.gin'", *bindings, *MORE.get(method, []))
        return gin.get_configurable(ts.SparsityConfig)()


class Watched:
    """The weights, masks and slots of a trainer's state, on the host, those of one method."""

    def __init__(self, trainer, method, prefix):
        optimizer = trainer.train_state._optimizer
        sparsity, self.method = optimizer.state.sparsity, method

        def own(arrays):
            return {p: np.asarray(x) for p, x in arrays.items() if p.startswith(prefix)}

        self.weights = own(flatten(optimizer.target))
        self.stored = own(sparsity.masks)
        self.slots = {n: x for n, arrays in sparsity.slots.items() if (x := own(arrays))}
        self.masks = {
            p: np.asarray(packing.unpack(jnp.asarray(m), self.weights[p].shape))
            for p, m in self.stored.items()
        }
        plan = optimizer.optimizer_def.plan(optimizer.target)
        self.plan = {p: layer for p, layer in plan.items() if p.startswith(prefix)}

    def check_zeros(self, step):
        """After `step`: the model sees what the mask keeps, of the dense ones if there are any."""
        for path, mask in self.masks.items():
            weight = self.weights[path]
            dense = self.slots.get(DENSE, {}).get(path, weight)
            if self.method == "decaying_mask" and step < UPDATES[-1]:
                left = 1 - max(step + 1 - UPDATES[0], 0) / (UPDATES[-1] - UPDATES[0])
                np.testing.assert_allclose(weight, np.where(mask, dense, dense * left), atol=1e-6)
            else:
                np.testing.assert_array_equal(weight, np.where(mask, dense, 0), err_msg=path)
            assert np.isfinite(dense).all()

    def check_counts(self):
        """Every slice holds its number, or all of them together where the method is global."""
        kept = {p: mask.sum(axis=(0, 2)) for p, mask in self.masks.items()}  # layers are axis 1
        layers = self.plan
        if self.method in GLOBAL:
            expected = sum(layer.kept * layer.slices for layer in layers.values())
            assert sum(k.sum() for k in kept.values()) == expected
            return
        for path, layer in layers.items():
            if isinstance(layer.pattern, ts.NByM):
                n, m = layer.pattern.n, layer.pattern.m
                rows, *rest = layer.shape
                groups = self.masks[path].reshape(rows // m, m, *rest).sum(1)
                assert (groups == n).all(), path
            elif isinstance(layer.pattern, ts.ConstantFanIn):
                for fan_in in self.masks[path].sum(0):  # of the neurons of a layer
                    alive = fan_in[fan_in > 0]
                    assert (alive == min(layer.kept // alive.size, layer.shape[0])).all(), path
            else:
                assert layer.kept < layer.slice_size
                assert (kept[path] == layer.kept).all(), (path, kept[path], layer.kept)


def check_state(trainer, init):
    """The state survives a checkpoint's form, and every leaf of it has axes."""
    state = trainer.train_state
    flat = traverse_util.flatten_dict(state.state_dict(), sep="/")
    # as the hosts do it: into the shapes of a state
    restored = tiny_t5.leaves(init.global_train_state_shape.restore_state(state.state_dict()))
    assert restored.keys() == flat.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(restored[path], np.asarray(leaf), err_msg=path)
    axes = traverse_util.flatten_dict(trainer._train_state_axes.state_dict(), sep="/")
    named = {k: v for k, v in axes.items() if k.startswith(("target/", "state/"))}
    assert named.keys() == {k for k in flat if k.startswith(("target/", "state/"))}
    for path, spec in named.items():
        assert isinstance(spec, PartitionSpec) and len(spec) <= np.ndim(flat[path]), path
    sparsity = trainer._train_state_axes._optimizer.state.sparsity
    weights = tiny_t5.specs(trainer._train_state_axes.params)
    for arrays in (sparsity.masks, *sparsity.slots.values()):
        assert all(spec == weights[p] for p, spec in arrays.items())


def train_and_check(config, optimizer, build, prefixes):
    """prefixes: method -> what the paths of its weights start with."""
    trainer = tiny_t5.trainer(config, optimizer, build=build)
    watch = functools.partial(Watched, trainer)
    before = {m: watch(m, prefix) for m, prefix in prefixes.items()}
    for method, at in before.items():
        assert set(at.slots) == SLOTS.get(method, set())
        assert bool(at.masks) == (method != "dense")
    for step in range(STEPS):
        loss = tiny_t5.run(trainer, 1, start=step)["loss"].value
        assert np.isfinite(float(loss))
        for method, prefix in prefixes.items():
            now = watch(method, prefix)
            now.check_zeros(step)
            moved = any((now.stored[p] != before[method].stored[p]).any() for p in now.stored)
            assert not moved or step in UPDATES, (method, step)
            if method in ALWAYS_SPARSE or step >= UPDATES[-1]:
                now.check_counts()
            before[method] = now
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_stacked_layers(method):
    config, optimizer = config_of(method), ALONE[method]
    trainer = train_and_check(config, optimizer, tiny_t5.stacked_model, {method: "mlp_"})
    variants = trainer.train_step_variants()
    assert set(variants) == ({"plain"} if method in UNMOVED else {"plain", "update"})
    trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor-factored", "adamw"])
def test_it_trains_as_one_of_many(optimizer):
    """The other half of the pairs: a weight for each method, all in one run, by rules."""
    methods = [m for m in METHODS if TOGETHER[ALONE[m]] == optimizer]
    rules = []
    for method in methods:
        config = config_of(method)
        fixed = config.pattern is not None and config.pattern.fixed_level is not None
        rules.append(
            ts.Rule(
                path=f"^{method}_wi$",
                sparsity="shared" if fixed else config.sparsity,
                pattern=config.pattern,
                algorithm=config.algorithm,
            )
        )
    build = functools.partial(tiny_t5.stacked_model, names=tuple(methods))
    config = ts.SparsityConfig(algorithm=ts.Dense(), rules=rules)
    trainer = train_and_check(config, optimizer, build, {m: f"{m}_wi" for m in methods})
    check_state(trainer, tiny_t5.initializer(config, optimizer, build=build)[0])
    trainer.close()


def test_every_method_meets_both_optimizers():
    assert len(METHODS) == 23
    alone = {(m, o.removesuffix("-whole").removesuffix("-factored")) for m, o in ALONE.items()}
    together = {(m, TOGETHER[o].removesuffix("-factored")) for m, o in ALONE.items()}
    assert alone | together == {(m, o) for m in METHODS for o in ("adafactor", "adamw")}


def test_adam_fisher_names_what_a_factored_optimizer_lacks():
    trainer = tiny_t5.trainer(
        config_of("adam_fisher"), "adafactor-factored", build=tiny_t5.stacked_model
    )
    update = trainer.train_step_variants()["update"]
    with pytest.raises(ValueError, match="no second moment.*mlp_wi.*Adafactor.factored = False"):
        update.lower(trainer.train_state, tiny_t5.batch())
