"""The functional core of sparse training, and `sparsify`, which wraps any optax optimizer in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from t5x_sparsity import masks as masks_lib
from t5x_sparsity.algorithms import Algorithm, Dense, Update
from t5x_sparsity.distributions import check_distribution
from t5x_sparsity.patterns import Pattern
from t5x_sparsity.plan import Plan, Rule, check_embedding_level, check_level, make_plan

Arrays = Mapping[str, jax.Array]

# Masks must be the same whatever generator the run draws its dropout from.
_KEY_IMPL = "threefry2x32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """What is sparsified, how far and by which algorithm.

    Attributes:
      algorithm: decides which weights live.
      sparsity: of all weights in the shared budget together, in [0, 1).
      distribution: how that is shared among layers: 'uniform', 'er', 'erk'.
      pattern: the shape zeros come in, where no rule says otherwise. None: Unstructured.
      rules: levels and patterns of weights of their own; the first that matches a path wins.
      embedding_sparsity: level of embeddings, 'auto' for 1 - sqrt(1 - sparsity), None for dense.
      seed: of the masks' random choices, a non-negative integer.
      pack_masks: store masks eight weights a byte where a weight's shape allows.
    """

    algorithm: Algorithm
    sparsity: float = 0.8
    distribution: str = "uniform"
    pattern: Pattern | None = None
    rules: Sequence[Rule] = ()
    embedding_sparsity: float | str | None = None
    seed: int = 0
    pack_masks: bool = True

    def __post_init__(self):
        check_level(self.sparsity, "sparsity (SPARSITY)")
        object.__setattr__(self, "rules", tuple(self.rules))
        check_distribution(self.distribution)
        check_embedding_level(self.embedding_sparsity)

    def plan(
        self, shapes: Mapping[str, Any], axes: Mapping[str, Sequence[str | None]] | None = None
    ) -> Plan:
        """The plan of every sparse weight; empty for a dense run. See `make_plan`."""
        plan = make_plan(
            shapes,
            sparsity=self.sparsity,
            distribution=self.distribution,
            pattern=self.pattern,
            rules=self.rules,
            embedding_sparsity=self.embedding_sparsity,
            axes=axes,
            pack_masks=self.pack_masks,
        )
        return {} if isinstance(self.algorithm, Dense) else plan


class SparsityState(NamedTuple):
    """The state of sparse training, all of it arrays.

    Attributes:
      masks: path -> stored mask, uint8 (see `masks.py`); sparse weights only.
      rng: uint32 [2], data of the threefry key that every random choice derives from.
    """

    masks: dict[str, jax.Array]
    rng: jax.Array


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of any pytree by path, the keys joined by '/', in the tree's own order.

    Raises:
      ValueError: two leaves come out with one path, since a key holds a '/'.
    """
    flat: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path in flat:
            raise ValueError(
                f"two weights have the path {path!r}, because a key of the tree holds a '/'; "
                "rename one of them"
            )
        flat[path] = leaf
    return flat


