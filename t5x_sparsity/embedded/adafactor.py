"""Adafactor (Shazeer and Stern, 2018), with factoring chosen by logical axis names as in T5X.

The second moment of a matrix is kept as row and column means. A parameter with stacked axes
(scanned layers) is factored, scaled and clipped slice by slice.
"""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict, freeze

from t5x_sparsity.embedded.optimizers import (
    Optimizer,
    OptimizerDef,
    OptimizerState,
    flatten,
    unflatten,
    with_axes,
)

PyTree = Any


class FactorDim(enum.Enum):
    """What one axis is to the factored second moment."""

    NONE = None  # keeps the parameter unfactored
    BATCH = 1  # stacked: slices have nothing to do with each other
    ROW = 2
    COLUMN = 3


_FACTOR_NAMES = {
    "none": FactorDim.NONE,
    "unfactorized": FactorDim.NONE,
    "batch": FactorDim.BATCH,
    "row": FactorDim.ROW,
    "col": FactorDim.COLUMN,
    "column": FactorDim.COLUMN,
}


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
    m: Any  # momentum, in `dtype_momentum`: the parameter's shape


@struct.dataclass
class AdafactorHyperParams:
    """The arguments of `Adafactor`, and `factor_map`: a rule for each parameter path."""

    learning_rate: Any
    factored: bool
    multiply_by_parameter_scale: bool
    beta1: float | None
    decay_rate: float
    step_offset: int
    clipping_threshold: float | None
    weight_decay_rate: float | None
    min_dim_size_to_factor: int
    epsilon1: float
    epsilon2: float
    logical_factor_rules: Any
    weight_decay_rate_lr_exponent: float | None
    global_norm_clip_threshold: float | None
    max_parameter_scale: float | None
    skip_nan_updates: bool
    factor_map: Any = None


