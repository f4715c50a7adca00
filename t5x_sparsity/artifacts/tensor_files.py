"""Safetensors files, written and read one tensor at a time.

The library's own writer takes all tensors at once, and its NumPy reader knows no float8. The format
is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Writer:
    """Writes a file, which is there once it is complete; a context manager.

    Tensors go to unnamed files in the folder of `path` first, one for each size of an item, since a
    tensor must start at a multiple of its item's size and the file may have no gaps. So the disk
    needs room for twice the file while it is written, and memory none.

    Raises:
      FileExistsError: the path is taken, and is not to be overwritten, or is a folder.
      NotADirectoryError: its folder isn't there.
    """

    def __init__(self, path: str | os.PathLike, *, overwrite: bool = False):
        self._path = Path(path)
        folder = self._path.parent
        if not folder.is_dir():
            raise NotADirectoryError(f"there is no folder {folder}")
        if self._path.is_dir() or (self._path.exists() and not overwrite):
            raise FileExistsError(f"{self._path} exists already")
        self._temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        self._parts: dict[int, Any] = defaultdict(lambda: tempfile.TemporaryFile(dir=folder))
        self._entries: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error) -> None:
        for part in self._parts.values():
            part.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, name: str, x: np.ndarray) -> None:
        """Takes a tensor; a ValueError if its name is taken, or the format lacks its dtype."""
        if name in self._entries or name == "__metadata__":
            raise ValueError(f"two tensors would be called {name!r}; rename one of the weights")
        if x.dtype not in _NAMES:
            raise ValueError(f"safetensors has no dtype for {name!r}, which is {x.dtype}")
        part = self._parts[x.itemsize]
        start = part.tell()
        part.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        self._entries[name] = {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, part.tell()],  # in its part
        }

    def finish(self, metadata: Mapping[str, str]) -> int:
        """Makes the file of what was added; returns its size in bytes."""
        starts, total = {}, 0
        for itemsize in sorted(self._parts, reverse=True):
            starts[itemsize] = total
            total += self._parts[itemsize].tell()
        for entry in self._entries.values():
            start = starts[_DTYPES[entry["dtype"]].itemsize]
            entry["data_offsets"] = [start + n for n in entry["data_offsets"]]
        text = json.dumps({"__metadata__": dict(metadata), **self._entries}).encode()
        text += b" " * (-len(text) % 8)
        with open(self._temporary, "xb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for itemsize in starts:
                self._parts[itemsize].seek(0)
                shutil.copyfileobj(self._parts[itemsize], out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        os.replace(self._temporary, self._path)
        return size


class Reader:
    """A file, of which tensors are read when they are asked for.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file, or not a whole one.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"there is no file {self._path}")
        try:
            with safe_open(self._path, framework="np"):  # which checks that the file is whole
                pass
        except SafetensorError as e:
            raise ValueError(f"{self._path} is no safetensors file, or not a whole one: {e}") from e
        with open(self._path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        self._data = 8 + length
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.names = list(header)
        self._entries = header

    def read(self, name: str) -> np.ndarray:
        """A tensor; a KeyError if there is none of that name."""
        entry = self._entries[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{self._path}: NumPy has no dtype {entry['dtype']}, as {name!r} has")
        start, end = entry["data_offsets"]
        x = np.fromfile(self._path, np.uint8, count=end - start, offset=self._data + start)
        return x.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
