import math

import jax
import jax.numpy as jnp
import pytest
from plans import make_plan

from t5x_sparsity.algorithms import Dense, Magnitude, RigL, Static
from t5x_sparsity.core import packing
from t5x_sparsity.core.patterns import Block, Channel, ConstantFanIn, NByM, Unstructured
from t5x_sparsity.core.plan import Rule, SparsityConfig
from t5x_sparsity.core.schedules import OneShot

BLOCK = {
    "attention/key/kernel": (64, 64),
    "attention/out/kernel": (64, 64),
    "attention/query/kernel": (64, 64),
    "attention/value/kernel": (64, 64),
    "mlp/wi_0/kernel": (64, 128),
    "mlp/wi_1/kernel": (64, 128),
    "mlp/wo/kernel": (128, 64),
    "pre_attention_layer_norm/scale": (64,),
    "pre_mlp_layer_norm/scale": (64,),
}
# T5 1.1's own names and axes
T5 = {
    "token_embedder/embedding": (384, 64),
    "encoder/relpos_bias/rel_embedding": (4, 32),
    "encoder/encoder_norm/scale": (64,),
    **{f"encoder/layers_0/{p}": s for p, s in BLOCK.items()},
    "decoder/relpos_bias/rel_embedding": (4, 32),
    "decoder/decoder_norm/scale": (64,),
    "decoder/logits_dense/kernel": (64, 384),
    **{f"decoder/layers_0/{p}": s for p, s in BLOCK.items()},
}
KERNELS = {p for p in T5 if "/attention/" in p or "/mlp/" in p}

# the same, scanned: stacked at axis 1, as T5X's scalable models do
SCANNED = {
    "decoder/decoder/attention/query/kernel": ((64, 3, 64), ("embed", "layers", "joined_kv")),
    "decoder/decoder/mlp/wi_0/kernel": ((64, 3, 128), ("embed", "layers", "mlp")),
    "decoder/decoder/mlp/wo/kernel": ((128, 3, 64), ("mlp", "layers", "embed")),
    "decoder/decoder/pre_mlp_layer_norm/scale": ((64, 3), ("embed", "layers")),
    "decoder/decoder_norm/scale": ((64,), ("embed",)),
    "decoder/moe/mlp/wi/kernel": ((8, 64, 3, 128), ("expert", "embed", "layers", "mlp")),
    "decoder/moe/mlp/bias": ((8, 3, 128), ("expert", "layers", "mlp")),
    "decoder/moe/router/router_weights/w/kernel": ((64, 3, 8), ("embed", "layers", "unmodeled")),
}


def shapes(of, dtype=jnp.float32):
    return {p: jax.ShapeDtypeStruct(s, dtype) for p, s in of.items()}


def plan_of(of=None, **kwargs):
    return make_plan(shapes(T5 if of is None else of), **{"sparsity": 0.9, **kwargs})


def test_t5_kernels_take_part_and_nothing_else():
    plan = plan_of()
    assert set(plan) == KERNELS
    assert list(plan) == sorted(plan)
    for path, layer in plan.items():
        assert layer.path == path and layer.shape == T5[path]
        assert layer.sparsity == 0.9
        assert layer.kept == round(math.prod(T5[path]) * (1 - 0.9))
        assert layer.pattern == Unstructured()
        assert layer.axes is None and layer.stack_axes == ()
        assert layer.slices == 1 and layer.slice_size == layer.size
        assert layer.pack_axis == packing.pack_axis(layer.shape) is not None
        assert layer.mask_shape == packing.packed_shape(layer.shape, layer.pack_axis)


def test_plan_takes_arrays_and_leaves_out_what_is_not_float():
    plan = make_plan(
        {
            "w": jnp.ones((4, 4)),
            "half": jnp.ones((4, 4), jnp.bfloat16),
            "table": jnp.ones((4, 4), jnp.int32),
            "scalar": jnp.float32(1),
            "empty": jnp.zeros((0, 4)),
            "number": 1.0,
        },
        sparsity=0.5,
        distribution="erk",
    )
    assert list(plan) == ["half", "w"]
    assert make_plan({}, sparsity=0.5) == {}


def test_stacked_axes_by_name_wherever_they_are():
    of = {p: s for p, (s, _) in SCANNED.items()}
    plan = plan_of(of, axes={p: a for p, (_, a) in SCANNED.items()})
    assert {p: x.stack_axes for p, x in plan.items()} == {
        "decoder/decoder/attention/query/kernel": (1,),
        "decoder/decoder/mlp/wi_0/kernel": (1,),
        "decoder/decoder/mlp/wo/kernel": (1,),
        "decoder/moe/mlp/wi/kernel": (0, 2),
    }
    moe = plan["decoder/moe/mlp/wi/kernel"]
    assert moe.slice_shape == (64, 128) and moe.slices == 24
    assert moe.slice_size == 64 * 128 and moe.size == 24 * 64 * 128
    assert moe.kept == round(64 * 128 * (1 - 0.9))
    assert moe.pack_axis == 1  # the inner axis only as a last resort
    # without names the stacks can't be seen
    assert "decoder/decoder/pre_mlp_layer_norm/scale" in plan_of(of)