class Adafactor(OptimizerDef):
    """Adafactor as T5X has it: same arguments, same state, same numbers.

    learning_rate: usually given by the trainer at each step; relative to the parameter's scale.
    factored: keep row and column means where two axes reach `min_dim_size_to_factor`.
    multiply_by_parameter_scale: scale a step by the parameter's root mean square, at least
        `epsilon2` and at most `max_parameter_scale`.
    beta1: decay of the momentum, kept in `dtype_momentum`; None keeps none.
    decay_rate: the second moment of step t decays by 1 - (t - step_offset)**-decay_rate, t from 1.
    clipping_threshold: largest root mean square of an update before scaling; None clips nothing.
    weight_decay_rate, weight_decay_rate_lr_exponent: each step multiplies weights by
        1 - weight_decay_rate * learning_rate**exponent; both None decay nothing.
    logical_factor_rules: rule of each logical axis name, needed by parameters of rank above 2 or
        with stacked axes; None factors the two largest axes.
    global_norm_clip_threshold: largest global norm of the gradients.
    skip_nan_updates: keep the old value wherever a new one is NaN.
    """

    def __init__(
        self,
        learning_rate: float | None = None,
        factored: bool = True,
        multiply_by_parameter_scale: bool = True,
        beta1: float | None = None,
        decay_rate: float = 0.8,
        step_offset: int = 0,
        clipping_threshold: float | None = 1.0,
        weight_decay_rate: float | None = None,
        min_dim_size_to_factor: int = 128,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        dtype_momentum: Any = jnp.float32,
        logical_factor_rules: Mapping[str, FactorDim | str] | None = None,
        weight_decay_rate_lr_exponent: float | None = None,
        global_norm_clip_threshold: float | None = None,
        max_parameter_scale: float | None = None,
        skip_nan_updates: bool = False,
    ):
        """Checks and keeps the arguments, see the class."""
        if not isinstance(multiply_by_parameter_scale, bool):
            raise TypeError(
                "Adafactor.multiply_by_parameter_scale must be True or False on the embedded host, "
                f"got {type(multiply_by_parameter_scale).__name__}. For rules use T5X."
            )
        given = locals()
        self.dtype_momentum = jnp.dtype(dtype_momentum)
        names = (field.name for field in dataclasses.fields(AdafactorHyperParams))
        super().__init__(AdafactorHyperParams(**{n: given[n] for n in names if n in given}))

    def set_param_axes(self, param_logical_axes: PyTree) -> None:
        """Derives each parameter's factoring from its logical axes, if there are rules for them."""
        rules = self.hyper_params.logical_factor_rules
        if rules is None:
            return
        factor_map = {
            path: _rule_of_axes(path, tuple(axes), rules)
            for path, axes in flatten(param_logical_axes).items()
        }
        self.hyper_params = self.hyper_params.replace(factor_map=factor_map)

    def init_state(self, params: PyTree) -> OptimizerState:
        """Returns step 0 and an `AdafactorParamState` of zeros for each parameter."""
        states = {path: self._init_param(path, p) for path, p in flatten(params).items()}
        return OptimizerState(jnp.zeros((), jnp.int32), unflatten(states, like=params))

    def apply_gradient(
        self,
        hyper_params: AdafactorHyperParams,
        params: PyTree,
        state: OptimizerState,
        grads: PyTree,
    ) -> tuple[PyTree, OptimizerState]:
        """Returns the updated parameters and state; a learning rate of None is a ValueError."""
        if hyper_params.learning_rate is None:
            raise ValueError(
                "Adafactor got no learning rate. Set Trainer.learning_rate_fn, which gives one for "
                "each step, or Adafactor.learning_rate."
            )
        flat_states = flatten(state.param_states)
        flat_grads = flatten(grads)
        limit = hyper_params.global_norm_clip_threshold
        if limit:
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in flat_grads.values()))
            scale = jnp.minimum(1.0, limit / norm)
            flat_grads = {path: g * scale for path, g in flat_grads.items()}

        new_params, new_states = {}, {}
        for path, param in flatten(params).items():
            new_params[path], new_states[path] = self._update_param(
                hyper_params, path, param, flat_states[path], flat_grads[path], state.step
            )
        return unflatten(new_params, like=params), OptimizerState(
            state.step + 1, unflatten(new_states, like=params)
        )

    def derive_logical_axes(self, optimizer: Optimizer, param_logical_axes: PyTree) -> Optimizer:
        """Returns `optimizer` with logical axes for leaves.

        `v` and `m` have the parameter's; row and column means are small, and replicated: None.
        """
        has_momentum = self.hyper_params.beta1 is not None
        slots = flatten(optimizer.state.param_states)
        states = {
            path: AdafactorParamState(
                v_row=None,
                v_col=None,
                v=axes if slots[path].v.shape != (1,) else None,
                m=axes if has_momentum else None,
            )
            for path, axes in flatten(param_logical_axes).items()
        }
        states = unflatten(states, like=optimizer.state.param_states)
        return with_axes(optimizer, states, param_logical_axes)

    def _factoring(self, path: str, shape: tuple[int, ...]) -> tuple[tuple, tuple, tuple]:
        """Returns (averaged axes, rows, columns) of a parameter; no rows means it is unfactored."""
        every = tuple(range(len(shape)))
        if not self.hyper_params.factored:
            return every, (), ()
        rule = (self.hyper_params.factor_map or {}).get(path)
        if rule is None and self.hyper_params.factor_map:
            raise ValueError(
                f"Adafactor has no factoring rule for the parameter '{path}' of shape {shape}: "
                "it was absent when set_param_axes was called. Make a new Adafactor for it."
            )
        # T5X overrules what the rules say of plain matrices: their two axes are taken by size.
        if rule is not None and (len(shape) > 2 or FactorDim.BATCH in rule):
            by_kind = {kind: tuple(i for i in every if rule[i] is kind) for kind in FactorDim}
            averaged = tuple(i for i in every if i not in by_kind[FactorDim.BATCH])
            return averaged, by_kind[FactorDim.ROW], by_kind[FactorDim.COLUMN]
        if len(shape) > 2:
            raise ValueError(
                f"Adafactor can not tell rows from columns of the parameter '{path}' of shape "
                f"{shape}: above rank 2 that takes rules. Set Adafactor.logical_factor_rules = "
                "@adafactor.standard_logical_factor_rules()."
            )
        by_size = sorted(every, key=lambda axis: shape[axis])
        if len(shape) < 2 or shape[by_size[-2]] < self.hyper_params.min_dim_size_to_factor:
            return every, (), ()
        return every, (by_size[-2],), (by_size[-1],)

    def _init_param(self, path: str, param: jax.Array) -> AdafactorParamState:
        _, rows, columns = self._factoring(path, param.shape)
        unused = jnp.zeros((1,))
        momentum = unused
        if self.hyper_params.beta1 is not None:
            momentum = jnp.zeros(param.shape, self.dtype_momentum)
        if not rows:
            return AdafactorParamState(unused, unused, jnp.zeros(param.shape), momentum)
        shape_without = functools.partial(_shape_without, param.shape)
        return AdafactorParamState(
            v_row=jnp.zeros(shape_without(columns)),
            v_col=jnp.zeros(shape_without(rows)),
            v=unused,
            m=momentum,
        )

    def _update_param(
        self,
        hp: AdafactorHyperParams,
        path: str,
        param: jax.Array,
        slots: AdafactorParamState,
        grad: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, AdafactorParamState]:
        averaged, rows, columns = self._factoring(path, param.shape)
        rms = functools.partial(_rms, axes=averaged)
        grad = grad.astype(jnp.float32)

        count = jnp.asarray(step - hp.step_offset, jnp.float32) + 1.0
        decay = 1.0 - count ** (-hp.decay_rate)
        square = grad * grad + hp.epsilon1
        new_slots = {}
        if rows:
            v_row = decay * slots.v_row + (1.0 - decay) * jnp.mean(square, axis=columns)
            v_col = decay * slots.v_col + (1.0 - decay) * jnp.mean(square, axis=rows)
            new_slots = {"v_row": v_row, "v_col": v_col}
            # The outer product of row and column means, over their common mean, stands for v.
            wide_row = jnp.expand_dims(v_row, columns)
            row_factor = (wide_row / jnp.mean(wide_row, axis=rows, keepdims=True)) ** -0.5
            update = grad * row_factor * jnp.expand_dims(v_col, rows) ** -0.5
        else:
            v = decay * slots.v + (1.0 - decay) * square
            new_slots = {"v": v}
            update = grad * v**-0.5

        if hp.clipping_threshold is not None:
            update = update / jnp.maximum(1.0, rms(update) / hp.clipping_threshold)
        scale = hp.learning_rate
        if hp.multiply_by_parameter_scale:
            scale = scale * jnp.clip(rms(param), hp.epsilon2, hp.max_parameter_scale)
        update = scale * update
        if hp.beta1 is not None:
            update = hp.beta1 * slots.m + (1.0 - hp.beta1) * update
            new_slots["m"] = update.astype(self.dtype_momentum)

        decay_rate = hp.weight_decay_rate
        if hp.weight_decay_rate_lr_exponent:
            decay_rate = (decay_rate or 1.0) * hp.learning_rate**hp.weight_decay_rate_lr_exponent
        kept = param if decay_rate is None else (1.0 - decay_rate) * param
        new_param = (kept - update).astype(param.dtype)
        if hp.skip_nan_updates:
            new_param = jnp.where(jnp.isnan(new_param), param, new_param)
            new_slots = {
                name: jnp.where(jnp.isnan(new), getattr(slots, name), new)
                for name, new in new_slots.items()
            }
        return new_param, slots.replace(**new_slots)


