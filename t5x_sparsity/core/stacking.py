"""Computes on the arrays of equal weights as on one stack."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from t5x_sparsity.core import packing
from t5x_sparsity.core.contract import Arrays, LayerPlan, Plan


def equal_keys(keys: Mapping[str, Hashable | None]) -> list[list[str]]:
    """Groups paths by equal keys, in order; a path whose key is None is a group by itself.

    >>> equal_keys({"a": 1, "b": None, "c": 1, "d": None})
    [['a', 'c'], ['b'], ['d']]
    """
    members: dict[Hashable, list[str]] = {}
    for path, key in keys.items():
        members.setdefault(path if key is None else key, []).append(path)
    return list(members.values())


def map_stacked(
    plan: Plan, function: Callable[..., jax.Array], *arrays: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """`function` of every weight's arrays, called once per stack of equal weights.

    A model of many layers then compiles to a small program: results that go into another call, or
    into a selection, are one array to the compiler. Only weights of one sharding share a call,
    because others would be moved between devices.

    Args:
      plan: of the weights; results are in its order.
      function: of the plan of one of the weights, and of a stack of each of their `arrays` along a
        new first axis. It must treat all entries of that axis alike, and return such a stack.
      arrays: by path, for every weight of the plan.
    """

    def key_of(path: str, layer: LayerPlan) -> Hashable | None:
        if layer.axes is None:  # its sharding is unknown
            return None
        own = tuple((jnp.shape(a[path]), jnp.result_type(a[path])) for a in arrays)
        return layer.axes, layer.shape, layer.stack_axes, layer.pack_axis, own

    found: dict[str, jax.Array] = {}
    for paths in equal_keys({path: key_of(path, layer) for path, layer in plan.items()}):
        stacks = [jnp.stack([a[p] for p in paths]) for a in arrays]
        # without the barrier a compiler moves the slices into what computes the stack, and then
        # does not see that all of them together are the stack
        result = lax.optimization_barrier(function(plan[paths[0]], *stacks))
        found |= {p: lax.index_in_dim(result, i, keepdims=False) for i, p in enumerate(paths)}
    return {path: found[path] for path in plan}


def pack_stacked(plan: Plan, masks: Arrays) -> dict[str, jax.Array]:
    """`packing.pack` of every weight's mask."""

    def pack(layer: LayerPlan, stack: jax.Array) -> jax.Array:
        return packing.pack(stack, None if layer.pack_axis is None else layer.pack_axis + 1)

    return map_stacked(plan, pack, masks)


def unpack_stacked(plan: Plan, stored: Arrays) -> dict[str, jax.Array]:
    """`packing.unpack` of every weight's stored mask."""
    return map_stacked(plan, lambda layer, x: packing.unpack(x, (len(x), *layer.shape)), stored)
