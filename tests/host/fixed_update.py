"""One mask update from fixed weights and gradients, on any mesh.

As a script it is one of several processes, and prints what came out on each mesh:

    python fixed_update.py localhost:1234 2 0 1x4 2x2 2x2-2d
"""

import hashlib
import json
import sys
import zlib
from typing import NamedTuple

import jax
import numpy as np
import seqio
import tiny_t5
from jax.sharding import NamedSharding, PartitionSpec

import t5x_sparsity as ts
from t5x_sparsity import host
from t5x_sparsity.core import packing
from t5x_sparsity.core.trees import flatten, unflatten
from t5x_sparsity.t5x.optimizer import StepKind, with_optimizer

# data x model; 2-D: the rules of parameter_partitioning_dims=2, which split 'embed' over 'data'
MESHES = {
    "1x1": (1, 1, 1),
    "1x4": (1, 4, 1),
    "4x1": (4, 1, 1),
    "4x1-2d": (4, 1, 2),
    "2x2": (2, 2, 1),
    "2x2-2d": (2, 2, 2),
}

# of the masks after the update: on every mesh, in any number of processes, on both hosts
DIGEST = "4bbffecd69823e31de78504d3723e88cbc6c2b6d185f36fb30a0f5cfc213c21f"


NAMES = ("rigl", "nm", "saliency", "set", "magnitude")


def network(optimizer_def):
    """Stacks of layers, one for each kind of selection, and an embedding."""
    stacks = tiny_t5.Stacked(NAMES, width=64, mlp_dim=64)
    return host.models.DecoderOnlyModel(stacks, seqio.ByteVocabulary(), optimizer_def)


def config():
    """Several kinds of selection in one update, at step 0."""
    once = ts.OneShot(step=0)
    pooled = ts.GlobalMagnitude(updates=once, normalization=None)
    return ts.SparsityConfig(
        algorithm=ts.RigL(updates=once),
        sparsity=0.8,
        distribution="erk",
        rules=[
            ts.Rule(path="^nm", pattern=ts.NByM(n=2, m=4), algorithm=ts.Magnitude(updates=once)),
            ts.Rule(path="^saliency", sparsity=0.5, algorithm=ts.Saliency(updates=once)),
            ts.Rule(path="^set", sparsity=0.6, algorithm=ts.SET(updates=once)),
            ts.Rule(path="^magnitude", algorithm=pooled),
            ts.Rule(path="^embedding", sparsity=0.3, algorithm=ts.Magnitude(updates=once)),
        ],
    )


class Updated(NamedTuple):
    state: object
    # path -> bool, on the host
    packing: dict
    digest: str


def updated(mesh: str) -> Updated:
    """The train state after the update on a mesh, and its masks."""
    data, model, dims = MESHES[mesh]
    rules = host.partitioning.standard_logical_axis_rules(parameter_partitioning_dims=dims)
    partitioner = tiny_t5.MeshPartitioner(data, model, logical_axis_rules=rules)
    init = tiny_t5.initializer(config(), partitioner=partitioner, build=network)[0]
    state = init.from_scratch(jax.random.PRNGKey(0))
    driven = state._optimizer.optimizer_def.for_step(StepKind.UPDATE)
    axes = with_optimizer(init.train_state_axes, driven)
    weights = _on(partitioner.mesh, "weight", state.params, axes.params)
    grads = _on(partitioner.mesh, "gradient", state.params, axes.params)
    step = partitioner.partition(
        lambda s, w, g: s.replace(_optimizer=s._optimizer.replace(target=w)).apply_gradient(
            g, learning_rate=0.125
        ),
        in_axis_resources=(axes, axes.params, axes.params),
        out_axis_resources=axes,
    )
    state = step(with_optimizer(state, driven), weights, grads)
    stored = state._optimizer.state.sparsity.masks
    gather = partitioner.partition(
        lambda x: x,
        in_axis_resources=(axes._optimizer.state.sparsity.masks,),
        out_axis_resources=PartitionSpec(),
    )
    shapes = {p: x.shape for p, x in flatten(state.params).items()}
    whole = {
        p: np.asarray(packing.unpack(np.asarray(host.utils.get_local_data(x)), shapes[p]))
        for p, x in gather(stored).items()
    }
    text = hashlib.sha256()
    for path in sorted(whole):
        text.update(path.encode() + np.packbits(whole[path]).tobytes())
    return Updated(state, whole, text.hexdigest())


def fixed(what, path, shape):
    """Multiples of 1/64 that depend on nothing but the path: no rounding, and many ties."""
    random = np.random.RandomState(zlib.crc32(f"{what}/{path}".encode()))
    return (random.randint(-127, 128, shape) / 64).astype(np.float32)


def _on(mesh, what, like, axes):
    """A tree of `fixed` arrays, each where its axes say."""
    specs = tiny_t5.specs(axes)

    def array(path, shape):
        value = fixed(what, path, shape)
        sharding = NamedSharding(mesh, specs[path] or PartitionSpec())
        return jax.make_array_from_callback(shape, sharding, lambda at: value[at])

    return unflatten(like, {path: array(path, leaf.shape) for path, leaf in flatten(like).items()})


def placed(state):
    """The partition specs of each live mask and of its weight, and whether devices share it."""
    weights = flatten(state.params)

    def spec(x):
        names = tuple(x.sharding.spec)
        return [*names, *[None] * (x.ndim - len(names))]

    return {
        path: {
            "mask": spec(mask),
            "weight": spec(weights[path]),
            "split": mask.sharding.shard_shape(mask.shape) != mask.shape,
        }
        for path, mask in state._optimizer.state.sparsity.masks.items()
    }


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    found = {}
    for name in sys.argv[4:]:
        result = updated(name)
        found[name] = {"digest": result.digest, "placed": placed(result.state)}
    print(json.dumps(found))
