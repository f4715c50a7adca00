"""From rules, shapes and logical axes to one `LayerPlan` per sparse weight."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_sparsity.core import distributions, packing
from t5x_sparsity.core.checks import check_share
from t5x_sparsity.core.contract import Algorithm, LayerPlan, Plan
from t5x_sparsity.core.patterns import Pattern, Unstructured
from t5x_sparsity.core.schedules import UpdateSchedule

# Logical names of axes along which a weight is a stack of layers or experts.
STACKED_AXES = frozenset({"layers", "stack", "expert", "experts"})

# Weights that stay dense unless a rule says otherwise: embeddings, logits, relative-position
# biases, routers. Searched for in the lower-cased path.
DENSE_BY_DEFAULT = r"embed|logits|relpos|rel_bias|relative_attention_bias|router"

# The paths that EMBEDDING_SPARSITY applies to.
_EMBEDDINGS = r"(?i)embed"
_NOT_EMBEDDINGS = r"(?i)rel_embed|relpos|relative_embed|rel_bias|relative_attention_bias"

AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Level, pattern and algorithm of the weights whose path matches; the first match wins.

    >>> import jax, t5x_sparsity as ts
    >>> shapes = {p: jax.ShapeDtypeStruct((64, 64), "float32") for p in ("attention/out", "mlp/wi")}
    >>> rules = [Rule(path="^mlp/", pattern=ts.NByM(n=2, m=4)), Rule(path="out$", sparsity=None)]
    >>> plan = make_plan(shapes, sparsity=0.9, rules=rules)
    >>> {path: layer.sparsity for path, layer in plan.items()}
    {'mlp/wi': 0.5}

    Attributes:
      path: regular expression, searched for in a weight's path, e.g. 'encoder/.*/mlp/'.
      sparsity: level of these weights, in [0, 1], outside the shared budget; None leaves them
        dense; 'auto' is 1 - sqrt(1 - SPARSITY), the level of embeddings; 'shared' puts them in the
        budget.
      pattern: the shape that their zeros come in; None takes the run's pattern. A pattern of a
        fixed level, such as 2:4, has that level and stays outside the budget.
      algorithm: what decides on their masks, with its own schedules; None takes the run's.
      stack_axes: logical names of axes along which slices are sparsified separately, such as
        'heads', in addition to STACKED_AXES.

    Raises:
      ValueError: a path that is no regular expression, a level out of range, arguments that
        contradict each other.
    """

    path: str
    sparsity: float | str | None = "shared"
    pattern: Pattern | None = None
    algorithm: Algorithm | None = None
    stack_axes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stack_axes, str):
            raise ValueError(
                f"stack_axes of the rule for {self.path!r} must be a list of logical axis names, "
                f"got {self.stack_axes!r}; write [{self.stack_axes!r}]"
            )
        object.__setattr__(self, "stack_axes", tuple(self.stack_axes))
        try:
            re.compile(self.path)
        except re.error as e:
            raise ValueError(f"rule path {self.path!r} is not a regular expression: {e}") from e
        if self.sparsity is None and not getattr(self.algorithm, "is_dense", True):
            raise ValueError(
                f"the rule for {self.path!r} leaves its weights dense (sparsity None), but has the "
                f"algorithm {self.algorithm}; leave one of them out"
            )
        if self.sparsity not in (None, AUTO, "shared"):
            check_level(self.sparsity, f"sparsity of the rule for {self.path!r}", closed=True)
            fixed = self.pattern.fixed_level if self.pattern is not None else None
            if fixed is not None and fixed != self.sparsity:
                raise ValueError(
                    f"the rule for {self.path!r} asks for a sparsity of {self.sparsity}, but "
                    f"{self.pattern} has {fixed} and takes no other; leave the rule's sparsity out"
                )


def check_level(value: object, name: str, *, closed: bool = False) -> None:
    """Raises ValueError unless value is a number in [0, 1), or [0, 1] where `closed`."""
    check_share(name, value, closed=closed, hint="0.9 means that 90% of the weights are zero")