def test_erk_does_not_count_stacked_dims():
    of = {"a/kernel": (64, 3, 64), "b/kernel": (64, 128)}
    axes = {"a/kernel": ("embed", "layers", "mlp"), "b/kernel": ("embed", "mlp")}
    apart = {f"a{i}/kernel": (64, 64) for i in range(3)} | {"b/kernel": (64, 128)}
    stacked = plan_of(of, axes=axes, distribution="erk")
    single = plan_of(apart, distribution="erk")
    assert stacked["a/kernel"].sparsity == pytest.approx(single["a0/kernel"].sparsity)
    assert stacked["b/kernel"].sparsity == pytest.approx(single["b/kernel"].sparsity)


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_the_total_is_reached(distribution):
    plan = plan_of(distribution=distribution, sparsity=0.7)
    size = sum(x.size for x in plan.values())
    kept = sum(x.kept * x.slices for x in plan.values())
    assert abs(kept - 0.3 * size) <= len(plan)


def test_the_first_rule_wins():
    rules = [
        Rule(path=r"encoder/.*/wo/", sparsity=None),
        Rule(path=r"encoder/.*/mlp/", sparsity=0.5),
        Rule(path=r"/mlp/", sparsity=1.0),
        Rule(path=r"decoder/layers_0/attention/key", pattern=NByM(n=1, m=4)),
        Rule(path=r"logits_dense"),
        Rule(path=r"decoder_norm", sparsity=0.25),
    ]
    plan = plan_of(rules=rules, distribution="uniform")
    assert "encoder/layers_0/mlp/wo/kernel" not in plan
    assert plan["encoder/layers_0/mlp/wi_0/kernel"].sparsity == 0.5
    assert plan["decoder/layers_0/mlp/wi_0/kernel"].sparsity == 1
    assert plan["decoder/layers_0/mlp/wi_0/kernel"].kept == 0
    key = plan["decoder/layers_0/attention/key/kernel"]
    assert key.pattern == NByM(n=1, m=4) and key.sparsity == 0.75 and key.kept == 1024
    assert plan["decoder/logits_dense/kernel"].sparsity == 0.9
    assert plan["decoder/decoder_norm/scale"].kept == 48
    assert plan["encoder/layers_0/attention/key/kernel"].sparsity == 0.9


def test_levels_of_their_own_are_outside_the_budget():
    rules = [Rule(path="encoder/.*/mlp", sparsity=0.5)]
    plan = plan_of(rules=rules, distribution="erk", sparsity=0.8)
    shared = [x for p, x in plan.items() if not p.startswith("encoder/layers_0/mlp")]
    kept = sum(x.kept for x in shared)
    assert abs(kept - 0.2 * sum(x.size for x in shared)) <= len(shared)


def test_embeddings():
    plan = plan_of(embedding_sparsity="auto", sparsity=0.64)
    assert set(plan) == KERNELS | {"token_embedder/embedding"}
    assert plan["token_embedder/embedding"].sparsity == pytest.approx(0.4)
    assert plan_of(embedding_sparsity=0.5)["token_embedder/embedding"].kept == 384 * 32
    assert plan_of(rules=[Rule(path="embedding$", sparsity="auto")], sparsity=0.64)[
        "token_embedder/embedding"
    ].sparsity == pytest.approx(0.4)
    others = {
        "embeddings/layer_norm/scale": (64,),
        "shared/embedding": (384, 64),
        "block/0/SelfAttention/relative_attention_bias/embedding": (32, 4),
        "encoder/relpos_bias/rel_embedding": (4, 32),
    }
    assert set(plan_of(others, embedding_sparsity="auto")) == {"shared/embedding"}
    assert plan_of(others) == {}


