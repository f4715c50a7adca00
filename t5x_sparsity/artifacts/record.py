"""Reads `sparsity.json`, in which a run says by which rules its masks are made."""

from __future__ import annotations

import json
import math
from typing import Any

# What an array can have, and no number that a reader could not go on with.
_MOST_AXES, _MOST = 64, 2**63


def parse_record(data: bytes) -> dict[str, dict[str, Any]]:
    """The record by path of the weight; what an entry has is of its type and range.

    Everything in an entry is optional, as older versions wrote less, but axes need a shape.

    Args:
      data: the file.

    Raises:
      ValueError: it is no record of a run; says why in a line.
    """
    try:
        record = json.loads(data)
        _check(record)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e
    return record


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"it is {_shown(record)}, not an object with an entry a weight")
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


def _is_share(value: Any, _) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _are_names(value: Any, shape: list) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == len(shape)
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
    ("sparsity", _is_share, "a number in [0, 1]"),
    ("kept", lambda value, _: _is_whole(value), "a whole number"),
    ("pattern", lambda value, _: _is_text(value), "text of a line"),
    ("algorithm", lambda value, _: _is_text(value), "text of a line"),
    ("start_step", lambda value, _: _is_whole(value), "a step"),
    ("axes", _are_names, "null or a list of a name or null for each axis of the shape"),
    ("stack_axes", _are_stacked, "a list of different axes of the shape, which leaves one"),
)
