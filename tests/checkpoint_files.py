"""Checkpoints written by hand in either layout, for tests; no host is needed."""

import json
import shutil
from pathlib import Path

import numpy as np

LAYOUTS = ("orbax", "t5x")


def pack(mask, axis):
    """A mask as it is stored: eight a byte along `axis`, or a byte a weight."""
    return mask.astype(np.uint8) if axis is None else np.packbits(mask, axis, bitorder="little")


def nested(leaves):
    tree = {}
    for name, x in leaves.items():
        *parents, last = name.split("/")
        at = tree
        for key in parents:
            at = at.setdefault(key, {})
        at[last] = x
    return tree


def write(layout, folder, leaves, **kwargs):
    """Writes leaves by name, such as 'target/mlp/wi', as the checkpoint `folder`; returns it."""
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (write_orbax if layout == "orbax" else write_t5x)(folder, leaves, **kwargs)
    return folder


def write_orbax(folder, leaves, **kwargs):
    """kwargs: of Orbax's handler, such as use_zarr3."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(**kwargs)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "state", args=ocp.args.PyTreeSave(nested(leaves)))


def write_t5x(folder, leaves, chunks=None):
    """As T5X's own checkpointer does: a msgpack of specs, small arrays in it as they are.

    chunks: name -> shape of the chunks; what isn't named is one.
    """
    import tensorstore as ts
    from flax import serialization

    found = {}
    for name, x in leaves.items():
        x = np.asarray(x)
        if x.ndim < 2:
            found[name] = x
            continue
        place = name.replace("/", ".")
        found[name] = {
            "driver": "zarr",
            "dtype": x.dtype.name,
            "kvstore": {"driver": "file", "path": f"{place}/"},
            "metadata": {
                "chunks": list((chunks or {}).get(name, x.shape)),
                "compressor": {"id": "gzip", "level": 1},
                "shape": list(x.shape),
            },
        }
        kvstore = {"driver": "file", "path": f"{folder}/{place}/"}
        ts.open({**found[name], "kvstore": kvstore}, create=True).result().write(x).result()
    content = {"version": 3, "optimizer": nested(found)}
    (folder / "checkpoint").write_bytes(serialization.to_bytes(content))


def sparse_leaves(weights, masks=None, step=7):
    """The leaves of a checkpoint of weights by path; masks: path -> (bool mask, packed axis)."""
    leaves = {"state/step": np.int32(step)}
    for path, x in weights.items():
        if masks and path in masks:
            mask, axis = masks[path]
            x = np.where(mask, x, np.zeros((), x.dtype))
            leaves[f"state/sparsity/masks/{path}"] = pack(mask, axis)
        leaves[f"target/{path}"] = x
    return leaves


def write_record(model_dir, **entries):
    """sparsity.json; entries: path, its '/' written '__' -> what it says."""
    record = {path.replace("__", "/"): entry for path, entry in entries.items()}
    (Path(model_dir) / "sparsity.json").write_text(json.dumps(record))


def in_memory(leaves, record=None, step=0):
    """A checkpoint of leaves by name that lies on no disk; record: what sparsity.json says."""
    from t5x_sparsity.artifacts.checkpoint import Checkpoint
    from t5x_sparsity.artifacts.checkpoint_arrays import SavedArray
    from t5x_sparsity.artifacts.record import WeightRecord

    here = Path("here")
    return Checkpoint(
        path="here",
        step=step,
        layout="t5x",
        arrays={k: SavedArray(here, k, x, x.shape) for k, x in leaves.items()},
        record={path: WeightRecord.from_dict(entry) for path, entry in (record or {}).items()},
    )
