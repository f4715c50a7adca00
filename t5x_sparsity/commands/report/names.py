"""Paths of weights, and other long names, as `t5x-sparsity report` sorts and shortens them."""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from typing import Any


def natural(path: str) -> list[Any]:
    """A key to sort paths by, with layers_2 before layers_10."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]


def block_of(path: str) -> str:
    """A path up to the first part with a number in it, such as 'decoder/layers_3'."""
    parts = path.split("/")
    numbered = next((i for i, p in enumerate(parts[:-1]) if any(c.isdigit() for c in p)), 0)
    return "/".join(parts[: numbered + 1])


def trim(paths: Sequence[str]) -> list[str]:
    """Paths without the parts that all begin or end with; at least one part stays of each."""
    parts = [p.split("/") for p in paths]
    most = min(map(len, parts), default=1) - 1
    start = len(os.path.commonprefix([p[:most] for p in parts]))
    end = len(os.path.commonprefix([p[::-1][: most - start] for p in parts]))
    return ["/".join(p[start : len(p) - end]) for p in parts]


def short(text: str, length: int = 22) -> str:
    """A long name with its middle left out."""
    if len(text) <= length:
        return text
    head = (length - 1) // 3
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"
