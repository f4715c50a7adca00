"""Reads and writes `sparsity.json`, in which a run says by which rules its masks are made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t5x_sparsity.core.names import one_line

if TYPE_CHECKING:
    from etils import epath

RECORD = "sparsity.json"

# What an array can have, and no number that a reader could not go on with.
_MOST_AXES, _MOST = 64, 2**63


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """What a run says of a weight; None for what it doesn't say, as older versions said less."""

    shape: tuple[int, ...] | None = None  #: of the weight
    sparsity: float | None = None  #: to have in the end, in [0, 1]
    kept: int | None = None  #: weights to keep in the end
    pattern: str | None = None  #: its text, see `core.patterns.to_text`
    algorithm: str | None = None  #: name of its class
    start_step: int | None = None  #: from which mask updates count
    axes: tuple[str | None, ...] | None = None  #: logical names of the weight's axes
    stack_axes: tuple[int, ...] | None = None  #: axes along which slices are pruned apart

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> WeightRecord:
        """The record of an entry of the file; further keys are left out."""
        own = {f.name: entry[f.name] for f in dataclasses.fields(cls) if f.name in entry}
        if own.get("axes") is not None:  # the last axes may have no name
            own["axes"] = own["axes"] + [None] * (len(own.get("shape") or ()) - len(own["axes"]))
        if "pattern" in own:  # older versions wrote several lines where a user's pattern has them
            own["pattern"] = one_line(own["pattern"])
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})

    def to_dict(self) -> dict[str, Any]:
        """The entry of the file, where axes that are not known are null."""
        said = {k: v for k, v in vars(self).items() if v is not None or k == "axes"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in said.items()}


def write_record(path: epath.Path, record: Mapping[str, WeightRecord]) -> None:
    """Writes the record by path of the weight; all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f"{path.name}.tmp"
    draft.write_text(json.dumps({p: entry.to_dict() for p, entry in record.items()}, indent=1))
    draft.replace(path)


def read_record(path: epath.Path) -> dict[str, WeightRecord]:
    """The record by path of the weight; what an entry has is of its type and range.

    Everything in an entry is optional, as older versions wrote less, but axes need a shape.

    Raises:
      ValueError: it is no record of a run; says why in a line.
      OSError: it can't be read.
    """
    try:
        record = json.loads(path.read_bytes())
        _check(record)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    return {p: WeightRecord.from_dict(entry) for p, entry in record.items()}


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it is {_shown(record)}, not an object with one entry per weight")
    for path, entry in record.items():
        if not _is_text(path):
            raise ValueError(f"{_shown(path)} is no path of a weight")
        if not isinstance(entry, dict):
            raise ValueError(f"the entry of {path} is {_shown(entry)}, not an object")
        for key, is_right, allowed in _ALLOWED:
            if key in entry and not is_right(entry[key], entry.get("shape", [])):
                raise ValueError(f"{key} of {path} is {_shown(entry[key])}, not {allowed}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_text(value: Any) -> bool:
    # others, such as half a pair of surrogates, can't be printed
    return isinstance(value, str) and value.isprintable()


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_shape(value: Any, _) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(map(_is_whole, value))
        and math.prod(n or 1 for n in value) < _MOST
    )


def _are_names(value: Any, shape: list) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) <= len(shape)
        and all(name is None or _is_text(name) for name in value)
    )


def _are_stacked(value: Any, shape: list) -> bool:
    # one axis at least is left for the slices
    return isinstance(value, list) and (
        not value
        or all(type(a) is int and 0 <= a < len(shape) for a in value)
        and len(set(value)) == len(value) < len(shape)
    )


# The shape comes first, as others are checked against it.
_ALLOWED = (
    ("shape", _is_shape, "a list of whole numbers"),
    ("sparsity", lambda x, _: type(x) in (int, float) and 0 <= x <= 1, "a number in [0, 1]"),
    ("kept", lambda x, _: _is_whole(x), "a whole number"),
    ("pattern", lambda x, _: isinstance(x, str) and _is_text(one_line(x)), "text"),
    ("algorithm", lambda x, _: _is_text(x), "text of a line"),
    ("start_step", lambda x, _: _is_whole(x), "a step"),
    ("axes", _are_names, "null or a list of names or nulls, at most one per axis of the shape"),
    ("stack_axes", _are_stacked, "a list of different axes of the shape, which leaves one"),
)
