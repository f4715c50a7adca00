"""Adafactor (Shazeer and Stern, 2018), with factoring chosen by logical axis names as in T5X.

The second moment of a matrix is kept as row and column means. A parameter with stacked axes
(scanned layers) is factored, scaled and clipped slice by slice.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict, freeze

from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.embedded.optimizers import (
    HyperParams,
    Optimizer,
    OptimizerDef,
    OptimizerState,
    with_axes,
)
from t5x_sparsity.embedded.refusals import missing_from, refuse, refuse_options

__getattr__ = missing_from(__name__)

PyTree = Any


class FactorDim(enum.Enum):
    """What one axis is to the factored second moment."""

    NONE = None  # keeps the parameter unfactored
    BATCH = 1  # stacked: slices have nothing to do with each other
    ROW = 2
    COLUMN = 3


def standard_logical_factor_rules() -> FrozenDict:
    """Returns the factoring rule of each logical axis name that T5 models use."""
    columns = ("vocab", "mlp", "heads", "kv", "joined_kv", "q_wi_fused", "o_wo_fused")
    columns += ("multiquery_heads", "kv_fused", "mlp_activations")
    rules = dict.fromkeys(columns, FactorDim.COLUMN)
    rules["embed"] = FactorDim.ROW
    rules |= dict.fromkeys(("layers", "stack"), FactorDim.BATCH)
    rules |= dict.fromkeys(("relpos_buckets", "layer_norm_scale"), FactorDim.NONE)
    return freeze(rules)


@struct.dataclass
class AdafactorParamState:
    """The slots of one parameter, float32; a slot that is not used holds zeros of shape (1,)."""

    v_row: Any  # mean of the squared gradients over the columns
    v_col: Any  # mean of the squared gradients over the rows
    v: Any  # mean of the squared gradients where they are not factored: the parameter's shape
    m: Any  # momentum: the parameter's shape


class Adafactor(OptimizerDef):
    """Adafactor as T5X has it: same state, same numbers. Its rarer options are T5X's alone.

    The trainer gives the learning rate of each step.

    factored: keep row and column means where two axes reach `min_dim_size_to_factor`.
    multiply_by_parameter_scale: scale a step by the parameter's root mean square, at least 1e-3.
    beta1: decay of the momentum; None keeps none.
    decay_rate: the second moment of step t decays by 1 - (t - step_offset)**-decay_rate, t from 1.
    clipping_threshold: largest root mean square of an update before scaling; None clips nothing.
    logical_factor_rules: rule of each logical axis name, needed by parameters of rank above 2 or
        with stacked axes; None factors the two largest axes.
    """

    def __init__(
        self,
        *,
        factored: bool = True,
        multiply_by_parameter_scale: bool = True,
        beta1: float | None = None,
        decay_rate: float = 0.8,
        step_offset: int = 0,
        clipping_threshold: float | None = 1.0,
        min_dim_size_to_factor: int = 128,
        logical_factor_rules: Mapping[str, FactorDim] | None = None,
        **only_in_t5x: Any,
    ):
        refuse_options("adafactor.Adafactor", only_in_t5x)
        if multiply_by_parameter_scale is not False:
            name = "adafactor.Adafactor.multiply_by_parameter_scale"
            refuse(name, multiply_by_parameter_scale, True, "has one rule for all parameters")
        super().__init__()
        self.factored = factored
        self.multiply_by_parameter_scale = multiply_by_parameter_scale
        self.beta1 = beta1
        self.decay_rate = decay_rate
        self.step_offset = step_offset
        self.clipping_threshold = clipping_threshold
        self.min_dim_size_to_factor = min_dim_size_to_factor
        self.logical_factor_rules = logical_factor_rules
        self.factor_map: dict[str, tuple[FactorDim, ...]] = {}  # a rule per parameter

    def set_param_axes(self, param_logical_axes: PyTree) -> None:
        """Derives each parameter's factoring from its logical axes, if there are rules for them."""
        if self.logical_factor_rules is not None:
            rules, axes = self.logical_factor_rules, flatten(param_logical_axes)
            self.factor_map = {p: _rule_of_axes(p, names, rules) for p, names in axes.items()}

    def init_state(self, params: PyTree) -> OptimizerState:
        """Returns step 0 and an `AdafactorParamState` of zeros for each parameter."""
        states = {}
        for path, param in flatten(params).items():
            _, rows, columns = self._factoring(path, param.shape)
            means = (_without(param.shape, columns), _without(param.shape, rows), (1,))
            v_row, v_col, v = map(jnp.zeros, means if rows else ((1,), (1,), param.shape))
            m = jnp.zeros((1,) if self.beta1 is None else param.shape)
            states[path] = AdafactorParamState(v_row, v_col, v, m)
        return OptimizerState(jnp.zeros((), jnp.int32), unflatten(params, states))

    def apply_gradient(
        self, hyper_params: HyperParams, params: PyTree, state: OptimizerState, grads: PyTree
    ) -> tuple[PyTree, OptimizerState]:
        """Returns the updated parameters and state."""
        rate, step = hyper_params.learning_rate, state.step
        slots, grads = _slots_of(state), flatten(grads)
        new_params, new_slots = {}, {}
        for path, param in flatten(params).items():
            new_params[path], new_slots[path] = self._update_param(
                rate, path, param, slots[path], grads[path].astype(jnp.float32), step
            )
        new_state = OptimizerState(step + 1, unflatten(params, new_slots))
        return unflatten(params, new_params), new_state

    def derive_logical_axes(self, optimizer: Optimizer, param_logical_axes: PyTree) -> Optimizer:
        """Returns `optimizer` with logical axes for leaves.

        `v` and `m` have the parameter's; row and column means are small, and replicated: None.
        """
        slots = _slots_of(optimizer.state)
        states = {
            path: AdafactorParamState(
                v_row=None,
                v_col=None,
                v=axes if slots[path].v.shape != (1,) else None,
                m=None if self.beta1 is None else axes,
            )
            for path, axes in flatten(param_logical_axes).items()
        }
        return with_axes(optimizer, unflatten(optimizer.target, states), param_logical_axes)

    def _factoring(self, path: str, shape: tuple[int, ...]) -> tuple[tuple, tuple, tuple]:
        """Returns (averaged axes, rows, columns) of a parameter; no rows means it is unfactored."""
        every = tuple(range(len(shape)))
        if not self.factored:
            return every, (), ()
        rule = self.factor_map.get(path)
        # T5X overrules what the rules say of plain matrices: their two axes are taken by size.
        if rule is not None and (len(shape) > 2 or FactorDim.BATCH in rule):
            batch, rows, columns = (
                tuple(i for i in every if rule[i] is kind)
                for kind in (FactorDim.BATCH, FactorDim.ROW, FactorDim.COLUMN)
            )
            return tuple(i for i in every if i not in batch), rows, columns
        if len(shape) > 2:
            raise ValueError(
                f"Adafactor can not tell rows from columns of the parameter '{path}' of shape "
                f"{shape}: above rank 2 that takes rules. Set Adafactor.logical_factor_rules = "
                "@adafactor.standard_logical_factor_rules()."
            )
        by_size = sorted(every, key=lambda axis: shape[axis])
        if len(shape) < 2 or shape[by_size[-2]] < self.min_dim_size_to_factor:
            return every, (), ()
        return every, (by_size[-2],), (by_size[-1],)

    def _update_param(
        self,
        learning_rate: Any,
        path: str,
        param: jax.Array,
        slots: AdafactorParamState,
        grad: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, AdafactorParamState]:
        averaged, rows, columns = self._factoring(path, param.shape)
        count = jnp.asarray(step - self.step_offset, jnp.float32) + 1.0
        decay = 1.0 - count ** (-self.decay_rate)
        square = grad * grad + 1e-30
        if rows:
            v_row = decay * slots.v_row + (1.0 - decay) * jnp.mean(square, axis=columns)
            v_col = decay * slots.v_col + (1.0 - decay) * jnp.mean(square, axis=rows)
            slots = slots.replace(v_row=v_row, v_col=v_col)
            # The outer product of row and column means, over their common mean, stands for v.
            wide_row = jnp.expand_dims(v_row, columns)
            row_factor = (wide_row / jnp.mean(wide_row, axis=rows, keepdims=True)) ** -0.5
            update = grad * row_factor * jnp.expand_dims(v_col, rows) ** -0.5
        else:
            v = decay * slots.v + (1.0 - decay) * square
            slots = slots.replace(v=v)
            update = grad * v**-0.5

        if self.clipping_threshold is not None:
            excess = _rms(update, averaged) / self.clipping_threshold
            update = update / jnp.maximum(1.0, excess)
        scale = learning_rate
        if self.multiply_by_parameter_scale:
            scale = scale * jnp.maximum(_rms(param, averaged), 1e-3)
        update = scale * update
        if self.beta1 is not None:
            update = self.beta1 * slots.m + (1.0 - self.beta1) * update
            slots = slots.replace(m=update)
        return (param - update).astype(param.dtype), slots


