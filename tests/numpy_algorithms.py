"""Every algorithm once more in slow, plain numpy, written from the papers and docs/methods.

A weight's slices are taken one by one, units are lists of flat indices, and what stays is found by
sorting. `Reference` takes the train steps that `sparsify.train_step` takes, with `Optimizer`.
"""

import itertools
from types import SimpleNamespace

import numpy as np

import t5x_sparsity as ts

F = np.float32


class Optimizer:
    """Adam's two slots and none of its rounding: what it makes has few bits, and is exact."""

    @staticmethod
    def start(weights, seed=0):
        """Slots none of which is 0, so that a zeroed one shows."""
        rng = np.random.default_rng(seed)

        def slots():
            return {p: F(rng.integers(1, 9, w.shape) / 8) for p, w in weights.items()}

        return {"mu": slots(), "nu": slots()}

    @staticmethod
    def step(np, weights, grads, state):
        """One step in numpy or jax.numpy."""

        def rounded(x, unit):
            return np.round(x * unit) / unit

        mu, nu, new = dict(state["mu"]), dict(state["nu"]), dict(weights)
        for p in weights:
            mu[p] = rounded(mu[p] / 2 + grads[p], 64)
            nu[p] = rounded(nu[p] / 2 + rounded(grads[p], 4) ** 2, 16)
            new[p] = rounded(weights[p] - mu[p] / 4, 64)
        return new, {"mu": mu, "nu": nu}


# ---- units


def slices_of(layer):
    """Indices of every slice of a weight."""
    for at in np.ndindex(*(layer.shape[a] for a in layer.stack_axes)):
        index = [slice(None)] * len(layer.shape)
        for axis, i in zip(layer.stack_axes, at, strict=True):
            index[axis] = i
        yield tuple(index)


def units_of(pattern, shape):
    """The units of a slice: lists of flat indices that live and die together."""
    at = np.arange(np.prod(shape)).reshape(shape)
    if isinstance(pattern, ts.Channel):
        return [list(np.take(at, i, pattern.axis).flat) for i in range(shape[pattern.axis])]
    if isinstance(pattern, ts.Block):
        height, width = pattern.height or shape[-2], pattern.width or shape[-1]
        corners = itertools.product(
            np.ndindex(shape[:-2]), range(0, shape[-2], height), range(0, shape[-1], width)
        )
        return [list(at[lead][i : i + height, j : j + width].flat) for lead, i, j in corners]
    return [[i] for i in range(at.size)]


def parts_of(pattern, shape):
    """The units, by number, among which a choice is made; a slice may have several such parts."""
    if isinstance(pattern, ts.ConstantFanIn):
        at = np.arange(np.prod(shape)).reshape(shape)
        return [list(at[..., i].flat) for i in range(shape[-1])]
    if isinstance(pattern, ts.NByM):
        at = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), pattern.axis, -1)
        return [list(group) for group in at.reshape(-1, pattern.m)]
    return [list(range(len(units_of(pattern, shape))))]


def pool(pattern, scores, unit):
    """The score of a unit."""
    values = np.abs(scores.reshape(-1)[unit])
    if isinstance(pattern, ts.Channel):
        return F(values.sum())
    if isinstance(pattern, ts.Block):
        return values.max() if pattern.pooling == "max" else F(values.sum()) / F(len(unit))
    return scores.reshape(-1)[unit[0]]


def by_score(scores):
    """Sorts numbers of units: larger scores first, then lower numbers; NaN last."""
    return lambda i: (np.isnan(scores[i]), -np.nan_to_num(scores[i]), i)


