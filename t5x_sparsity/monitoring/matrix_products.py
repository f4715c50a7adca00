"""Counts the matrix products of a model, by weight, from its jaxpr.

Only multiply-adds count, as in papers on sparsity. A look-up is free, even where it is written as a
product with a one-hot matrix. The body of a loop counts once per iteration if their number is
known, and once if it is not.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from t5x_sparsity.core.trees import flatten

# Primitives that keep the entries of an array, or some of them.
_SAME_ENTRIES = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "dynamic_slice",
        "expand_dims",
        "optimization_barrier",
        "reduce_precision",
        "reshape",
        "sharding_constraint",
        "slice",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
# The tag of a matrix of zeros and ones that selects entries.
_SELECTOR = "one-hot"

Tag = Mapping[str, float] | str | None


class Products(NamedTuple):
    """FLOPs of the matrix products of one call, two per multiply-add.

    By path of the products with each weight, and of those between activations, as in attention.
    """

    of_weights: dict[str, float]
    others: float

    @property
    def total(self) -> float:
        return sum(self.of_weights.values()) + self.others


def count_products(fn: Callable, weights: Any, *arguments: Any) -> Products:
    """Counts the products of fn(weights, *arguments); nothing is computed.

    weights: a pytree of arrays or of their shapes, as the arguments are.
    """
    closed = jax.make_jaxpr(fn)(weights, *arguments)
    paths = list(flatten(weights))
    counter = _Counter([*paths, None])
    tags: list[Tag] = [{path: 1.0} for path in paths]
    tags += [None] * (len(closed.jaxpr.invars) - len(paths))
    counter.walk(closed.jaxpr, tags, 1, closed.consts)
    others = counter.flops.pop(None)
    return Products(counter.flops, others)


def loss_products(model: Any, train_state: Any, batch: Mapping[str, Any]) -> Products:
    """Counts the products of a T5X model's loss of one batch; arrays may be given as shapes."""
    mutables = getattr(train_state, "flax_mutables", None)

    def loss(params, batch, *more):
        return model.loss_fn(params, batch, None, *more)

    # T5X's models with such variables take them as another argument
    return count_products(loss, train_state.params, batch, *((mutables,) if mutables else ()))


class _Counter:
    def __init__(self, paths: Iterable[str | None]):
        # by the path of the weight; of products without a weight, by None
        self.flops = dict.fromkeys(paths, 0.0)

    def walk(
        self, jaxpr: core.Jaxpr, tags: list[Tag], times: float, consts: Sequence[Any] = ()
    ) -> list[Tag]:
        """Counts `times` runs of the jaxpr; returns the tags of its results."""
        known = dict(zip(jaxpr.invars, tags, strict=True))
        known |= {
            v: _SELECTOR for v, x in zip(jaxpr.constvars, consts, strict=False) if _is_one_hot(x)
        }

        def read(v) -> Tag:
            if isinstance(v, core.Literal):
                return _SELECTOR if _is_one_hot(v.val) else None
            return known.get(v)

        for eqn in jaxpr.eqns:
            found = self._equation(eqn, [read(v) for v in eqn.invars], times)
            # what has no tag may be left out at the end
            known |= zip(eqn.outvars, found, strict=False)
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn, tags: list[Tag], times: float) -> list[Tag]:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[a] for a in contracted)
            self._add(tags, times * 2 * eqn.outvars[0].aval.size * depth)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            self._add(tags, times * 2 * eqn.outvars[0].aval.size * kernel.size / features)
        elif name == "eq":
            return [_SELECTOR]
        elif name in _SAME_ENTRIES:
            return tags[: len(eqn.outvars)]
        elif name in ("mul", "div"):
            whole = [t for t, v in zip(tags, eqn.invars, strict=True) if v.aval.size > 1]
            return whole if len(whole) == 1 else []
        elif name == "concatenate":
            return [_joined(tags, [v.aval.size for v in eqn.invars])]
        elif name == "scan":
            body = params["jaxpr"].jaxpr
            # constants, then carried values, then what is sliced along its first axis; counted by
            # shape, because JAX has changed the parameters that say how many there are of each
            carried = _same_shapes(eqn.outvars, body.outvars)
            consts = _same_shapes(eqn.invars, body.invars) - carried
            inner = [*tags[:consts], *[None] * carried, *tags[consts + carried :]]
            self.walk(body, inner, times * params["length"])
        elif name == "while":
            consts = params["cond_nconsts"], params["body_nconsts"]
            body = params["body_jaxpr"].jaxpr
            inner = tags[consts[0] : sum(consts)]
            self.walk(body, [*inner, *[None] * (len(body.invars) - len(inner))], times)
        elif name == "cond":
            return self._largest([b.jaxpr for b in params["branches"]], tags[1:], times)
        else:
            return self._call(params, tags, times)
        return []

    def _add(self, tags: list[Tag], flops: float) -> None:
        if _SELECTOR in tags:
            return
        weight = next((t for t in tags if t), {None: 1.0})
        for path, share in weight.items():
            self.flops[path] += share * flops

    def _call(self, params: Mapping[str, Any], tags: list[Tag], times: float) -> list[Tag]:
        """Any primitive that calls a function: jit, remat, custom derivatives."""
        for value in params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            if isinstance(inner, core.Jaxpr) and len(inner.invars) == len(tags):
                return self.walk(inner, tags, times)
        return []

    def _largest(self, branches: list[core.Jaxpr], tags: list[Tag], times: float) -> list[Tag]:
        runs = []
        for branch in branches:
            counter = _Counter(self.flops)
            runs.append((counter.flops, counter.walk(branch, tags, times)))
        most, found = max(runs, key=lambda run: sum(run[0].values()))
        for path, flops in most.items():
            self.flops[path] += flops
        return found


def _same_shapes(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables of a loop have the same shape inside its body."""
    return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))


def _is_one_hot(x: Any) -> bool:
    """Whether a constant selects one entry per row."""
    if getattr(x, "ndim", 0) < 2 or x.size == 0:
        return False
    x = np.asarray(x).astype(np.float32)
    return bool(np.all((x == 0) | (x == 1)) and np.all(x.sum(axis=-1) == 1))


def _joined(tags: list[Tag], sizes: list[int]) -> Tag:
    """The tag of concatenated weights: a product is shared in proportion to their sizes."""
    if not all(isinstance(t, Mapping) for t in tags):
        return None
    total: dict[str, float] = {}
    for tag, size in zip(tags, sizes, strict=True):
        for path, share in tag.items():
            total[path] = total.get(path, 0.0) + share * size / sum(sizes)
    return total
