"""Weights of a checkpoint as one safetensors file, dense or compressed, and back.

docs/export.md describes the file. One weight at a time is in memory while it is written.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_sparsity import __version__
from t5x_sparsity.artifacts import compression, encodings
from t5x_sparsity.artifacts.checkpoint import Checkpoint, SavedWeight, sparsity
from t5x_sparsity.artifacts.encodings import VALUES, Dense, Encoding
from t5x_sparsity.artifacts.tensor_files import Reader, Writer

FORMATS = ("dense", "compressed")
# what --dtype takes
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("arrays", "bcoo", "masks")

_FORMAT = "t5x_sparsity."
_VERSION = 1


class ExportError(ValueError):
    """What was asked for can't be exported."""


def export(
    checkpoint: Checkpoint,
    out: str | os.PathLike,
    *,
    format: str = "dense",
    dtype: str | None = None,
    include: str | None = None,
    smallest: bool = False,
    overwrite: bool = False,
    on_weight: Callable[[str], None] = lambda path: None,
) -> dict[str, Any]:
    """Writes a checkpoint's weights, those under target/, to a safetensors file.

    Args:
      checkpoint: from `open_checkpoint`.
      out: the file; it is there once it is complete.
      format: 'dense': arrays with exact zeros; 'compressed': each by the pattern of its zeros.
      dtype: 'float32', 'bfloat16' or 'float16' for all floating-point weights, None for their own.
      include: a regular expression; weights whose path it is found in, None for all.
      smallest: of compressed weights, whether a bit mask is taken wherever it is smaller than CSR.
      overwrite: whether a file of that name is replaced.
      on_weight: called with each path before it is read.

    Returns:
      What was written, as `t5x-sparsity export --json` prints it.

    Raises:
      ExportError: an argument is out of range, no weight is included, or a value doesn't fit the
        dtype.
      FileExistsError, NotADirectoryError: see `Writer`.
    """
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    paths = _included(list(checkpoint.weights), include)
    described, weights = {}, []
    with Writer(out, overwrite=overwrite) as writer:
        for path in paths:
            on_weight(path)
            saved = checkpoint.weights[path]
            x = _converted(saved.array.read(), dtype, path)
            arrays, described[path], printed = _encoded(saved, x, format, smallest)
            weights.append({"path": path, **described[path], **printed})
            is_dense = described[path]["encoding"] == Dense.name
            for name, array in arrays.items():
                writer.add(path if is_dense else f"{path}.{name}", array)
        file_bytes = writer.finish(
            {
                "format": _FORMAT + format,
                "version": str(_VERSION),
                "producer": f"t5x_sparsity {__version__}",
                "step": str(checkpoint.step),
                "weights": json.dumps(described),
            }
        )
    return {
        "path": os.fspath(out),
        "format": format,
        "checkpoint": checkpoint.path,
        "step": checkpoint.step,
        "passed_over": list(checkpoint.skipped),
        "has_masks": bool(checkpoint.masked),
        "file_bytes": file_bytes,
        "totals": totals(weights),
        "weights": weights,
    }