def test_patterns_need_axes_that_divide():
    plan = plan_of(pattern=NByM(n=2, m=4))
    assert all(x.sparsity == 0.5 and x.kept == x.size // 2 for x in plan.values())
    stacked = make_plan(
        shapes({"w": (64, 3, 10)}),
        sparsity=0.9,
        pattern=NByM(n=2, m=4),
        axes={"w": ("embed", "layers", "mlp")},
    )
    assert stacked["w"].kept == 64 * 10 // 2


def test_masks_a_byte_a_weight():
    plan = plan_of(pack_masks=False)
    assert all(x.pack_axis is None and x.mask_shape == x.shape for x in plan.values())


def test_the_plan_depends_on_shapes_and_names_alone():
    arrays = {p: jnp.ones(s) for p, s in list(T5.items())[:8]}
    assert make_plan(arrays, sparsity=0.9) == make_plan(
        shapes({p: T5[p] for p in arrays}), sparsity=0.9
    )


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (
            {"sparsity": 1.0},
            r"sparsity \(SPARSITY\) must be a number in \[0, 1\), got 1.0; 0.9 means",
        ),
        ({"sparsity": 90}, r"got 90; 0.9 means that 90% of the weights are zero"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": math.nan}, "got nan"),
        ({"sparsity": "0.9"}, "got '0.9'"),
        ({"sparsity": True}, "got True"),
        ({"distribution": "layerwise"}, "unknown sparsity distribution 'layerwise'"),
        (
            {"embedding_sparsity": 1.0},
            r"embedding_sparsity \(EMBEDDING_SPARSITY\), unless .* must be",
        ),
        ({"embedding_sparsity": "all"}, "EMBEDDING_SPARSITY.* got 'all'"),
        (
            {"rules": [Rule(path="encoder/layers_9")]},
            r"rule for 'encoder/layers_9' has no effect: it matches no weight. The weights are:"
            r"\n  decoder/decoder_norm/scale\n",
        ),
        (
            {"rules": [Rule(path="mlp", sparsity=0.5), Rule(path="mlp/wo")]},
            "rule for 'mlp/wo' has no effect: every weight it matches is taken by an earlier rule",
        ),
        (
            {"pattern": NByM(n=2, m=3)},
            "weight 'decoder/layers_0/attention/key/kernel': 2:3 needs axis -2 .* of 3, but "
            "it has 64 .* or leave this weight out by a rule",
        ),
        (
            {"pattern": NByM(n=2, m=4), "rules": [Rule(path="encoder_norm")]},
            "weight 'encoder/encoder_norm/scale' has 1 unstacked dim; NByM.* needs two or more",
        ),
        (
            {"axes": {"decoder/decoder_norm/scale": ("embed", "layers")}},
            r"weight 'decoder/decoder_norm/scale' has shape \(64,\) but logical axes \('embed'",
        ),
    ],
)
def test_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan_of(**kwargs)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"path": "mlp(", "sparsity": 0.5}, "rule path 'mlp.' is not a regular expression"),
        ({"path": "mlp", "sparsity": 1.5}, r"rule for 'mlp' must be a number in \[0, 1\], got 1.5"),
        ({"path": "mlp", "sparsity": "dense"}, "got 'dense'"),
        ({"path": "mlp", "sparsity": True}, "got True"),
        (
            {"path": "mlp", "stack_axes": "heads"},
            r"must be a list .* got 'heads'; write \['heads'\]",
        ),
        (
            {"path": "mlp", "sparsity": 0.9, "pattern": NByM(n=2, m=4)},
            "rule for 'mlp' asks for a sparsity of 0.9, but NByM.n=2, m=4.* has 0.5 and takes no "
            "other; leave the rule's sparsity out",
        ),
    ],
)
def test_rule_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Rule(**kwargs)


def test_only_a_rule_may_prune_everything():
    assert [Rule(path="x", sparsity=s).sparsity for s in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match=r"sparsity .* must be a number in \[0, 1\), got 1;"):
        SparsityConfig(algorithm=Static(), sparsity=1)


def test_a_pattern_of_fixed_level_stays_outside_the_budget():
    plan = make_plan(
        {"a/mlp": float32((64, 64)), "a/attention": float32((64, 64))},
        sparsity=0.9,
        rules=[Rule(path="mlp", pattern=NByM(n=2, m=4))],
    )
    assert plan["a/mlp"].sparsity == 0.5
    assert plan["a/attention"].sparsity == 0.9


def test_a_rule_has_its_own_algorithm():
    run, own = Static(), Magnitude(updates=OneShot(step=3))
    plan = plan_of(
        algorithm=run,
        rules=[Rule(path="encoder/.*/mlp", algorithm=own), Rule(path="logits", sparsity=0.5)],
    )
    for path, layer in plan.items():
        assert layer.algorithm == (own if "encoder/layers_0/mlp" in path else run), path
    # the algorithm leaves a weight in the shared budget
    assert plan["encoder/layers_0/mlp/wo/kernel"].sparsity == 0.9
    assert "decoder/logits_dense/kernel" in plan
    assert all(x.algorithm == run for x in plan_of().values())