def check_embedding_level(value: object) -> None:
    """Raises ValueError unless value is a level in [0, 1), 'auto' or None."""
    if value not in (None, AUTO):
        check_level(value, "embedding_sparsity (EMBEDDING_SPARSITY), unless 'auto' or None,")


def make_plan(
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
    *,
    sparsity: float,
    distribution: str = "uniform",
    pattern: Pattern | None = None,
    algorithm: Algorithm | None = None,
    rules: Sequence[Rule] = (),
    embedding_sparsity: float | str | None = None,
    axes: Mapping[str, Sequence[str | None] | None] | None = None,
    pack_masks: bool = True,
) -> dict[str, LayerPlan]:
    """The plan of every sparse weight, by path, in path order.

    A weight that no rule matches is sparse if it has two or more unstacked dims and is not an
    embedding, logits kernel, relative-position bias or router.

    >>> shapes = {"mlp/wi": (64, 256), "mlp/wo": (256, 64), "norm/scale": (64,)}
    >>> plan = make_plan(
    ...     {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}, sparsity=0.75
    ... )
    >>> {path: (layer.kept, layer.mask_shape) for path, layer in plan.items()}
    {'mlp/wi': (4096, (8, 256)), 'mlp/wo': (4096, (32, 64))}

    Args:
      shapes: path -> anything with `.shape` and `.dtype`.
      sparsity: the share of zeros among all weights in the shared budget, in [0, 1).
      distribution: how layers share it: 'uniform', 'er', 'erk'.
      pattern: the shape that zeros come in, where no rule says otherwise. None: Unstructured.
      algorithm: what decides on masks, where no rule says otherwise.
      rules: the first that matches a path wins.
      embedding_sparsity: level of embeddings, 'auto', or None to leave them dense.
      axes: path -> logical names of the weight's axes; those in STACKED_AXES are stacked.
      pack_masks: store eight weights per byte where a weight's shape allows.

    Raises:
      ValueError: a level out of range, an unknown distribution, a rule that matches no weight, a
        pattern that a weight can't take. The message names the weight or the rule.
    """
    check_level(sparsity, "sparsity (SPARSITY)")
    distributions.check_distribution(distribution)
    pattern = Unstructured() if pattern is None else pattern
    axes = {} if axes is None else axes
    check_embedding_level(embedding_sparsity)
    eligible = {p: x for p, x in shapes.items() if _can_be_sparse(x)}
    matched = _match(rules, eligible)

    layers: dict[str, LayerPlan] = {}
    shared: dict[str, LayerPlan] = {}
    for path in sorted(eligible):
        shape = tuple(eligible[path].shape)
        given = axes.get(path)
        names = None if given is None else tuple(given)
        if len(names or ()) > len(shape):
            raise ValueError(
                f"weight {path!r} has shape {shape} but logical axes {names}; give one name an axis"
            )
        stack_axes = tuple(a for a, n in enumerate(names or ()) if n in STACKED_AXES)
        rule = matched.get(path)
        level: float | str | None
        own_algorithm = algorithm
        if rule is not None:
            level, own_pattern = rule.sparsity, rule.pattern or pattern
            own_algorithm = rule.algorithm or algorithm
            stack_axes = _rule_stacks(rule, path, names, stack_axes)
        elif len(shape) - len(stack_axes) < 2:
            continue
        elif embedding_sparsity is not None and _is_embedding(path):
            level, own_pattern = embedding_sparsity, pattern
        elif re.search(DENSE_BY_DEFAULT, path.lower()):
            continue
        else:
            level, own_pattern = "shared", pattern
        if level is None or getattr(own_algorithm, "is_dense", False):
            continue
        layer = LayerPlan(
            path=path,
            shape=shape,
            axes=names,
            stack_axes=stack_axes,
            pattern=own_pattern,
            sparsity=0.0,
            pack_axis=packing.pack_axis(shape, stack_axes) if pack_masks else None,
            algorithm=own_algorithm,
        )
        if len(layer.slice_shape) < 2 and not isinstance(own_pattern, Unstructured):
            raise ValueError(
                f"weight {path!r} has {len(layer.slice_shape)} unstacked dim; {own_pattern} needs "
                "two or more: leave it dense, or give its rule the pattern Unstructured"
            )
        try:
            own_pattern.validate(layer.slice_shape)
        except ValueError as e:
            raise ValueError(f"weight {path!r}: {e}, or leave this weight out by a rule") from e
        if own_pattern.fixed_level is not None:
            if rule is not None and level not in (AUTO, "shared", own_pattern.fixed_level):
                raise ValueError(
                    f"weight {path!r}: its rule asks for a sparsity of {level}, but {own_pattern} "
                    f"has {own_pattern.fixed_level} and takes no other; leave the rule's sparsity "
                    "out, or give it another pattern"
                )
            if rule is None and level != "shared":
                raise ValueError(
                    f"weight {path!r}: embedding_sparsity (EMBEDDING_SPARSITY) asks for {level}, "
                    f"but {own_pattern} has {own_pattern.fixed_level} and takes no other; give "
                    "embeddings a rule with the pattern Unstructured"
                )
            level = own_pattern.fixed_level
        elif level == AUTO:
            level = 1 - math.sqrt(1 - sparsity)
        if level == "shared":
            shared[path] = layer
        else:
            layers[path] = dataclasses.replace(layer, sparsity=float(level))
    levels = distributions.distribute(
        distribution,
        {p: x.matrix_shape for p, x in shared.items()},
        sparsity,
        {p: x.slices for p, x in shared.items()},
    )
    for path, layer in shared.items():
        layers[path] = dataclasses.replace(layer, sparsity=levels[path], in_budget=True)
    return {path: layers[path] for path in sorted(layers)}


