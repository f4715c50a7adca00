"""The optimizers that the host tests train with, those of T5X's users."""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from flax.traverse_util import ModelParamTraversal

from t5x_sparsity import host


class Case(NamedTuple):
    """An optimizer; `make` takes no arguments.

    slots: how many leaves of its state mirror a weight.
    dense: regular expression of the paths of weights that are not trained, and so stay dense.
    """

    make: Callable
    slots: int
    dense: str | None = None


def _quiet(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def adafactor(**kwargs):
    return host.adafactor.Adafactor(
        decay_rate=0.8,
        step_offset=0,
        logical_factor_rules=host.adafactor.standard_logical_factor_rules(),
        **kwargs,
    )


def multi(*parts):
    """Optimizers for the weights whose path has the given words."""

    def finds(words):
        # flax announces its end; T5X's MultiOptimizer takes nothing else
        return _quiet(lambda: ModelParamTraversal(lambda path, _: re.search(words, path)))

    return host.optimizers.MultiOptimizer([(finds(words), made) for words, made in parts])


def _matrices(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _labels(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "frozen", params)


def _wrapped(make):
    return lambda: host.optimizers.OptaxWrapper(make())


def exported(name):
    """What T5X exports of optax, by its name there; where the host has no such name, wrapped."""
    return getattr(host.optimizers, name, None) or (
        lambda *args, **kwargs: host.optimizers.OptaxWrapper(getattr(optax, name)(*args, **kwargs))
    )


EXPORTED = {
    "adabelief": Case(lambda: exported("adabelief")(1e-2), 2),
    "adagrad": Case(lambda: exported("adagrad")(1e-2), 1),
    "adam": Case(lambda: host.optimizers.adam(1e-2, nesterov=True), 2),
    "adamw": Case(lambda: host.optimizers.adamw(1e-2), 2),
    "fromage": Case(lambda: exported("fromage")(1e-2), 0),
    "lamb": Case(lambda: exported("lamb")(1e-2), 2),
    "lars": Case(lambda: exported("lars")(1e-2), 1),
    "lion": Case(lambda: host.optimizers.lion(1e-3), 1),
    "noisy_sgd": Case(lambda: exported("noisy_sgd")(1e-2, key=jax.random.key(0)), 0),
    "radam": Case(lambda: exported("radam")(1e-2), 2),
    "rmsprop": Case(lambda: exported("rmsprop")(1e-2, centered=True, momentum=0.9), 3),
    "sgd": Case(lambda: host.optimizers.sgd(1e-2, momentum=0.9), 1),
    "yogi": Case(lambda: exported("yogi")(1e-2), 2),
}

# what takes an optimizer, or several
COMBINED = {
    "apply_if_finite": Case(_wrapped(lambda: optax.apply_if_finite(optax.adam(1e-2), 3)), 2),
    "chain": Case(
        lambda: host.optimizers.chain([optax.clip_by_global_norm(1.0), optax.adam(1e-2)]), 2
    ),
    "chain-ema": Case(lambda: host.optimizers.chain([optax.adam(1e-2), optax.ema(0.9)]), 3),
    "masked": Case(_wrapped(lambda: optax.masked(optax.adam(1e-2), _matrices)), 2),
    # beside Adam's, the gradients that it accumulates
    "multi-steps": Case(_wrapped(lambda: optax.MultiSteps(optax.adam(1e-2), 2)), 3),
    "multi-transform": Case(
        _wrapped(
            lambda: optax.multi_transform(
                {"matrix": optax.adamw(1e-2), "frozen": optax.set_to_zero()}, _labels
            )
        ),
        2,
    ),
    "schedule": Case(lambda: host.optimizers.adamw(optax.linear_schedule(1e-2, 0.0, 10)), 2),
}

ADAFACTORS = {
    "adafactor": Case(adafactor, 1),
    "adafactor-factored": Case(lambda: adafactor(min_dim_size_to_factor=8), 0),
    "adafactor-momentum": Case(lambda: adafactor(beta1=0.9, min_dim_size_to_factor=8), 1),
    "adafactor-unscaled": Case(lambda: adafactor(multiply_by_parameter_scale=False), 1),
    "adafactor-whole": Case(lambda: adafactor(factored=False), 1),
}

# what only T5X has: its MultiOptimizer, and Amos, of a package next to it
T5X_ONLY = {
    "multi": Case(
        lambda: multi(
            ("wi", adafactor(factored=False, beta1=0.9)),
            ("wo|norm", adafactor(factored=False, beta1=0.8, multiply_by_parameter_scale=False)),
        ),
        2,
    ),
    "multi-frozen": Case(
        lambda: multi(("wi", adafactor(beta1=0.9, factored=False)), ("norm", adafactor())),
        2,
        "^(?!.*(wi|norm))",
    ),
    "amos": Case(lambda: host.optimizers.amos(1e-2, eta_fn=lambda *_: 1.0, momentum=0.9), 3),
    # slots of one row
    "amos-reduced": Case(
        lambda: host.optimizers.amos(
            1e-2, eta_fn=lambda *_: 1.0, shape_fn=lambda _, shape: (1,) + shape[1:]
        ),
        0,
    ),
}

CASES = EXPORTED | COMBINED | ADAFACTORS | T5X_ONLY

# what T5X does not train dense either
REFUSED = {
    "dpsgd": lambda: _quiet(lambda: host.optimizers.dpsgd(1e-2, 1.0, 0.1, 0)),
    "inject_hyperparams": _wrapped(
        lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2)
    ),
    "lookahead": _wrapped(lambda: optax.lookahead(optax.adam(1e-2), 2, 0.5)),
    "multi-over-optax": lambda: multi((".", host.optimizers.adam(1e-2))),
    "rmsprop-bias-correction": lambda: host.optimizers.rmsprop(1e-2, bias_correction=True),
    "sm3": _wrapped(lambda: optax.sm3(1e-2)),
    "zero_nans": lambda: host.optimizers.chain([optax.zero_nans(), optax.adam(1e-2)]),
}
