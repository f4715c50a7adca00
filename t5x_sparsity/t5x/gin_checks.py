"""Checks of a run's gin configuration, before anything is built from it."""

import difflib
from collections.abc import Mapping
from typing import Any

import gin
from gin.config import ConfigurableReference, iterate_references

from t5x_sparsity.artifacts.macros import sparsity_macros
from t5x_sparsity.t5x.initializer import SparseTrainStateInitializer
from t5x_sparsity.t5x.optimizer import UNDRIVEN
from t5x_sparsity.t5x.trainer import NOT_SPARSE, sparse_trainer

Config = Mapping[tuple[str, str], Mapping[str, Any]]


def check(config: Config) -> None:
    """A gin finalize hook.

    Raises:
      ValueError: one half of the include is overridden; or a macro that is bound, and is ours or
        looks like it, is read by nothing; or shares are not of the run's length.
    """
    _check_both_halves(config)
    _check_macros(config)
    _check_total_steps(config)


gin.config.register_finalize_hook(check)


def _check_both_halves(config: Config) -> None:
    for (_, selector), bindings in config.items():
        trainer = _wrapped(bindings.get("trainer_cls"))
        initializer = _wrapped(bindings.get("train_state_initializer_cls"))
        is_ours = trainer is sparse_trainer, initializer is SparseTrainStateInitializer
        if any(is_ours) and not all(is_ours):
            raise ValueError(f"{selector}: {NOT_SPARSE if is_ours[0] else UNDRIVEN}")


def _check_macros(config: Config) -> None:
    bound = {scope for scope, selector in config if selector == "gin.macro"}
    read = _macros(config)
    if "INITIAL_CHECKPOINT_PATH" in bound - read:
        raise ValueError(
            "INITIAL_CHECKPOINT_PATH is bound, but nothing reads it, and the run would start from "
            "scratch; include 'sparsity/from_dense.gin' for a dense checkpoint, or bind "
            "utils.RestoreCheckpointConfig.path for a sparse one"
        )
    ours = sparsity_macros()
    for name in sorted(bound - read):
        if name in ours:
            raise ValueError(
                f"{name} is bound, but nothing reads it: the included sparsity/*.gin has no such "
                "setting, or a binding has taken its place. Remove the binding of one of the two"
            )
        near = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=0.8)
        if near:
            raise ValueError(
                f"{name} is bound, but nothing reads it; did you mean {near[0]}? The macros of "
                f"sparsity/*.gin are {', '.join(ours)}"
            )


def _check_total_steps(config: Config) -> None:
    """Shares such as MASK_UPDATE_END = 0.75 are of TRAIN_STEPS, which relative steps overrule."""
    macros = {scope: b.get("value") for (scope, name), b in config.items() if name == "gin.macro"}
    has_shares = any(
        selector.startswith("t5x_sparsity.") and "total_steps" in bindings
        for (_, selector), bindings in config.items()
    )
    for (_, selector), bindings in config.items():
        relative = bindings.get("relative_steps")
        for name in _macros(relative):
            relative = macros.get(name)
        if relative is not None and has_shares:
            raise ValueError(
                f"{selector}.relative_steps (TRAIN_STEPS_RELATIVE) is {relative}, so that the run "
                "doesn't end at TRAIN_STEPS, of which MASK_UPDATE_BEGIN and MASK_UPDATE_END are "
                "shares; leave it None and set TRAIN_STEPS to the step at which the run ends"
            )


def _wrapped(value: Any) -> Any:
    return value.configurable.wrapped if isinstance(value, ConfigurableReference) else None


def _macros(value: Any) -> set[str]:
    """Names of the macros that a bound value reads, or all those of a mapping."""
    references = iterate_references(value, to=gin.get_configurable("gin.macro"))
    return {"/".join(reference.scopes) for reference in references}
