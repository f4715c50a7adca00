import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import quick_jit
from plans import make_plan

from t5x_sparsity import (
    Block,
    Channel,
    GlobalMagnitude,
    Magnitude,
    NByM,
    OneShot,
    Rule,
    Static,
    sparsify,
    sparsity_summary,
)
from t5x_sparsity.core import packing
from t5x_sparsity.monitoring.summary import (
    TOTAL,
    LayerSummary,
    kept_counts,
    summarize,
    summary_table,
    total_kept,
)

SHAPES = {"a/kernel": (64, 10), "b/kernel": (10, 20), "c/kernel": (3, 4, 8)}


def plan():
    return make_plan(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()},
        sparsity=0.9,
        rules=[Rule(path="c/", pattern=NByM(n=1, m=4)), Rule(path="b/", sparsity=0.5)],
        axes={"c/kernel": ("layers", "embed", "mlp")},
    )


@pytest.mark.parametrize("shape", [(64, 10), (8, 512, 3), (7,), (600, 640), (300, 8)])
def test_counts(shape):
    mask = np.random.default_rng(0).random(shape) < 0.3
    for axis in {None, packing.pack_axis(shape)}:
        counts = kept_counts({"w": packing.pack(jnp.asarray(mask), axis)})["w"]
        assert counts.dtype == jnp.int32 and counts.ndim == 1 and counts.size <= 256
        assert total_kept(counts) == mask.sum()


def test_counts_past_31_bits():
    # 512 experts of 4096 x 4096: all kept, a row holds more than an int32 does in all
    stored = jax.ShapeDtypeStruct((512, 512, 4096), jnp.uint8)
    counts = jax.eval_shape(lambda m: kept_counts({"w": m}), stored)["w"]
    assert stored.size * 8 // counts.size < 2**31
    assert total_kept(np.full(3, 2**31 - 1, np.int32)) == 3 * (2**31 - 1)


def test_rows_and_total_by_hand():
    rows = summarize(SHAPES, {"b/kernel": 101, "a/kernel": 64, "c/kernel": 24}, plan())
    assert [r.path for r in rows] == ["a/kernel", "b/kernel", "c/kernel", TOTAL]
    assert rows[0] == LayerSummary("a/kernel", (64, 10), 640, 64, 0.9)
    assert rows[0].sparsity == pytest.approx(0.9)
    assert rows[1].target == 0.5 and rows[1].sparsity == pytest.approx(1 - 101 / 200)
    assert rows[2].target == 0.75 and rows[2].size == 96
    total = rows[-1]
    assert (total.size, total.kept, total.shape) == (936, 189, ())
    assert total.target == pytest.approx(1 - (64 + 100 + 24) / 936)
    assert total.sparsity == pytest.approx(1 - 189 / 936)


def test_targets_of_global_algorithms_are_of_the_total_only():
    updates = OneShot(step=0)
    plan = make_plan(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()},
        sparsity=0.75,
        algorithm=GlobalMagnitude(updates=updates),
        rules=[Rule(path="b/", sparsity=0.5, algorithm=Magnitude(updates=updates))],
    )
    rows = summarize(SHAPES, {"a/kernel": 200, "b/kernel": 100, "c/kernel": 0}, plan)
    assert [r.target for r in rows[:3]] == [None, 0.5, None]
    assert rows[-1].target == pytest.approx(1 - (160 + 100 + 24) / 936)
    text = summary_table(rows).splitlines()
    assert text[2].split() == ["a/kernel", "64x10", "640", "200", "68.7500%"]
    assert text[-1].split()[-2:] == ["69.6581%", "67.9487%"]


def test_targets_of_units():
    """Of blocks and channels a target is a share of units; the total's is by weights."""
    plan = make_plan(
        {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()},
        sparsity=0.75,
        rules=[
            Rule(path="b/", pattern=Block(height=4, width=6)),
            Rule(path="c/", pattern=Channel(), sparsity=0.5),
        ],
        axes={"c/kernel": ("layers", "embed", "mlp")},
    )
    # 3 blocks of 3 x 4, ragged; 4 channels of 8
    assert [(plan[p].units, plan[p].kept) for p in SHAPES] == [(640, 160), (12, 3), (8, 4)]
    rows = summarize(SHAPES, {"a/kernel": 160, "b/kernel": 60, "c/kernel": 48}, plan)
    assert [r.target for r in rows[:3]] == [0.75, 0.75, 0.5]
    assert rows[-1].target == pytest.approx((0.75 * 640 + 0.75 * 200 + 0.5 * 96) / 936)
    assert rows[-1].sparsity == pytest.approx(1 - 268 / 936)


def test_without_a_plan_and_of_nothing():
    rows = summarize(SHAPES, {"a/kernel": 64})
    assert rows[0].target is None and rows[1].target is None
    assert summarize({}, {}) == [LayerSummary(TOTAL, (), 0, 0, None)]
    assert summarize({}, {})[0].sparsity == 0


def test_summary_of_a_run():
    tx = optax.chain(optax.clip(1.0), sparsify(optax.sgd(0.1), Static(), sparsity=0.8))
    params = {"a": jnp.ones((64, 10)), "b": jnp.ones((10, 20)), "bias": jnp.ones(20)}
    rows = sparsity_summary(params, quick_jit(tx.init)(params))
    assert [(r.path, r.size, r.kept) for r in rows] == [
        ("a", 640, 128),
        ("b", 200, 40),
        (TOTAL, 840, 168),
    ]


def test_table():
    rows = summarize(SHAPES, {"a/kernel": 64, "b/kernel": 101, "c/kernel": 24}, plan())
    big = LayerSummary("big", (1000, 5000), 5_000_000, 1_234_567, None)
    text = summary_table([*rows, big])
    lines = text.splitlines()
    assert lines[0].split() == ["weight", "shape", "weights", "kept", "target", "actual"]
    assert lines[2].split() == ["a/kernel", "64x10", "640", "64", "90.0000%", "90.0000%"]
    assert lines[3].split() == ["b/kernel", "10x20", "200", "101", "50.0000%", "49.5000%"]
    assert lines[5].split() == ["total", "936", "189", "79.9145%", "79.8077%"]
    assert lines[6].split() == ["big", "1000x5000", "5,000,000", "1,234,567", "75.3087%"]
    assert "total" in summary_table(summarize({}, {}))
