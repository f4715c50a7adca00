"""The configuration of a sparse run, and the plan that it makes: one `LayerPlan` per weight."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5x_sparsity.core import distributions, packing
from t5x_sparsity.core.checks import check_share
from t5x_sparsity.core.contract import Algorithm, LayerPlan, Plan
from t5x_sparsity.core.patterns import Pattern, Unstructured
from t5x_sparsity.core.schedules import UpdateSchedule

Names = Sequence[str | None]  # of a weight's axes, None where unknown

# Logical names of axes along which a weight is a stack of layers or experts.
STACKED_AXES = frozenset({"layers", "stack", "expert", "experts"})

# Weights that stay dense unless a rule says otherwise; searched for in the lower-cased path.
DENSE_BY_DEFAULT = r"embed|logits|relpos|rel_bias|relative_attention_bias|router"

# The paths that EMBEDDING_SPARSITY applies to.
_EMBEDDINGS = r"(?i)embed"
_NOT_EMBEDDINGS = r"(?i)rel_embed|relpos|relative_embed|rel_bias|relative_attention_bias"

AUTO, SHARED = "auto", "shared"  # levels by name, see `Rule.sparsity`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Level, pattern and algorithm of the weights whose path matches; the first match wins.

    >>> import jax, t5x_sparsity as ts
    >>> shapes = {p: jax.ShapeDtypeStruct((64, 64), "float32") for p in ("attention/out", "mlp/wi")}
    >>> rules = [Rule(path="^mlp/", pattern=ts.NByM(n=2, m=4)), Rule(path="out$", sparsity=None)]
    >>> config = SparsityConfig(algorithm=ts.Static(), sparsity=0.9, rules=rules)
    >>> {path: layer.sparsity for path, layer in config.plan(shapes).items()}
    {'mlp/wi': 0.5}

    Attributes:
      path: regular expression, searched for in a weight's path, e.g. 'encoder/.*/mlp/'.
      sparsity: level of these weights, in [0, 1], outside the shared budget; 'shared' puts them in
        the budget; 'auto' is 1 - sqrt(1 - SPARSITY), as for embeddings; None leaves them dense.
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
    sparsity: float | str | None = SHARED
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
        if self.sparsity is None and self.algorithm is not None and not self.algorithm.is_dense:
            raise ValueError(
                f"the rule for {self.path!r} leaves its weights dense (sparsity None), but has the "
                f"algorithm {self.algorithm}; leave one of them out"
            )
        if self.sparsity not in (None, AUTO, SHARED):
            _check_level(self.sparsity, f"sparsity of the rule for {self.path!r}", closed=True)
            fixed = self.pattern.fixed_level if self.pattern is not None else None
            if fixed is not None and fixed != self.sparsity:
                raise ValueError(
                    f"the rule for {self.path!r} asks for a sparsity of {self.sparsity}, but "
                    f"{self.pattern} has {fixed} and takes no other; leave the rule's sparsity out"
                )


def _check_level(value: object, name: str, *, closed: bool = False) -> None:
    """Raises ValueError unless value is a number in [0, 1), or [0, 1] where `closed`."""
    check_share(name, value, closed=closed, hint="0.9 means that 90% of the weights are zero")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What is sparsified, to which level and by which algorithm.

    >>> import jax, t5x_sparsity as ts
    >>> config = SparsityConfig(algorithm=ts.Static(), sparsity=0.75)
    >>> plan = config.plan({"mlp/wi": jax.ShapeDtypeStruct((64, 128), "float32")})
    >>> plan["mlp/wi"].sparsity, plan["mlp/wi"].kept, plan["mlp/wi"].mask_shape
    (0.75, 2048, (8, 128))

    Attributes:
      algorithm: decides which weights are kept, where no rule says otherwise.
      sparsity: the share of zeros among all weights in the shared budget, in [0, 1).
      distribution: how layers share it: 'uniform', 'er', 'erk'.
      pattern: the shape that zeros come in, where no rule says otherwise. None: Unstructured.
      rules: levels, patterns and algorithms of some weights; the first that matches a path wins.
      embedding_sparsity: level of embeddings, 'auto' for 1 - sqrt(1 - sparsity), None for dense.
      seed: of the masks' random choices, a non-negative integer.
      pack_masks: store masks eight weights per byte where a weight's shape allows.
      track_explored: remember which weights have ever been kept, another bit per weight, for the
        explored share of In-Time Over-Parameterization (Liu et al. 2021, arXiv:2102.02887).

    Raises:
      ValueError: a level out of range, or an unknown distribution.
    """

    algorithm: Algorithm
    sparsity: float = 0.8
    distribution: str = "uniform"
    pattern: Pattern | None = None
    rules: Sequence[Rule] = ()
    embedding_sparsity: float | str | None = None
    seed: int = 0
    pack_masks: bool = True
    track_explored: bool = False

    def __post_init__(self) -> None:
        _check_level(self.sparsity, "sparsity (SPARSITY)")
        object.__setattr__(self, "rules", tuple(self.rules))
        distributions.check_distribution(self.distribution)
        if self.embedding_sparsity not in (None, AUTO):
            name = "embedding_sparsity (EMBEDDING_SPARSITY), unless 'auto' or None,"
            _check_level(self.embedding_sparsity, name)

    def plan(
        self,
        shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array],
        axes: Mapping[str, Names | None] | None = None,
    ) -> dict[str, LayerPlan]:
        """The plan of every sparse weight, by path, in path order; empty for a dense run.

        A weight that no rule matches is sparse if it has two or more unstacked dims and is not an
        embedding, logits kernel, relative-position bias or router.

        Args:
          shapes: path -> anything with `.shape` and `.dtype`.
          axes: path -> logical names of the weight's axes; those in STACKED_AXES are stacked.

        Raises:
          ValueError: a rule that matches no weight, a pattern that a weight can't take. The message
            names the weight or the rule.
        """
        eligible = {p: x for p, x in shapes.items() if _can_be_sparse(x)}
        rules = _match(self.rules, eligible)
        layers: dict[str, LayerPlan] = {}
        for path in sorted(eligible):
            names = None if axes is None else axes.get(path)
            layer = self._layer(path, tuple(eligible[path].shape), names, rules.get(path))
            if layer is not None:
                layers[path] = layer
        shared = {p: layer for p, layer in layers.items() if layer.in_budget}
        levels = distributions.distribute(
            self.distribution,
            {p: x.matrix_shape for p, x in shared.items()},
            self.sparsity,
            {p: x.slices for p, x in shared.items()},
        )
        for path, layer in shared.items():
            layers[path] = dataclasses.replace(layer, sparsity=levels[path])
        return layers

    def _layer(
        self, path: str, shape: tuple[int, ...], names: Names | None, rule: Rule | None
    ) -> LayerPlan | None:
        """The plan of one weight, None if it stays dense; of level 0 if it is in the budget."""
        axes = None if names is None else tuple(names)
        if len(axes or ()) > len(shape):
            raise ValueError(
                f"weight {path!r} has shape {shape} but logical axes {axes}; give one name an axis"
            )
        stacked = () if rule is None else rule.stack_axes
        stack_axes = tuple(a for a, n in enumerate(axes or ()) if n in {*STACKED_AXES, *stacked})
        missing = [n for n in stacked if n not in (axes or ())]
        if rule is not None and missing:
            raise ValueError(
                f"the rule for {rule.path!r} stacks along {missing}, but weight {path!r} has the "
                f"logical axes {axes}; name axes that it has"
            )
        free = len(shape) - len(stack_axes)
        level = rule.sparsity if rule is not None else self._level_without_rule(path, free)
        algorithm = (rule and rule.algorithm) or self.algorithm
        pattern = (rule and rule.pattern) or self.pattern or Unstructured()
        if level is None or algorithm.is_dense:
            return None
        layer = LayerPlan(
            path=path,
            shape=shape,
            axes=axes,
            stack_axes=stack_axes,
            pattern=pattern,
            sparsity=0.0,
            pack_axis=packing.pack_axis(shape, stack_axes) if self.pack_masks else None,
            algorithm=algorithm,
        )
        _check_pattern(layer)
        fixed = pattern.fixed_level
        if fixed is not None:
            if rule is not None and level not in (AUTO, SHARED, fixed):
                raise ValueError(
                    f"weight {path!r}: its rule asks for a sparsity of {level}, but {pattern} has "
                    f"{fixed} and takes no other; leave the rule's sparsity out, or give it "
                    "another pattern"
                )
            if rule is None and level != SHARED:
                raise ValueError(
                    f"weight {path!r}: embedding_sparsity (EMBEDDING_SPARSITY) asks for {level}, "
                    f"but {pattern} has {fixed} and takes no other; give embeddings a rule with "
                    "the pattern Unstructured"
                )
            level = fixed
        if level == SHARED:
            return dataclasses.replace(layer, in_budget=True)
        level = 1 - math.sqrt(1 - self.sparsity) if level == AUTO else float(level)
        return dataclasses.replace(layer, sparsity=level)

    def _level_without_rule(self, path: str, free: int) -> float | str | None:
        """As `Rule.sparsity`, of a weight with so many unstacked dims."""
        if free < 2:
            return None
        is_embedding = re.search(_EMBEDDINGS, path) and not re.search(_NOT_EMBEDDINGS, path)
        if is_embedding and self.embedding_sparsity is not None:
            return self.embedding_sparsity
        return None if re.search(DENSE_BY_DEFAULT, path.lower()) else SHARED


