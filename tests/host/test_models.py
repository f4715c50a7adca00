"""The models that T5X brings, trained sparse on a mesh of four devices."""

import re

import jax
import jax.numpy as jnp
import model_table
import numpy as np
import pytest
import tiny_t5
from model_table import CASES

import t5x_sparsity as ts
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten

NAMES = [
    pytest.param(n, marks=[tiny_t5.t5x_only] if n in model_table.T5X_ONLY else []) for n in CASES
]
UPDATE, STEPS = 2, 4


def unpacked(optimizer):
    weights = flatten(optimizer.target)
    stored = optimizer.state.sparsity.masks
    return {p: np.asarray(packing.unpack(m, weights[p].shape)) for p, m in stored.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_sparse(name):
    """It learns, masks change at the update alone, and both steps compile once."""
    case = CASES[name]
    arguments = dict(build=case.build, **case.arguments())
    partitioner = case.partitioner()
    trainer = tiny_t5.trainer(
        tiny_t5.rigl(begin=UPDATE), case.optimizer, partitioner, base=case.base(), **arguments
    )
    assert isinstance(trainer, case.base())
    before, losses = unpacked(trainer.train_state._optimizer), []
    check_counts(trainer, before)
    for step in range(STEPS):
        losses.append(float(tiny_t5.run(trainer, 1, start=step)["loss"].value))
        after = unpacked(trainer.train_state._optimizer)
        changed = [p for p in after if (after[p] != before[p]).any()]
        assert changed == (sorted(after) if step == UPDATE else []), step
        before = after
    assert np.isfinite(losses).all() and len(set(losses)) > 1
    steps = [v._step for v in trainer.train_step_variants().values()]
    jitted = [next(x for x in (s, *vars(s).values()) if hasattr(x, "_cache_size")) for s in steps]
    assert [j._cache_size() for j in jitted] == [1, 1]
    check_counts(trainer, after)
    check_what_is_sparse(trainer, case)
    check_shardings(trainer.train_state._optimizer)
    trainer.close()


def plan_of(trainer):
    optimizer = trainer.train_state._optimizer
    return optimizer.optimizer_def.plan(optimizer.target)


def check_counts(trainer, found):
    """Every layer and every expert keeps its number; what is pruned is 0."""
    plan, weights = plan_of(trainer), flatten(trainer.train_state.params)
    for path, layer in plan.items():
        inside = tuple(a for a in range(len(layer.shape)) if a not in layer.stack_axes)
        kept = found[path].sum(inside)
        assert kept.size == layer.slices and (kept == layer.kept).all(), path
        assert 0 < layer.kept < layer.slice_size
        assert (np.asarray(weights[path])[~found[path]] == 0).all(), path
    total = sum(layer.kept * layer.slices for layer in plan.values())
    assert total / sum(layer.size for layer in plan.values()) == pytest.approx(0.2, abs=2e-3)


def check_what_is_sparse(trainer, case):
    """Kernels; embeddings, logits, position biases, scales (stacked too) and routers are dense."""
    plan, weights = plan_of(trainer), flatten(trainer.train_state.params)
    assert set(plan) == {p for p in weights if re.search(case.sparse, p)}
    for path, layer in plan.items():
        slices, axis = case.slices
        assert layer.slices == slices, path
        assert layer.stack_axes == (() if axis is None else (axis,)), path
    for path in weights.keys() - plan.keys():
        assert np.count_nonzero(weights[path]) == weights[path].size, path


def check_shardings(optimizer):
    """Masks and slots lie on the four devices as their weights do; asserted on live arrays."""
    weights, plan = flatten(optimizer.target), optimizer.optimizer_def.plan(optimizer.target)
    assert any(layer.pack_axis is not None for layer in plan.values())
    for path, mask in optimizer.state.sparsity.masks.items():
        weight = weights[path]
        assert mask.sharding.mesh.size == 4
        assert mask.sharding.spec == weight.sharding.spec, path
        own, whole = (np.prod(x.sharding.shard_shape(x.shape)) for x in (mask, weight))
        assert own * (1 if plan[path].pack_axis is None else 8) == whole < weight.size, path
    for slot, leaf in flatten(optimizer.state.param_states).items():
        paths = [p for p in plan if f"/{p}/" in f"/{slot}/"]
        if paths and leaf.shape == weights[paths[0]].shape:
            assert leaf.sharding.spec == weights[paths[0]].sharding.spec, slot


@tiny_t5.t5x_only
def test_a_scanned_model_is_shared_among_layers_as_the_unscanned_one():
    def plan(scan):
        build = model_table.encoder_decoder(model_table.scalable, 2, scan_layers=scan)
        init = tiny_t5.initializer(tiny_t5.rigl(), "adamw", build=build)[0]
        state = init.global_train_state_shape
        return state._optimizer.optimizer_def.plan(state.params)

    scanned, apart = plan(True), plan(False)
    for path, layer in apart.items():
        stack = scanned[re.sub(r"(encoder|decoder)/layers_\d/", r"\1/\1/", path)]
        assert stack.slice_shape == layer.shape and stack.kept == layer.kept, path


@tiny_t5.t5x_only
def test_groups_of_a_scanned_model_lie_within_a_layer():
    config = ts.SparsityConfig(
        algorithm=ts.Static(),
        sparsity=0.5,
        rules=[ts.Rule(path="mlp/", pattern=ts.NByM(n=2, m=4))],
    )
    init = tiny_t5.initializer(config, build=CASES["scalable_t5"].build)[0]
    optimizer = init.from_scratch(jax.random.PRNGKey(0))._optimizer
    for path, mask in unpacked(optimizer).items():
        if "/mlp/" in path:
            inputs, layers, outputs = mask.shape
            groups = mask.reshape(inputs // 4, 4, layers, outputs).sum(1)
            assert (groups == 2).all(), path


@tiny_t5.t5x_only
@pytest.mark.parametrize(
    ("optimizer", "sharded"),
    [
        (lambda: model_table.moe_adafactor(min_dim_size_to_factor=8), {"v_row", "v_col"}),
        (lambda: model_table.moe_adafactor(factored=False), {"v"}),
        ("adamw", {"mu", "nu"}),
    ],
    ids=["adafactor", "adafactor-whole", "adamw"],
)
@pytest.mark.parametrize("bound", [False, True], ids=["inferred", "bound"])
def test_moe_state_lies_along_experts(optimizer, sharded, bound):
    """MoE's partitioner infers what does from classes of T5X; a user may have bound it too."""
    kwargs = {}
    if bound:
        factored = "v_row" in sharded
        pattern = r".*expert.*/kernel/v_.*" if factored else None
        kwargs["state_filter_fn"] = model_table.moe_training_utils().match_fn(pattern)
    partitioner = model_table.moe_partitioner(**kwargs)
    init = tiny_t5.initializer(tiny_t5.rigl(), optimizer, partitioner, CASES["moe"].build)[0]
    axes = init.train_state_axes._optimizer
    dense = tiny_t5.initializer(None, optimizer, model_table.moe_partitioner(), CASES["moe"].build)[
        0
    ]
    expected = tiny_t5.specs(dense.train_state_axes._optimizer.state.param_states)
    ours = tiny_t5.specs(axes.state.param_states)
    for slot, spec in ours.items():
        assert tuple(spec) == tuple(expected.get(slot) or ()), slot
    along = {s for s, spec in ours.items() if "expert" in s and tuple(spec)[:1] == ("expert",)}
    assert {part for s in along for part in s.split("/")} & {"v_row", "v_col", "v", "mu", "nu"} == (
        sharded
    )
    weights = tiny_t5.specs(axes.target)
    assert axes.state.sparsity.masks == {
        p: weights[p] for p in ("expert/wi/kernel", "expert/wo/kernel")
    }


def test_heads_are_no_dim_of_their_own_to_erk():
    """Scanned networks have (embed, heads, kv) where the others have one dim of both."""

    def kept(**kernels):
        weights = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, (s, _) in kernels.items()}
        plan = tiny_t5.rigl().plan(weights, {p: names for p, (_, names) in kernels.items()})
        return {p: layer.kept for p, layer in plan.items()}

    split = kept(
        query=((64, 2, 4, 16), ("embed", "layers", "heads", "kv")),
        out=((4, 2, 16, 32), ("heads", "layers", "kv", "embed")),
        wi=((64, 2, 128), ("embed", "layers", "mlp")),
    )
    joined = kept(
        query=((64, 2, 64), ("embed", "layers", "joined_kv")),
        out=((64, 2, 32), ("joined_kv", "layers", "embed")),
        wi=((64, 2, 128), ("embed", "layers", "mlp")),
    )
    assert split == joined


def test_routers_are_dense_whatever_their_rank():
    shapes = {
        # a router of flaxformer, scanned and not, beside an MLP with a gate
        "encoder/encoder/subblock_0/mlp/router/router_weights/w/kernel": (32, 2, 8),
        "encoder/layers_0/mlp/router/router_weights/w/kernel": (32, 8),
        "encoder/layers_0/mlp/gate/kernel": (32, 64),
    }
    weights = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
    assert list(tiny_t5.rigl().plan(weights)) == ["encoder/layers_0/mlp/gate/kernel"]
