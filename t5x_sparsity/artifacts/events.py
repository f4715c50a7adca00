"""Reads what a run wrote to its folder: TensorBoard events, `sparsity.json`, `config.gin`.

TensorFlow isn't imported: that would take longer than the reading.
"""

import ast
import contextlib
import dataclasses
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from gin import config_parser
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util import tensor_util

from t5x_sparsity.artifacts.macros import AsWritten
from t5x_sparsity.artifacts.record import RECORD, read_record

MASKS = "masks/"
FAN_IN = "mask_fan_in/"

_EVENTS = "events.out.tfevents."
_FLOAT = 1  # DT_FLOAT, in which scalars are written
_PNG = b"\x89PNG\r\n"


class Series(NamedTuple):
    """A scalar over the run: int64 steps [n], ascending, none twice, and float64 values [n]."""

    steps: np.ndarray
    values: np.ndarray  #: may be NaN or infinite

    @property
    def last(self) -> float:
        """The value at the last step."""
        return float(self.values[-1])


class Image(NamedTuple):
    """A PNG as it was written; its size is in pixels."""

    step: int
    width: int
    height: int
    png: bytes


class Histogram(NamedTuple):
    """Counts of values by buckets: float64 edges [n + 1], ascending, and float64 counts [n]."""

    step: int
    edges: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run wrote to its folder."""

    folder: str
    train: Mapping[str, Series]  #: of training, by tag
    evals: Mapping[str, Mapping[str, Series]]  #: task -> tag -> series, sorted by task
    masks: Mapping[str, Sequence[Image]]  #: of a weight's mask by its path, in the order of steps
    fan_in: Mapping[str, Sequence[Histogram]]  #: of the weights kept per output neuron, likewise
    record: Mapping[str, Mapping[str, Any]]  #: `sparsity.json`; empty for a dense run
    config: str | None  #: `config.gin`, None where there is none
    bindings: Mapping[str, str]  #: name -> value as text, of `config`; macros by their bare name
    weights: int | None  #: of the model, from `model-info.txt`; None where unknown
    remarks: Sequence[str]  #: one sentence per file or value that could not be read in full

    def group(self, prefix: str) -> dict[str, Series]:
        """Series of training below a prefix such as 'sparsity', by the rest of their names."""
        start = f"{prefix}/"
        return {k.removeprefix(start): s for k, s in self.train.items() if k.startswith(start)}


def read_run(folder: str) -> Run:
    """Reads the folder of a run, finished, stopped or still going.

    A run that was resumed has several files of events. For each name, a later file replaces what
    earlier files have from its first step on.

    Args:
      folder: MODEL_DIR of the run, of either host. Reads no checkpoint.

    Raises:
      ValueError: there is no such folder, or it holds no events of a run; says which.
    """
    whole = os.path.abspath(folder)
    try:
        whole.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{whole!a} is not UTF-8, as text on a page has to be; rename it") from e
    root = epath.Path(folder)
    if not root.exists():
        raise ValueError(f"there is no {folder}; give the folder of a run, its MODEL_DIR")
    if not root.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a run, its MODEL_DIR")
    remarks: list[str] = []
    train = _read_events(root / "train", remarks)
    tasks = root / "training_eval"
    evals = {
        task.name: series
        for task in _entries(tasks, remarks)
        if task.is_dir() and (series := _series(_read_events(task, remarks)))
    }
    if not any(train.values()) and not evals:
        if remarks:
            raise ValueError(f"{root} has no events that can be read: {remarks[0]}")
        raise ValueError(_no_events(root))
    config = _text(root / "config.gin")
    # each host says it in its own words
    weights = re.search(
        r"^(?:Weights in all|Total number of parameters): (\d+)",
        _text(root / "model-info.txt") or "",
        re.MULTILINE,
    )
    return Run(
        folder=str(folder),
        train=_series(train),
        evals=evals,
        masks=_by_path(train, Image, MASKS),
        fan_in=_by_path(train, Histogram, FAN_IN),
        record=_read_record(root / RECORD, remarks),
        config=config,
        bindings=_bindings(config or "", remarks),
        weights=int(weights[1]) if weights else None,
        remarks=tuple(remarks),
    )


def _no_events(root: epath.Path) -> str:
    if re.fullmatch(r"checkpoint_\d+", root.name):
        return f"{root} is a checkpoint; give the folder that it is in"
    if root.name in ("train", "training_eval") or any(_EVENTS in p.name for p in root.iterdir()):
        return f"{root} is part of a run's folder; give the folder that it is in"
    if (root / "config.gin").exists() or (root / "train").is_dir():
        return (
            f"{root} is of a run that has written no events yet; they come to {root / 'train'} "
            "with the first statistics"
        )
    return f"{root} is not the folder of a run: it has no events in train/ or training_eval/"


# -- events ---------------------------------------------------------------------------------------

# tag -> step -> value
_Found = dict[str, dict[int, Any]]


def _entries(folder: epath.Path, remarks: list[str]) -> list[epath.Path]:
    """The entries of a folder; none where it doesn't exist or can't be read."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as e:
        remarks.append(f"{folder.name}/ can't be read ({e.strerror or e}), and is left out.")
        return []


def _read_events(folder: epath.Path, remarks: list[str]) -> _Found:
    files = []
    for path in _entries(folder, remarks):
        if _EVENTS not in path.name:
            continue
        name = f"{folder.name}/{path.name}"
        try:
            events, is_whole = _events(path.read_bytes())
        except OSError as e:
            remarks.append(f"{name} can't be read ({e.strerror or e}), and is left out.")
            continue
        if not is_whole:
            remarks.append(
                f"{name} ends in the middle of an event: the run was stopped there, or is still "
                "going; all before it is here."
            )
        if events:
            files.append((events[0].wall_time, name, events))
    found: _Found = {}
    for _, name, events in sorted(files, key=lambda f: f[:2]):
        for tag, values in _values(events, name, remarks).items():
            first = min(values)
            kept = {s: v for s, v in found.get(tag, {}).items() if s < first}
            found[tag] = kept | values
    return found