def unflatten(like: Any, flat: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`, with the containers of `like`."""
    paths = jax.tree_util.tree_flatten_with_path(like)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return jax.tree_util.tree_structure(like).unflatten([flat[name] for name in names])


def init_state(config: SparsityConfig, plan: Plan, weights: Arrays) -> SparsityState:
    """The state a run starts from; `weights` holds at least the sparse ones, by path."""
    key = jax.random.key(config.seed, impl=_KEY_IMPL)
    initial = config.algorithm.initial_masks(plan, {p: weights[p] for p in plan}, key)
    return SparsityState(
        masks={p: masks_lib.pack(initial[p], layer.pack_axis) for p, layer in plan.items()},
        rng=jax.random.key_data(key),
    )


def visible_gradients(config: SparsityConfig, state: SparsityState, grads: Arrays) -> Arrays:
    """The gradients that the base optimizer sees."""
    return masks_lib.apply(grads, state.masks) if config.algorithm.masks_gradients else grads


def update_masks(
    config: SparsityConfig,
    plan: Plan,
    state: SparsityState,
    *,
    step: jax.Array,
    weights: Arrays,
    grads: Arrays,
) -> tuple[SparsityState, dict[str, jax.Array], dict[str, jax.Array]]:
    """One mask update.

    Args:
      config: the run's configuration.
      plan: of the sparse weights.
      state: before the update.
      step: int32 scalar, the train step.
      weights: by path, after this step's gradient step, if it takes one.
      grads: by path, dense.

    Returns:
      The new state; which weights were alive before and still are (bool, by path); which have grown
      (bool, by path; empty for an algorithm that grows none).
    """
    before = {p: masks_lib.unpack(state.masks[p], layer.shape) for p, layer in plan.items()}
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=_KEY_IMPL), step)
    after = config.algorithm.update_masks(
        plan,
        Update(
            step=jnp.asarray(step, jnp.int32),
            weights={p: weights[p] for p in plan},
            grads={p: grads[p] for p in plan},
            masks=before,
            key=key,
        ),
    )
    stored = {p: masks_lib.pack(after[p], layer.pack_axis) for p, layer in plan.items()}
    alive = {p: after[p] & before[p] for p in plan}
    grown = {p: after[p] & ~before[p] for p in plan} if config.algorithm.grows else {}
    return state._replace(masks=stored), alive, grown


def zero_slots(slots: Any, grown: Arrays, paths: Iterable[str] | None = None) -> Any:
    """Zeroes what an optimizer remembers of grown weights.

    A slot is a leaf of the optimizer's state that mirrors a weight: it has the weight's shape and
    its path has the weight's path in it, as in `mu/<path>` of Adam or `<path>/v` of Adafactor.
    Factored rows and columns, which belong to no weight alone, stay.

    Args:
      slots: the optimizer's state.
      grown: bool, by path; True where a weight has grown.
      paths: of all weights, dense ones too, so that a slot of `b/a` is not taken for one of `a`.
        None: those of `grown`.
    """
    paths = list(grown if paths is None else paths)

    def weight_of(name: str) -> str | None:
        # the longest path in the slot's; of equals, as keys of a list are, the one it ends with
        hits = [
            (p.count("/"), name.endswith(f"/{p}/"), p) for p in paths if not p or f"/{p}/" in name
        ]
        return max(hits)[-1] if hits else None

    def zero(keys, slot):
        path = weight_of(f"/{jax.tree_util.keystr(keys, simple=True, separator='/')}/")
        if path not in grown or jnp.shape(slot) != grown[path].shape:
            return slot
        return jnp.where(grown[path], jnp.zeros((), slot.dtype), slot)

    return jax.tree_util.tree_map_with_path(zero, slots) if grown else slots


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Attributes:
      count: int32 scalar, train steps taken.
      inner: the wrapped optimizer's state.
      sparsity: masks and their random key.
    """

    count: jax.Array
    inner: optax.OptState
    sparsity: SparsityState


def sparsify(
    tx: optax.GradientTransformation,
    algorithm: Algorithm,
    *,
    sparsity: float = 0.8,
    distribution: str = "uniform",
    pattern: Pattern | None = None,
    rules: Sequence[Rule] = (),
    embedding_sparsity: float | str | None = None,
    seed: int = 0,
    logical_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optax optimizer so that it trains sparse.

    Weights that the masks prune come out of `optax.apply_updates` exactly 0; nothing else is needed
    in the train loop. `apply_masks` zeroes them before the first step too, which is how a run
    should start; `sparsity_summary` reports.

    Args:
      tx: any optax transformation. `params` must be passed to its `update`.
      algorithm: e.g. `RigL(updates=Periodic(begin=100, end=7500, period=100))`.
      sparsity: of all sparse weights together, in [0, 1).
      distribution: how that is shared among layers: 'uniform', 'er', 'erk'.
      pattern: the shape zeros come in. None: Unstructured.
      rules: levels and patterns of weights of their own.
      embedding_sparsity: level of embeddings, 'auto', or None to leave them dense.
      seed: of the masks' random choices.
      logical_axes: tree like params with the logical names of each weight's axes, a tuple of names
        a leaf, where weights are stacks of layers or experts. None: there are no stacks.

    Raises:
      ValueError: a level out of range, an unknown distribution, a rule without effect, a pattern
        that a weight can't take; from `update`, params that are None.
    """
    config = SparsityConfig(
        algorithm=algorithm,
        sparsity=sparsity,
        distribution=distribution,
        pattern=pattern,
        rules=rules,
        embedding_sparsity=embedding_sparsity,
        seed=seed,
    )
    inner = optax.with_extra_args_support(tx)
    axes = None
    if logical_axes is not None:
        axes = {
            jax.tree_util.keystr(path, simple=True, separator="/"): names
            for path, names in jax.tree_util.tree_flatten_with_path(
                logical_axes, is_leaf=_is_axis_names
            )[0]
        }

    def make_plan_of(weights):
        missing = [] if axes is None else [p for p in weights if p not in axes]
        if missing:
            raise ValueError(
                f"logical_axes must be a tree like params, but has nothing for {missing}; give "
                "each a tuple of names, one an axis, or None"
            )
        return config.plan(weights, axes)

    def init(params):
        weights = flatten(params)
        return SparsifyState(
            count=jnp.zeros((), jnp.int32),
            inner=inner.init(params),
            sparsity=init_state(config, make_plan_of(weights), weights),
        )

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "sparsify needs the parameters: call update(grads, state, params), not "
                "update(grads, state)"
            )
        grads, weights = flatten(updates), flatten(params)
        plan = make_plan_of(weights)

        def gradient_step(operands):
            inner_state, masked_state = operands
            seen = unflatten(updates, visible_gradients(config, masked_state, grads))
            new_updates, inner_state = inner.update(seen, inner_state, params, **extra_args)
            return flatten(new_updates), inner_state

        def plain(operands):
            new_updates, inner_state = gradient_step(operands)
            sparsity_state = operands[1]
            alive = {
                p: masks_lib.unpack(m, weights[p].shape) for p, m in sparsity_state.masks.items()
            }
            return _pruning(new_updates, weights, alive), inner_state, sparsity_state

        def with_mask_update(operands):
            inner_state, sparsity_state = operands
            if algorithm.replaces_gradient_step:
                # of the dtypes that the optimizer gives, which need not be the weights'
                like, _ = jax.eval_shape(gradient_step, operands)
                new_updates = {p: jnp.zeros_like(w, like[p].dtype) for p, w in weights.items()}
            else:
                new_updates, inner_state = gradient_step(operands)
            sparsity_state, alive, grown = update_masks(
                config,
                plan,
                sparsity_state,
                step=state.count,
                weights=optax.apply_updates(
                    {p: weights[p] for p in plan}, {p: new_updates[p] for p in plan}
                ),
                grads=grads,
            )
            inner_state = zero_slots(inner_state, grown, weights)
            return _pruning(new_updates, weights, alive), inner_state, sparsity_state

        operands = (state.inner, state.sparsity)
        if algorithm.updates.last is None or not plan:
            result = plain(operands)
        else:
            due = algorithm.updates.is_update(state.count)
            result = lax.cond(due, with_mask_update, plain, operands)
        new_updates, inner_state, sparsity_state = result
        return unflatten(updates, new_updates), SparsifyState(
            count=optax.safe_increment(state.count), inner=inner_state, sparsity=sparsity_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _pruning(updates: Arrays, weights: Arrays, alive: Arrays) -> dict[str, jax.Array]:
    """Updates that take pruned weights to exactly 0, and leave the others as they are."""

    def prune(update, weight, mask):
        # an update narrower than its weight could not take it all the way
        update = update.astype(jnp.promote_types(update.dtype, weight.dtype))
        return jnp.where(mask, update, -weight.astype(update.dtype))

    return {p: prune(u, weights[p], alive[p]) if p in alive else u for p, u in updates.items()}


def _is_axis_names(x: Any) -> bool:
    return x is None or (
        isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)
    )


def find_state(state: Any) -> SparsifyState:
    """The state of `sparsify` inside that of optimizers around it.

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [
        x
        for x in jax.tree_util.tree_leaves(state, is_leaf=lambda x: isinstance(x, SparsifyState))
        if isinstance(x, SparsifyState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected one state of sparsify in the optimizer state, found {len(found)}; pass what "
            "sparsify(...).init returned, or a state that holds it"
        )
    return found[0]


def apply_masks(params: Any, state: Any) -> Any:
    """Params with the pruned weights set to 0. state: of `sparsify`, or one that holds it."""
    return unflatten(params, masks_lib.apply(flatten(params), find_state(state).sparsity.masks))