def test_dense_rules_and_dense_runs():
    sparse = RigL(updates=OneShot(step=3))
    plan = plan_of(
        algorithm=sparse,
        distribution="erk",
        rules=[Rule(path="encoder/", algorithm=Dense())],
        embedding_sparsity="auto",
    )
    assert set(plan) == {p for p in KERNELS if p.startswith("decoder")} | {
        "token_embedder/embedding"
    }
    # what is dense is outside the budget
    alone = {p: s for p, s in T5.items() if p.startswith("decoder")}
    only = plan_of(alone, distribution="erk")
    assert {p: plan[p].sparsity for p in only} == {p: x.sparsity for p, x in only.items()}

    plan = plan_of(
        algorithm=Dense(),
        rules=[Rule(path="encoder/.*/mlp", algorithm=sparse), Rule(path="wo", sparsity=0.5)],
        embedding_sparsity=0.5,
    )
    assert {p for p in KERNELS if p.startswith("encoder/layers_0/mlp")} == set(plan)
    assert all(x.algorithm == sparse and x.sparsity == 0.9 for x in plan.values())
    assert plan_of(algorithm=Dense()) == {}


def test_a_rule_stacks_along_axes_by_name():
    of = {
        "attention/out": (4, 16, 3, 64),
        "attention/query": (64, 3, 4, 16),
        "mlp/wi": (64, 3, 128),
    }
    axes = {
        "attention/out": ("heads", "kv", "layers", "embed"),
        "attention/query": ("embed", "layers", "heads", "kv"),
        "mlp/wi": ("embed", "layers", "mlp"),
    }
    plan = plan_of(of, axes=axes, rules=[Rule(path="attention", stack_axes=["heads"])])
    assert {p: x.stack_axes for p, x in plan.items()} == {
        "attention/out": (0, 2),
        "attention/query": (1, 2),
        "mlp/wi": (1,),
    }
    out = plan["attention/out"]
    assert out.slice_shape == (16, 64) and out.slices == 12
    assert out.kept == round(16 * 64 * 0.1)
    assert out.pack_axis not in out.stack_axes
    assert Rule(path="x", stack_axes=["heads"]) == Rule(path="x", stack_axes=("heads",))
    for given in (axes, {p: a for p, a in axes.items() if p != "mlp/wi"}):
        with pytest.raises(
            ValueError,
            match=r"rule for 'mlp' stacks along \['heads'\], but weight 'mlp/wi' has the logical "
            r"axes (\('embed', 'layers', 'mlp'\)|None); name axes that it has",
        ):
            plan_of(of, axes=given, rules=[Rule(path="mlp", stack_axes=["heads"])])


def test_units_and_levels():
    of = {"a": (10, 3, 9), "b": (10, 9), "c": (10, 9), "d": (8, 9), "e": (6, 4)}
    axes = {"a": ("embed", "layers", "mlp")}
    rules = [
        Rule(path="a", pattern=Block(height=4, width=3)),  # 3 x 3 blocks, ragged
        Rule(path="b", pattern=Channel()),
        Rule(path="c", pattern=ConstantFanIn()),
        Rule(path="d", pattern=NByM(n=1, m=4)),
    ]
    plan = plan_of(of, axes=axes, rules=rules, sparsity=0.75)
    found = {p: (x.units, x.kept, x.level) for p, x in plan.items()}
    assert found == {
        "a": (9, 2, 1 - 2 / 9),
        "b": (9, 2, 1 - 2 / 9),
        "c": (90, 18, 1 - 18 / 90),
        "d": (72, 18, 0.75),
        "e": (24, 6, 0.75),
    }
    assert all(x.sparsity == 0.75 for x in plan.values())


@pytest.mark.parametrize(
    "pattern,message",
    [
        (
            Block(height=65, width=1),
            "weight 'decoder/layers_0/attention/key/kernel': Block.height is 65, but .* has 64; .*"
            "leave this weight out by a rule",
        ),
        (Channel(axis=2), "attention/key/kernel': Channel axis 2 is not an axis of a slice"),
    ],
)
def test_patterns_that_do_not_fit(pattern, message):
    with pytest.raises(ValueError, match=message):
        plan_of(pattern=pattern)


def test_a_level_that_the_runs_pattern_does_not_have():
    message = (
        "weight 'encoder/layers_0/mlp/wi_0/kernel': its rule asks for a sparsity of 0.9, but "
        "NByM.n=2, m=4.* has 0.5 and takes no other"
    )
    rules = [Rule(path="encoder/.*/mlp", sparsity=0.9)]
    with pytest.raises(ValueError, match=message):
        plan_of(pattern=NByM(n=2, m=4), rules=rules)
    same = [Rule(path="mlp/", sparsity=0.5), Rule(path="key", sparsity="auto")]
    plan = plan_of(pattern=NByM(n=2, m=4), rules=same)
    assert all(x.sparsity == 0.5 for x in plan.values())


def float32(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)