def _events(data: bytes) -> tuple[list[event_pb2.Event], bool]:
    """The events of a file up to the first damaged one, and whether all are whole.

    A record is its length (8 bytes), a checksum of that (4), the event, a checksum of that (4).
    """
    events, at = [], 0
    with contextlib.suppress(struct.error, DecodeError):
        while at < len(data):
            length, checksum = struct.unpack_from("<QI", data, at)
            end = at + 12 + length
            if checksum != masked_crc32c(data[at : at + 8]) or end + 4 > len(data):
                break
            events.append(event_pb2.Event.FromString(data[at + 12 : end]))
            at = end + 4
    return events, at == len(data)


def _values(events: Sequence[event_pb2.Event], file: str, remarks: list[str]) -> _Found:
    found: _Found = {}
    damaged: Counter[str] = Counter()
    for event in events:
        for value in event.summary.value:
            try:
                read = _value(value, event.step)
            except Exception:  # what tensorboard raises on any bytes
                damaged[value.tag] += 1
                continue
            if read is not None:
                found.setdefault(value.tag, {})[event.step] = read
    for tag, n in damaged.items():
        values = "a value" if n == 1 else f"{n:,} values"
        remarks.append(f"{file} has {values} of {tag} that can't be read; all others are here.")
    return found


def _value(value, step: int) -> Any:
    """A scalar as a float, an image, a histogram; None for what is none of them."""
    if value.WhichOneof("value") == "simple_value":
        return value.simple_value
    tensor = value.tensor
    if tensor.dtype == _FLOAT and len(tensor.tensor_content) == 4:
        return struct.unpack("<f", tensor.tensor_content)[0]
    if value.tag.startswith(MASKS):
        strings = tensor.string_val
        # width, height, then the images of a batch
        if len(strings) < 3 or not strings[2].startswith(_PNG):
            return None
        return Image(step, int(strings[0]), int(strings[1]), strings[2])
    if value.WhichOneof("value") != "tensor" or tensor.string_val:
        return None
    array = tensor_util.make_ndarray(tensor)
    if value.tag.startswith(FAN_IN):
        return _histogram(array, step)
    return float(array) if array.ndim == 0 and array.dtype.kind in "fiu" else None


def _histogram(buckets: np.ndarray, step: int) -> Histogram | None:
    """buckets: float64 of shape [n, 3], left edge, right edge, count."""
    if buckets.ndim != 2 or buckets.shape[1] != 3 or not len(buckets):
        return None
    # if all values are one, so are all edges, and the last bucket has them
    if buckets[0, 0] == buckets[-1, 1]:
        center, count = buckets[0, 0], buckets[:, 2].sum()
        return Histogram(step, np.array([center - 0.5, center + 0.5]), np.array([count]))
    return Histogram(step, np.append(buckets[:, 0], buckets[-1, 1]), buckets[:, 2])


def _of_kind(found: _Found, kind: type) -> dict[str, dict[int, Any]]:
    """The values of one type, by tag and step, both in their order."""
    by_tag = {
        tag: {step: value for step, value in sorted(values.items()) if isinstance(value, kind)}
        for tag, values in sorted(found.items())
    }
    return {tag: values for tag, values in by_tag.items() if values}


def _series(found: _Found) -> dict[str, Series]:
    return {
        tag: Series(np.array(list(values), np.int64), np.array(list(values.values()), np.float64))
        for tag, values in _of_kind(found, float).items()
    }


def _by_path(found: _Found, kind: type, prefix: str) -> dict[str, list[Any]]:
    """Images or histograms, whose tags all have the prefix."""
    return {
        tag.removeprefix(prefix): list(values.values())
        for tag, values in _of_kind(found, kind).items()
    }


# -- the other files ------------------------------------------------------------------------------


def _text(path: epath.Path) -> str | None:
    return path.read_bytes().decode(errors="replace") if path.is_file() else None


def _read_record(path: epath.Path, remarks: list[str]) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        return {p: entry.to_dict() for p, entry in read_record(path).items()}
    except ValueError as e:
        remarks.append(f"{path.name} can't be read ({e}), and is left out.")
        return {}


def _bindings(config: str, remarks: list[str]) -> dict[str, str]:
    found = {}
    try:
        for statement in config_parser.ConfigParser(config, AsWritten()):
            if isinstance(statement, config_parser.BindingStatement):
                scope = f"{statement.scope}/" if statement.scope else ""
                name = f".{statement.arg_name}" if statement.arg_name else ""
                found[f"{scope}{statement.selector}{name}"] = repr(statement.value)
    except (SyntaxError, ValueError):
        remarks.append("config.gin can't be taken apart; it is shown as it is.")
        return {}
    return found


def resolve(bindings: Mapping[str, str], name: str) -> Any:
    """The value of a binding, through macros; None where it is unbound, a string for references.

    Args:
      bindings: of a run.
      name: in full, or the last parts of it, such as 'SparsityConfig.distribution'.
    """
    for _ in range(len(bindings)):
        text = bindings.get(name)
        if text is None:
            text = next((v for k, v in bindings.items() if k.endswith(f".{name}")), None)
        if text is None or not text.startswith("%"):
            break
        name = text[1:]
    else:
        return None
    try:
        return None if text is None else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
