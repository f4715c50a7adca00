"""Adafactor of the embedded host, against a step worked out by hand, and its factoring rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import PartitionSpec as P

from t5x_sparsity.embedded import adafactor

RULES = adafactor.standard_logical_factor_rules()


def create(params, axes=None, **kwargs):
    definition = adafactor.Adafactor(min_dim_size_to_factor=2, **kwargs)
    if axes is not None:
        definition.set_param_axes(axes)
    return definition.create(params)


def test_factored_step_worked_out_by_hand():
    grad = jnp.array([[1.0, 2.0, 2.0], [2.0, 4.0, 4.0]])
    param = jnp.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])
    optimizer = create({"w": param}, clipping_threshold=None)
    stepped = optimizer.apply_gradient({"w": grad}, learning_rate=0.5)
    # The first step has decay 1 - 1**-0.8 = 0. The squares have rank 1, so factoring is exact, and
    # the update is the gradient's sign, times learning rate and root mean square (0.5, 1).
    slots = stepped.state.param_states["w"]
    np.testing.assert_allclose(slots.v_row, [3.0, 12.0], rtol=1e-6)
    np.testing.assert_allclose(slots.v_col, [2.5, 10.0, 10.0], rtol=1e-6)
    np.testing.assert_allclose(stepped.target["w"], param - 0.5, rtol=1e-6)
    assert slots.v.shape == slots.m.shape == (1,)
    assert stepped.state.step == 1


def test_unfactored_steps_worked_out_by_hand():
    optimizer = create(
        {"w": jnp.array([2.0])},
        factored=False,
        multiply_by_parameter_scale=False,
        beta1=0.5,
        clipping_threshold=0.5,
    )
    stepped = optimizer.apply_gradient({"w": jnp.array([3.0])}, learning_rate=1.0)
    # Update 3 / sqrt(9) = 1, clipped to 0.5; momentum 0.5 * 0.5; weight 2 - 0.25.
    slots = stepped.state.param_states["w"]
    np.testing.assert_allclose(slots.v, [9.0], rtol=1e-6)
    np.testing.assert_allclose(slots.m, [0.25], rtol=1e-6)
    np.testing.assert_allclose(stepped.target["w"], [1.75], rtol=1e-6)


def test_stacked_slices_step_as_if_alone():
    rng = np.random.default_rng(0)
    slices = [jnp.asarray(rng.normal(size=(4, 6)) * 10**i, jnp.float32) for i in range(3)]
    grads = [jnp.asarray(rng.normal(size=(4, 6)) * 100**i, jnp.float32) for i in range(3)]
    stacked = create(
        {"w": jnp.stack(slices, 1)},
        {"w": P("embed", "layers", "mlp")},
        logical_factor_rules=RULES,
        clipping_threshold=0.3,
    )
    stacked = stacked.apply_gradient({"w": jnp.stack(grads, 1)}, learning_rate=0.1)
    for i, (param, grad) in enumerate(zip(slices, grads, strict=True)):
        alone = create({"w": param}, clipping_threshold=0.3)
        alone = alone.apply_gradient({"w": grad}, learning_rate=0.1)
        np.testing.assert_allclose(stacked.target["w"][:, i], alone.target["w"], rtol=1e-5)


@pytest.mark.parametrize(
    "shape, factored, v_row, v_col",
    [
        ((4, 6), True, (4,), (6,)),
        ((6, 4), True, (4,), (6,)),
        ((4, 4), True, (4,), (4,)),
        ((1, 6), True, (1,), (1,)),
        ((4,), True, (1,), (1,)),
        ((4, 6), False, (1,), (1,)),
    ],
)
def test_which_axes_are_factored(shape, factored, v_row, v_col):
    slots = create({"w": jnp.ones(shape)}, factored=factored).state.param_states["w"]
    assert slots.v_row.shape == v_row and slots.v_col.shape == v_col
    assert slots.v.shape == ((1,) if v_row != (1,) else shape)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(slots))


def test_containers_and_checkpoint_paths_are_kept():
    params = freeze({"a": {"w": jnp.ones((4, 6))}})
    optimizer = create(params, beta1=0.9)
    stepped = optimizer.apply_gradient(params, learning_rate=0.1)
    for got in (optimizer, stepped):
        assert isinstance(got.state.param_states, FrozenDict)
        assert isinstance(got.target, FrozenDict)
        leaf = got.state_dict()["state"]["param_states"]["a"]["w"]
        assert set(leaf) == {"v_row", "v_col", "v", "m"}
        assert leaf["m"].dtype == jnp.float32
    restored = optimizer.restore_state(stepped.state_dict())
    jax.tree.map(np.testing.assert_array_equal, restored, stepped)
    assert jax.tree.structure(restored) == jax.tree.structure(optimizer)


def test_axes_of_slots():
    axes = freeze({"w": P("embed", "mlp"), "b": P("embed")})
    params = freeze({"w": jnp.ones((4, 6)), "b": jnp.ones((4,))})
    optimizer = create(params, axes, beta1=0.9, logical_factor_rules=RULES)
    derived = optimizer.optimizer_def.derive_logical_axes(optimizer, axes)
    w, b = derived.state.param_states["w"], derived.state.param_states["b"]
    assert (w.v_row, w.v_col, w.v, w.m) == (None, None, None, P("embed", "mlp"))
    assert (b.v, b.m) == (P("embed"), P("embed"))
    assert derived.target == axes and derived.state.step is None


def test_rank_three_without_rules_names_the_weight_and_the_remedy():
    with pytest.raises(ValueError, match=r"'a/w' of shape \(2, 3, 4\).*logical_factor_rules"):
        create({"a": {"w": jnp.ones((2, 3, 4))}})


def test_unknown_logical_axis_names_the_weight_and_the_axis():
    with pytest.raises(ValueError, match="no rule for the logical axis 'colour' of the parameter"):
        create({"w": jnp.ones((2, 3))}, {"w": P("embed", "colour")}, logical_factor_rules=RULES)


def test_partly_factored_rule_is_an_error():
    with pytest.raises(ValueError, match="factors the parameter 'w' in part only"):
        create(
            {"w": jnp.ones((2, 3, 4))},
            {"w": P("embed", "mlp", "relpos_buckets")},
            logical_factor_rules=RULES,
        )


def test_rules_are_factor_dims():
    optimizer = create(
        {"w": jnp.ones((2, 3, 4))},
        {"w": P("x", "y", "z")},
        logical_factor_rules={
            "x": adafactor.FactorDim.BATCH,
            "y": adafactor.FactorDim.ROW,
            "z": adafactor.FactorDim.COLUMN,
        },
    )
    assert optimizer.state.param_states["w"].v_row.shape == (2, 3)
    with pytest.raises(ValueError, match="no rule for the logical axis 'x' .* Add a FactorDim"):
        create({"w": jnp.ones(2)}, {"w": P("x")}, logical_factor_rules={"x": "diagonal"})


def test_what_only_t5x_has_is_refused():
    name = "adafactor.Adafactor.multiply_by_parameter_scale"
    with pytest.raises(ValueError, match=f"{name} is 'kernel', but .* or use T5X for it"):
        adafactor.Adafactor(multiply_by_parameter_scale="kernel")
    message = "adafactor.Adafactor of the embedded host has no learning_rate, skip_nan_updates: .*"
    with pytest.raises(TypeError, match=f"{message}use T5X for it"):
        adafactor.Adafactor(learning_rate=0.1, skip_nan_updates=True)