def pick(layer, scores, k, where=None, keep=None, pattern=None):
    """The mask of the k units a slice of largest score; `keep` stay in any case and count."""
    pattern = layer.pattern if pattern is None else pattern
    out = np.zeros(layer.shape, bool)
    units, parts = units_of(pattern, layer.slice_shape), parts_of(pattern, layer.slice_shape)
    each = -(-k // len(parts)) if isinstance(pattern, ts.NByM) else k // len(parts)
    for at in slices_of(layer):
        found = [pool(pattern, scores[at], unit) for unit in units]
        flat = np.zeros(layer.slice_size, bool)

        def marked(mask, unit, at=at):
            return mask[at].reshape(-1)[unit].any()

        for part in parts:
            stay = [i for i in part if keep is not None and marked(keep, units[i])]
            free = [i for i in part if i not in stay]
            free = [i for i in free if where is None or marked(where, units[i])]
            for i in stay + sorted(free, key=by_score(found))[: max(each - len(stay), 0)]:
                flat[units[i]] = True
        out[at] = flat.reshape(layer.slice_shape)
    return out


def relaxed(layer):
    """How weights are dropped: without regard to groups and neurons, by whole blocks."""
    split = isinstance(layer.pattern, ts.NByM | ts.ConstantFanIn)
    return ts.Unstructured() if split else layer.pattern


def scheduled(layer, share):
    """Units a slice on the way to the target."""
    pruned = layer.units - layer.kept
    return layer.units - int(np.round(F(pruned) * F(share)))


# ---- what the algorithms do at an update


def gradual_scores(algorithm, at, path):
    w = at.weights[path]
    if isinstance(algorithm, ts.RandomPruning):
        return at.uniform[path]
    if isinstance(algorithm, ts.AdamFisher):
        return np.square(w) * at.nu[path]
    if isinstance(algorithm, ts.Saliency | ts.GlobalSaliency):
        return np.abs(at.forward[path] * sum(grads[path] for grads in at.recent))
    return np.abs(w)


def gradual(algorithm, plan, at):
    share, masks = algorithm.level(at.progress), {}
    for p, layer in plan.items():
        scores, kept = gradual_scores(algorithm, at, p), scheduled(layer, share)
        if isinstance(algorithm, ts.IterativeNM):
            winners = pick(layer, scores, layer.kept, at.masks[p])
            masks[p] = pick(layer, scores, kept, at.masks[p], winners, ts.Unstructured())
        else:
            masks[p] = pick(layer, scores, kept, at.masks[p])
    return masks


def over_all(algorithm, plan, at):
    """One threshold over the units of all layers but those of a fixed level."""
    share, masks, total, found = algorithm.level(at.progress), {}, 0, []
    for number, (p, layer) in enumerate(plan.items()):
        scores = gradual_scores(algorithm, at, p)
        scores = np.where(at.masks[p], scores, F(0))
        if isinstance(layer.pattern, ts.NByM):
            masks[p] = pick(layer, scores, scheduled(layer, share), at.masks[p])
            continue
        masks[p] = np.zeros(layer.shape, bool)
        weights = scheduled(layer, share) * layer.slice_size / layer.units
        total += int(np.round(weights)) * layer.slices
        for at_slice in slices_of(layer):
            own = np.abs(scores[at_slice])
            if algorithm.normalization == "norm":
                own = own / (np.sqrt(F(np.sum(np.square(own, dtype=np.float64)))) + F(1e-8))
            where = np.arange(np.prod(layer.shape)).reshape(layer.shape)[at_slice].reshape(-1)
            units = units_of(layer.pattern, layer.slice_shape)
            units = [u for u in units if at.masks[p][at_slice].reshape(-1)[u].any()]
            value = {u[0]: pool(layer.pattern, own, u) for u in units}
            for u in units:
                score = value[u[0]]
                if algorithm.normalization == "lamp":
                    larger = [x for x in value.values() if x >= score]
                    score = np.square(score, dtype=np.float64) / np.sum(
                        np.square(larger, dtype=np.float64)
                    )
                found.append((-score, number, where[u[0]], p, where[u]))
    left = total
    for *_, p, unit in sorted(found, key=lambda x: x[:3]):
        if left <= 0:
            break
        masks[p].reshape(-1)[unit] = True
        left -= len(unit)
    return masks


def swap(layer, mask, kept, fraction, drop, grow):
    left = kept - int(np.round(F(fraction) * F(kept)))
    stay = pick(layer, drop, left, mask, pattern=relaxed(layer))
    return pick(layer, grow, kept, keep=stay)


def granet_kept(algorithm, plan, progress):
    total = sum(layer.size for layer in plan.values())
    target = sum((1 - layer.kept / layer.units) * layer.size for layer in plan.values()) / total
    start = min(1, algorithm.initial_sparsity / target) if target else 1
    share = start + (1 - start) * algorithm.ramp(progress)
    return {p: scheduled(layer, share) for p, layer in plan.items()}


def drop_and_grow(algorithm, plan, at):
    fraction, masks = algorithm.drop_fraction(at.progress), {}
    granet = isinstance(algorithm, ts.GraNet)
    kept = {p: layer.kept for p, layer in plan.items()}
    if granet:
        kept = granet_kept(algorithm, plan, at.progress)
    for p, layer in plan.items():
        size, slope, mask = np.abs(at.weights[p]), np.abs(at.grads[p]), at.masks[p]
        grow, drop = at.uniform[p], size
        if isinstance(algorithm, ts.RigL) or granet:
            grow = slope
        if isinstance(algorithm, ts.SNFS):
            grow = np.abs(at.slots["momentum"][p])
        if isinstance(algorithm, ts.MEST):
            drop = size + F(algorithm.gradient_weight) * slope
        if granet:
            mask = pick(layer, size, kept[p], mask)
        masks[p] = swap(layer, mask, kept[p], fraction, drop, grow)
    return masks


def srigl(algorithm, plan, at):
    """Neurons are the last axis; ablated ones lose all weights, the others share evenly."""
    masks, gamma = {}, algorithm.ablation_threshold
    for p, layer in plan.items():
        masks[p] = np.zeros(layer.shape, bool)
        for index in slices_of(layer):
            shape = (-1, layer.slice_shape[-1])
            size, slope = (np.abs(x[p][index]).reshape(shape) for x in (at.weights, at.grads))
            mask = at.masks[p][index].reshape(shape)
            dense, neurons = mask.shape
            flat = SimpleNamespace(
                shape=mask.shape, slice_shape=mask.shape, slice_size=mask.size, stack_axes=(),
                pattern=ts.Unstructured(),
            )  # fmt: skip
            active = int(mask.sum())
            swapped = int(np.round(F(algorithm.drop_fraction(at.progress)) * F(active)))
            stay = pick(flat, size, active - swapped, mask)
            salient = (stay | pick(flat, slope, swapped)).sum(axis=0)
            fan_in = layer.kept // neurons
            alive = salient >= max(1, int(gamma * fan_in)) if gamma else np.ones(neurons, bool)
            # enough neurons must stay to hold the layer's weights
            by_salience = sorted(range(neurons), key=lambda i: (-salient[i], i))
            alive[by_salience[: -(-layer.kept // dense)]] = True
            share = min(layer.kept // alive.sum(), dense)
            out = np.zeros(mask.shape, bool)
            for n in np.flatnonzero(alive):
                old = [i for i in range(dense) if stay[i, n]]
                old = sorted(old, key=by_score(size[:, n]))[:share]
                new = [i for i in range(dense) if i not in old]
                new = sorted(new, key=by_score(slope[:, n]))[: share - len(old)]
                out[old + new, n] = True
            masks[p][index] = out.reshape(layer.slice_shape)
    return masks


def acdc(algorithm, plan, at):
    """Sparse and dense phases by turns; the last update begins a sparse one."""
    steps = range(algorithm.updates.begin, algorithm.updates.end + 1, algorithm.updates.period)
    if at.step != algorithm.updates.end and steps.index(at.step) % 2:
        return {p: np.ones(layer.shape, bool) for p, layer in plan.items()}
    return {p: pick(x, np.abs(at.weights[p]), x.kept, at.masks[p]) for p, x in plan.items()}


def under_mask(algorithm, plan, at):
    masks = {}
    for p, layer in plan.items():
        scores, kept = np.abs(at.weights[p]), layer.kept
        if isinstance(algorithm, ts.RandomSTE):
            scores = at.uniform[p]
        if hasattr(algorithm, "level"):
            kept = scheduled(layer, algorithm.level(at.progress))
        if isinstance(algorithm, ts.StructureDecay):
            n, m, turns = layer.pattern.n, layer.pattern.m, []
            while not turns or turns[-1] > n:  # M-1, M/2, M/4, ... N
                turns.append(max(n, m - 1 if not turns else m // 2 ** len(turns)))
            turn = min(int(at.progress * len(turns)), len(turns) - 1)
            kept = layer.slice_size // m * turns[turn]
        masks[p] = pick(layer, scores, kept)
    return masks


RULES = (
    (ts.SRigL, srigl),
    (ts.GlobalMagnitude, over_all),
    (ts.ACDC, acdc),
    ((ts.Static, ts.Dense), lambda algorithm, plan, at: at.masks),
    ((ts.RigL, ts.SET, ts.SNFS, ts.MEST, ts.GraNet), drop_and_grow),
    ((ts.SRSTE, ts.MagnitudeSTE, ts.RandomSTE, ts.DecayingMask, ts.TopKAST), under_mask),
    (ts.StructureDecay, under_mask),
    (object, gradual),
)
SPARSE = (ts.Static, ts.RigL, ts.SET, ts.SNFS, ts.MEST, ts.GraNet)  # from the start, at random
DENSE = (ts.SRSTE, ts.MagnitudeSTE, ts.RandomSTE, ts.DecayingMask, ts.TopKAST, ts.StructureDecay)


def rule_of(algorithm):
    return next(rule for types, rule in RULES if isinstance(algorithm, types))


class Reference:
    """A run of one algorithm. `uniform(step)`: the random scores that it is to draw."""

    def __init__(self, algorithm, plan, weights, optimizer, uniform):
        self.algorithm, self.plan, self.uniform = algorithm, plan, uniform
        self.optimizer, self.recent = optimizer, []
        self.dense = {p: w.copy() for p, w in weights.items()}
        self.slots = {"momentum": {p: np.zeros(w.shape, F) for p, w in weights.items()}}
        self.masks = self._initial()
        self.slots["backward"] = self._backward(0)
        self.weights = self._forward(self.dense, 0)
        self.reset = {p: np.zeros(w.shape, bool) for p, w in weights.items()}

    def _initial(self):
        algorithm, plan = self.algorithm, self.plan
        if isinstance(algorithm, ts.GraNet):
            kept = granet_kept(algorithm, plan, F(0))
            return {p: pick(x, self.uniform(None)[p], kept[p]) for p, x in plan.items()}
        if isinstance(algorithm, SPARSE):
            return {p: pick(x, self.uniform(None)[p], x.kept) for p, x in plan.items()}
        if isinstance(algorithm, (ts.SRSTE, ts.MagnitudeSTE, ts.RandomSTE, ts.TopKAST)):
            at = SimpleNamespace(weights=self.dense, progress=F(0), uniform=self.uniform(None))
            return under_mask(algorithm, plan, at)
        return {p: np.ones(x.shape, bool) for p, x in self.dense.items()}

    def _backward(self, progress):
        """Where Top-KAST's gradients go: the largest |w| at a lower level, and all of the mask."""
        if not isinstance(self.algorithm, ts.TopKAST):
            return {}
        share = 1 if progress == 1 else self.algorithm.backward(progress)
        size = {p: np.abs(w) for p, w in self.dense.items()}
        return {
            p: pick(x, size[p], scheduled(x, share), keep=self.masks[p])
            for p, x in self.plan.items()
        }

    def _left(self, step):
        """What a decaying mask leaves of pruned weights, or of their gradients."""
        if not isinstance(self.algorithm, ts.DecayingMask):
            return F(0)
        return F(self.algorithm.decay(self.algorithm.updates.progress(step)))

    def _forward(self, weights, step):
        left = self._left(step)
        return {p: np.where(self.masks[p], w, w * left) for p, w in weights.items()}

    def _seen(self, grads, step):
        algorithm = self.algorithm
        if isinstance(algorithm, SPARSE) or (
            isinstance(algorithm, ts.StructureDecay) and not algorithm.straight_through
        ) or isinstance(algorithm, ts.ACDC):  # fmt: skip
            return {p: np.where(self.masks[p], g, F(0)) for p, g in grads.items()}
        if isinstance(algorithm, ts.DecayingMask) and not algorithm.straight_through:
            return {p: np.where(self.masks[p], g, g * self._left(step)) for p, g in grads.items()}
        if isinstance(algorithm, ts.SRSTE):
            decay = F(algorithm.decay)
            return {p: g + decay * ~self.masks[p] * self.dense[p] for p, g in grads.items()}
        if isinstance(algorithm, ts.TopKAST):
            seen = {}
            for p, g in grads.items():
                density = F(self.plan[p].kept / self.plan[p].units)
                pull = np.where(self.masks[p], self.dense[p], self.dense[p] / density)
                pull = F(algorithm.regularizer) * pull
                seen[p] = np.where(self.slots["backward"][p], g + pull, F(0))
            return seen
        return grads

    def step(self, step, grads, replaced=None):
        """replaced: whether masks change in place of weights; None: if the algorithm says so."""
        algorithm = self.algorithm
        due = bool(algorithm.updates.is_update(step))
        before = dict(self.masks)
        if isinstance(algorithm, ts.SNFS):
            kept = F(algorithm.momentum)
            mean = self.slots["momentum"]
            self.slots["momentum"] = {p: kept * mean[p] + (1 - kept) * g for p, g in grads.items()}
        self.recent = [*self.recent, grads][-getattr(algorithm, "gradient_steps", 1) :]
        w = self.dense if isinstance(algorithm, DENSE) else self.weights
        # RigL's update takes the place of the gradient step, Algorithm 1
        if replaced is None:
            replaced = due and isinstance(algorithm, ts.RigL) and not algorithm.take_gradient_step
        if not replaced:
            w, self.optimizer = Optimizer.step(np, w, self._seen(grads, step), self.optimizer)
        self.dense = w
        self.reset = {p: np.zeros(x.shape, bool) for p, x in w.items()}
        if due:
            progress = F(algorithm.updates.progress(step))
            at = SimpleNamespace(
                step=step, weights=w, grads=grads, masks=before, forward=self.weights,
                slots=self.slots, nu=self.optimizer["nu"], uniform=self.uniform(step),
                progress=progress, recent=self.recent,
            )  # fmt: skip
            self.masks = rule_of(algorithm)(algorithm, self.plan, at)
            self.slots["backward"] = self._backward(progress)
            self.recent = []
            self._forget(before)
        if not isinstance(algorithm, DENSE):  # weights that come back start at 0
            w = {p: np.where(before[p], x, F(0)) for p, x in w.items()}
        self.weights = self._forward(w, step + 1)

    def _forget(self, before):
        """Zeroes the optimizer's slots of what came back, or of all where the algorithm says so."""
        algorithm = self.algorithm
        back = {p: x & ~before[p] for p, x in self.masks.items()}
        if isinstance(algorithm, (ts.ACDC, ts.AdamFisher)):
            every = isinstance(algorithm, ts.AdamFisher)
            reset = {p: np.full(x.shape, every or x.any()) for p, x in back.items()}
            reset = reset if algorithm.reset_optimizer else self.reset
        elif isinstance(algorithm, SPARSE):
            reset = back
        else:
            reset = self.reset
        self.reset = reset
        self.optimizer = {
            name: {p: np.where(reset[p], F(0), x) for p, x in slot.items()}
            for name, slot in self.optimizer.items()
        }