def _can_be_sparse(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating) and 0 not in x.shape


def _match(rules: Sequence[Rule], paths: Collection[str]) -> dict[str, Rule]:
    """The rule of every weight that has one, by path."""
    matched: dict[str, Rule] = {}
    for rule in rules:
        hits = [p for p in paths if re.search(rule.path, p)]
        new = [p for p in hits if p not in matched]
        if not new:
            taken = "every weight it matches is taken by an earlier rule"
            raise ValueError(
                f"the rule for {rule.path!r} has no effect: "
                f"{taken if hits else 'it matches no weight'}. The weights are:\n  "
                + "\n  ".join(sorted(paths))
            )
        matched.update((p, rule) for p in new)
    return matched


def _check_pattern(layer: LayerPlan) -> None:
    """Raises ValueError if a weight can't take its pattern."""
    free = len(layer.slice_shape)
    if free < 2 and not isinstance(layer.pattern, Unstructured):
        raise ValueError(
            f"weight {layer.path!r} has {free} unstacked dim; {layer.pattern} needs two or more: "
            "leave it dense, or give its rule the pattern Unstructured"
        )
    try:
        layer.pattern.validate(layer.slice_shape)
    except ValueError as e:
        raise ValueError(f"weight {layer.path!r}: {e}, or leave this weight out by a rule") from e


def by_algorithm(plan: Plan) -> list[tuple[Algorithm, Plan]]:
    """The plan in parts: each algorithm, with the plan of the weights that it decides on."""
    parts: list[tuple[Algorithm, dict[str, LayerPlan]]] = []
    for path, layer in plan.items():
        for algorithm, part in parts:
            if algorithm == layer.algorithm:
                part[path] = layer
                break
        else:
            parts.append((layer.algorithm, {path: layer}))
    return [*parts]


def update_schedules(plan: Plan) -> list[UpdateSchedule]:
    """The schedules by which masks of the plan change; equal ones once."""
    schedules = (algorithm.updates for algorithm, _ in by_algorithm(plan))
    return list(dict.fromkeys(s for s in schedules if s.last is not None))