def _rule_of_axes(path: str, axes: tuple, rules: Mapping) -> tuple[FactorDim, ...]:
    unknown = [axis for axis in axes if axis not in rules]
    if unknown:
        raise ValueError(
            f"Adafactor.logical_factor_rules has no rule for the logical axis '{unknown[0]}' of "
            f"the parameter '{path}' with axes {axes}; it has rules for {sorted(rules)}. Add one."
        )
    rule = tuple(_as_factor_dim(axis, rules[axis]) for axis in axes)
    has_both = FactorDim.ROW in rule and FactorDim.COLUMN in rule
    if has_both and FactorDim.NONE in rule:
        raise ValueError(
            f"Adafactor.logical_factor_rules factors the parameter '{path}' in part only: its axes "
            f"{axes} are {[kind.name for kind in rule]}. Where there are rows and columns, every "
            "other axis must be a row, a column or a batch."
        )
    if has_both:
        return rule
    return tuple(kind if kind is FactorDim.BATCH else FactorDim.NONE for kind in rule)


def _as_factor_dim(axis: str, kind: FactorDim | str) -> FactorDim:
    if isinstance(kind, FactorDim):
        return kind
    if str(kind).lower() in _FACTOR_NAMES:
        return _FACTOR_NAMES[str(kind).lower()]
    raise ValueError(
        f"Adafactor.logical_factor_rules['{axis}'] is {kind!r}; it must be one of "
        f"{sorted(_FACTOR_NAMES)}."
    )


def _rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))


def _shape_without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)
