import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meshes import collectives, mesh, put

from t5x_sparsity.core import packing

OPS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@given(st.data())
@settings(max_examples=20)
def test_what_is_packed_comes_back(data):
    shape = list(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    if axis is not None:
        shape[axis] *= 8
    seed = data.draw(st.integers(0, 2**32 - 1))
    mask = np.random.default_rng(seed).random(shape) < 0.5
    stored = jax.jit(packing.pack, static_argnums=1)(mask, axis)
    assert stored.dtype == jnp.uint8
    assert stored.shape == packing.packed_shape(shape, axis)
    if axis is not None:
        assert stored.size * 8 == mask.size
        # the first of eight in the lowest bit
        expected = np.packbits(mask, axis=axis, bitorder="little")
        np.testing.assert_array_equal(stored, expected)
    found = jax.jit(packing.unpack, static_argnums=1)(stored, tuple(shape))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, mask)
    if axis is None or shape[axis] != stored.shape[axis]:
        assert packing.stored_axis(stored.shape, shape) == axis


@pytest.mark.parametrize(
    "shape,stack_axes,axis",
    [
        ((512, 1024), (), 0),
        ((512, 12, 1024), (1,), 0),  # wi_0 of scanned layers: embed, layers, mlp
        ((64, 512, 2048), (0,), 1),
        ((8, 64, 512), (), 1),  # 8 experts do not pack eight ways
        ((100, 512), (), 1),  # the inner axis, where no other packs
        ((768, 2048), (), 0),
        ((384, 1024, 8), (), 1),  # 48 = 3 * 16 splits 16 ways, 128 splits 128 ways
        ((64, 64, 64), (), 1),  # of equals the last outer one
        ((64, 24, 64, 4096), (1,), 2),  # heads, layers, kv, embed: heads are split 16 ways
        ((32, 32), (), None),
        ((100, 100), (), None),
        ((64,), (), 0),
        ((64, 10), (0,), None),
        ((), (), None),
        ((0, 64), (), 1),
        ((0,), (), None),
    ],
)
def test_pack_axis(shape, stack_axes, axis):
    assert packing.pack_axis(shape, stack_axes) == axis


@given(st.lists(st.integers(0, 1024), max_size=4), st.sets(st.integers(0, 3)))
def test_the_axis_packs_and_splits_on_any_usual_mesh(shape, stacked):
    stack_axes = tuple(sorted(a for a in stacked if a < len(shape)))
    axis = packing.pack_axis(shape, stack_axes)
    fits = [a for a, n in enumerate(shape) if a not in stack_axes and n and n % (8 * 8) == 0]
    if axis is None:
        assert not fits
    else:
        assert axis in fits
        assert axis != len(shape) - 1 or fits == [axis]


@pytest.mark.parametrize(
    "stored,shape",
    [((8, 64), (65, 64)), ((8, 8), (64, 64)), ((8,), (64, 1)), ((16, 64), (64, 64)), ((), (8,))],
)
def test_a_mask_of_another_weight(stored, shape):
    message = rf"mask of shape \({', '.join(map(str, stored))},?\) does not fit a weight of shape"
    with pytest.raises(ValueError, match=message):
        packing.unpack(jnp.zeros(stored, jnp.uint8), shape)


def test_apply_kills_nan_and_passes_others_through():
    weights = {
        "a": jnp.full((64, 2), jnp.nan, jnp.bfloat16),
        "b": jnp.array([[1.0, -jnp.inf], [jnp.inf, -0.0]]),
        "c": jnp.ones(3),
    }
    keep = np.zeros((64, 2), bool)
    keep[5, 1] = True
    stored = {
        "a": packing.pack(jnp.asarray(keep), 0),
        "b": packing.pack(jnp.array([[True, False], [False, True]]), None),
    }
    found = packing.apply(weights, stored)
    assert found["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.isnan(found["a"].astype(jnp.float32)), keep)
    assert (found["a"].astype(jnp.float32)[~keep] == 0).all()
    np.testing.assert_array_equal(found["b"], [[1.0, 0], [0, -0.0]])
    assert not np.signbit(found["b"][0, 1])
    assert found["c"] is weights["c"]
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(packing.apply)(weights, stored)


MESHES = [(2, 1), (2, 2), (2, 4), (1, 8)]
SPECS = [("x",), (None, "y"), ("y", "x"), (("x", "y"),)]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mask_lies_with_its_weight_and_nothing_moves(shape):
    devices = mesh(*shape)
    rng = np.random.default_rng(0)
    host = {}
    specs = {}
    for i, (spec, size) in enumerate(itertools.product(SPECS, [(64, 128), (128, 16)])):
        host[f"w{i}"] = rng.normal(size=size).astype(np.float32)
        specs[f"w{i}"] = spec
    weights = {p: put(devices, w, *specs[p]) for p, w in host.items()}
    axes = {p: packing.pack_axis(w.shape) for p, w in host.items()}
    assert set(axes.values()) == {0}

    @jax.jit
    def pack(weights):
        return {p: packing.pack(w > 0, axes[p]) for p, w in weights.items()}

    stored = pack(weights)
    for path, mask in stored.items():
        assert mask.sharding.is_equivalent_to(weights[path].sharding, 2), path
        assert mask.addressable_shards[0].data.size * 8 == (
            weights[path].addressable_shards[0].data.size
        )
    apply = jax.jit(packing.apply)
    masked = apply(weights, stored)
    for path, found in masked.items():
        np.testing.assert_array_equal(found, np.where(host[path] > 0, host[path], 0))
        assert found.sharding.is_equivalent_to(weights[path].sharding, 2), path
    for program in (pack.lower(weights), apply.lower(weights, stored)):
        text = program.compile().as_text()
        assert not [op for op in OPS if collectives(text, op)]