def _rule_stacks(
    rule: Rule, path: str, names: Sequence[str | None] | None, stack_axes: tuple[int, ...]
) -> tuple[int, ...]:
    """The stacked axes of a weight, including those that its rule names."""
    missing = [n for n in rule.stack_axes if n not in (names or ())]
    if missing:
        raise ValueError(
            f"the rule for {rule.path!r} stacks along {missing}, but weight {path!r} has the "
            f"logical axes {names}; name axes that it has"
        )
    own = [a for a, n in enumerate(names or ()) if n in rule.stack_axes]
    return tuple(sorted({*stack_axes, *own}))


def _can_be_sparse(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and 0 not in x.shape


def _is_embedding(path: str) -> bool:
    return bool(re.search(_EMBEDDINGS, path)) and not re.search(_NOT_EMBEDDINGS, path)


def _match(rules: Sequence[Rule], shapes: Mapping[str, object]) -> dict[str, Rule]:
    matched: dict[str, Rule] = {}
    for rule in rules:
        hits = [p for p in shapes if re.search(rule.path, p)]
        new = [p for p in hits if p not in matched]
        if not new:
            why = (
                "every weight it matches is taken by an earlier rule"
                if hits
                else "it matches no weight"
            )
            raise ValueError(
                f"the rule for {rule.path!r} has no effect: {why}. The weights are:\n  "
                + "\n  ".join(sorted(shapes))
            )
        matched.update((p, rule) for p in new)
    return matched


def by_algorithm(plan: Plan) -> list[tuple[Algorithm, Plan]]:
    """The plan in parts: each algorithm, with the plan of the weights that it decides on.

    Raises:
      ValueError: a weight whose plan has no algorithm.
    """
    parts: list[tuple[Algorithm, dict[str, LayerPlan]]] = []
    for path, layer in plan.items():
        if layer.algorithm is None:
            raise ValueError(
                f"the plan of {path!r} has no algorithm; pass make_plan's argument algorithm"
            )
        part = next((p for algorithm, p in parts if algorithm == layer.algorithm), None)
        if part is None:
            part = {}
            parts.append((layer.algorithm, part))
        part[path] = layer
    return [*parts]


def update_schedules(plan: Plan) -> list[UpdateSchedule]:
    """The schedules by which masks of the plan change; equal ones once."""
    found: list[UpdateSchedule] = []
    for algorithm, _ in by_algorithm(plan):
        if algorithm.updates.last is not None and algorithm.updates not in found:
            found.append(algorithm.updates)
    return found