def _slots_of(state: OptimizerState) -> dict[str, AdafactorParamState]:
    return flatten(state.param_states, is_leaf=lambda x: isinstance(x, AdafactorParamState))


def _rule_of_axes(path: str, axes: Sequence, rules: Mapping) -> tuple[FactorDim, ...]:
    rule = tuple(rules.get(axis) for axis in axes)
    unknown = [a for a, kind in zip(axes, rule, strict=True) if not isinstance(kind, FactorDim)]
    if unknown:
        raise ValueError(
            f"Adafactor.logical_factor_rules has no rule for the logical axis '{unknown[0]}' of "
            f"the parameter '{path}' with axes {tuple(axes)}; it has rules for {sorted(rules)}. "
            "Add a FactorDim."
        )
    has_both = FactorDim.ROW in rule and FactorDim.COLUMN in rule
    if has_both and FactorDim.NONE in rule:
        raise ValueError(
            f"Adafactor.logical_factor_rules factors the parameter '{path}' in part only: its axes "
            f"{tuple(axes)} are {[kind.name for kind in rule]}. Where there are rows and columns, "
            "every other axis must be a row, a column or a batch."
        )
    if has_both:
        return rule
    return tuple(kind if kind is FactorDim.BATCH else FactorDim.NONE for kind in rule)


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for axis, n in enumerate(shape) if axis not in axes)


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