def totals(weights: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of several weights together."""
    size, kept = sum(w["size"] for w in weights), sum(w["kept"] for w in weights)
    return {
        "weights": size,
        "kept": kept,
        "sparsity": sparsity(kept, size),
        "dense_bytes": sum(w["dense_bytes"] for w in weights),
        "exported_bytes": sum(w["exported_bytes"] for w in weights),
        "bound_bytes": sum(w["bound_bytes"] for w in weights),
    }


def _included(paths: list[str], include: str | None) -> list[str]:
    try:
        found = [p for p in paths if re.search(include or "", p)]
    except re.error as e:
        raise ExportError(f"include is not a regular expression: {e}, got {include!r}") from e
    if not found:
        raise ExportError(
            f"include, {include!r}, is found in no weight's path; these are "
            f"{', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}"
        )
    return found


def _converted(x: np.ndarray, dtype: str | None, path: str) -> np.ndarray:
    if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(all="ignore"):
        y = x.astype(jnp.dtype(dtype))
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        raise ExportError(
            f"{path} has values that {dtype} can't hold: its largest magnitude is "
            f"{np.max(np.abs(x[np.isfinite(x)])):.4g}; choose another dtype"
        )
    return y


def _encoded(
    saved: SavedWeight, x: np.ndarray, format: str, smallest: bool
) -> tuple[Mapping[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """(arrays, what the file says of the weight, what is printed of it besides)."""
    record, notes = saved.record, []
    kept, has_mask = saved.kept(x), saved.mask is not None
    # a weight times its mask is -0.0 wherever a negative one is pruned: a zero as any other
    outside = np.count_nonzero((x != 0) & ~kept) if has_mask else 0
    if outside:
        kept, has_mask = x != 0, False
        notes.append(f"{outside:,} weights that its mask prunes aren't 0; it isn't kept")
    encoding: Encoding = Dense()
    if format == "compressed":
        encoding = compression.choose(
            x,
            kept,
            exactly=has_mask,
            pattern=record.pattern or "",
            stack_axes=saved.axes.stack,
            smallest=smallest,
        )
    count = int(np.count_nonzero(kept))
    if isinstance(encoding, Dense):
        if format == "compressed" and has_mask and count < x.size:
            notes.append("stays dense, as no encoding is smaller; its mask isn't exported")
        has_mask = has_mask and count == x.size
    elif signed := np.count_nonzero(np.signbit(x.real) & ~kept):
        notes.append(f"{signed:,} of its pruned zeros are -0.0; their sign isn't kept")
    arrays = encoding.encode(x, kept)
    described = {
        "shape": list(x.shape),
        "dtype": x.dtype.name,
        "encoding": encoding.name,
        **dataclasses.asdict(encoding),
        "kept": count,
        "sparsity": sparsity(count, x.size),
        "mask": has_mask,
        "pattern": record.pattern or "",
        "algorithm": record.algorithm or "",
        "stack_axes": list(record.stack_axes or ()),
    }
    printed = {
        "size": x.size,
        "dense_bytes": x.nbytes,
        "exported_bytes": sum(a.nbytes for a in arrays.values()),
        "bound_bytes": encoding.bound_bytes(x.shape, count, x.itemsize),
        "note": "; ".join(notes),
    }
    return arrays, described, printed


def load_export(path: str | os.PathLike, as_: str = "arrays", *, flat: bool = False) -> dict:
    """Reads a file of `t5x-sparsity export`, dense or compressed.

    Args:
      path: of the file.
      as_: 'arrays': NumPy arrays, in bits what was exported, but that pruned zeros of a compressed
        weight have no sign, ready for `model.apply({'params': ...})`. 'bcoo': a
        `jax.experimental.sparse.BCOO` of the weight's shape for each sparse weight, a NumPy array
        for each other; of a compressed file, what a mask keeps is stored even where it is 0, and
        what is stored dense is no sparse weight. JAX makes 64-bit values 32-bit ones, unless told
        otherwise. 'masks': bool arrays, True where a weight is kept, of the weights whose mask is
        in the file: those of a compressed one.
      flat: return weights by path rather than nested by its parts.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file, not a whole one, none of this package, of a newer
        version, or contradicts itself; or `as_` is out of range.
    """
    if as_ not in FORMS:
        raise ValueError(f"as_ must be one of {', '.join(FORMS)}, got {as_!r}")
    reader = Reader(path)
    form, described = _described(path, reader.metadata)
    loaded: dict[str, Any] = {}
    for name, fields in described.items():
        if as_ == "masks" and not fields["mask"]:
            continue
        try:
            loaded[name] = _loaded(reader, name, fields, as_, form)
        except (ValueError, IndexError, KeyError, TypeError) as e:
            raise ValueError(f"{path} is damaged: weight {name!r}: {e}") from e
    if as_ == "masks" and not loaded:
        remedies = {
            "dense": "export with --format compressed to keep them",
            "compressed": "none of the weights in it had one to keep; export sparse weights of a "
            "checkpoint with masks",
        }
        raise ValueError(f"{path} has no masks: {remedies[form]}")
    return loaded if flat else _nested(loaded)


def _described(path, metadata: Mapping[str, str]) -> tuple[str, dict[str, dict]]:
    """(format, what the file says of its weights)."""
    form = metadata.get("format", "")
    if not form.startswith(_FORMAT):
        raise ValueError(
            f"{path} was not written by t5x-sparsity export; safetensors.numpy.load_file reads it"
        )
    version = metadata.get("version", "")
    if not version.isdecimal() or int(version) > _VERSION or form[len(_FORMAT) :] not in FORMATS:
        raise ValueError(
            f"{path} has format {form!r}, version {version!r}, but this t5x_sparsity, {__version__}"
            f", reads versions up to {_VERSION}; a newer one may read it"
        )
    try:
        weights = json.loads(metadata["weights"])
        for fields in weights.values():
            fields["encoding"], fields["shape"], fields["dtype"], fields["kept"], fields["mask"]
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: it doesn't say which weights it has") from e
    return form[len(_FORMAT) :], weights


def _loaded(reader: Reader, name: str, fields: Mapping[str, Any], as_: str, form: str):
    encoding = encodings.from_dict(fields["encoding"], fields)
    shape, is_dense = tuple(fields["shape"]), isinstance(encoding, Dense)
    if is_dense:
        arrays = {VALUES: reader.read(name)}
    else:
        prefix = f"{name}."
        own = (n for n in reader.names if n.startswith(prefix))
        arrays = {n.removeprefix(prefix): reader.read(n) for n in own}
    if arrays[VALUES].dtype.name != fields["dtype"]:
        raise ValueError(f"its dtype is {arrays[VALUES].dtype}, not {fields['dtype']}")
    stays_dense = is_dense and (form == "compressed" or fields["kept"] == math.prod(shape))
    if as_ == "arrays" or (as_ == "bcoo" and stays_dense):
        return encoding.decode(arrays, shape)
    if is_dense and as_ == "masks":
        return np.ones(shape, bool)
    positions, values = encoding.stored(arrays, shape)
    if as_ == "masks":
        mask = np.zeros(math.prod(shape), bool)
        mask[positions] = True
        return mask.reshape(shape)
    if is_dense:
        positions, values = positions[values != 0], values[values != 0]
    from jax.experimental import sparse  # here, as its import takes long

    order = np.argsort(positions, kind="stable")
    indices = np.stack(np.unravel_index(positions[order], shape), axis=-1).astype(np.int32)
    return sparse.BCOO(
        (jnp.asarray(values[order]), jnp.asarray(indices)),
        shape=shape,
        indices_sorted=True,
        unique_indices=True,
    )


def _nested(flat: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for path, x in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return tree
