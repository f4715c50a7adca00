"""Sections of the page of `t5x-sparsity report` that aren't charts: bars, masks and tables."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.artifacts.events import Histogram, Image
from t5x_sparsity.artifacts.macros import shown_macros
from t5x_sparsity.commands.pages import render
from t5x_sparsity.commands.report.names import block_of, natural, trim
from t5x_sparsity.commands.report.run import TOTAL, ReportRun
from t5x_sparsity.commands.text import evenly_spaced

# Masks shown per weight: the first, the last, and some between.
MAX_IMAGES = 3
# Weights whose masks are shown at once; the others are folded.
_SHOWN_CARDS = 6
# With more weights than this, the bars are folded by blocks.
_FOLD = 40


# -- bars of layers -------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A row of bars: the run, the sparsity and the target, None where it has none, per bar."""

    path: str
    name: str
    bars: Sequence[tuple[ReportRun, float, float | None]]


# run's index -> path -> share
_Shares = Mapping[int, Mapping[str, float]]


def layers_section(runs: Sequence[ReportRun]) -> str:
    """Bars of every sparse weight's sparsity at the last step, against its target.

    More than 40 weights are folded by blocks, each with its mean weighted by size.
    """
    actual = {r.index: r.run.group("sparsity") for r in runs}
    paths = sorted({p for s in actual.values() for p in s if p != TOTAL}, key=natural)
    if not paths:
        return ""
    values = {i: {p: s.last for p, s in series.items()} for i, series in actual.items()}
    targets = {r.index: r.targets() for r in runs}
    names = dict(zip(paths, trim(paths), strict=True))

    def layer(path: str, name: str, values: _Shares = values, targets: _Shares = targets) -> _Layer:
        bars = [
            (r, values[r.index][path], targets[r.index].get(path))
            for r in runs
            if path in values[r.index]
        ]
        return _Layer(path, name, bars)

    blocks: list[tuple[_Layer | None, list[_Layer]]] = []
    if len(paths) <= _FOLD:
        blocks.append((None, [layer(p, names[p]) for p in paths]))
    else:
        for block, members in itertools.groupby(paths, block_of):
            members = list(members)
            means = (_means(runs, block, members, shares) for shares in (values, targets))
            summary = layer(block, f"{block} ({len(members)})", *means)
            rows = [layer(p, p.removeprefix(f"{block}/") or names[p]) for p in members]
            blocks.append((summary, rows))
    left_out = _left_out(paths[0], names[paths[0]]) if len(paths) > 1 else ""
    return render(
        "report/layers.html", runs=runs, blocks=blocks, count=len(paths), left_out=left_out
    )


def _left_out(path: str, name: str) -> str:
    """What the short name leaves out of a path."""
    start, _, end = path.partition(name)
    return " and ".join(f"“{p}”" for p in (start, end) if p)


def _means(
    runs: Sequence[ReportRun], block: str, members: Sequence[str], shares: _Shares
) -> dict[int, dict[str, float]]:
    """The mean of a block's weights by size, per run that has any of them."""
    found = {}
    for run in runs:
        known = [p for p in members if p in shares[run.index]]
        found[run.index] = {}
        if known:
            sizes = [run.size(p) or 1 for p in known]
            mean = np.average([shares[run.index][p] for p in known], weights=sizes)
            found[run.index][block] = float(mean)
    return found


# -- masks ----------------------------------------------------------------------------------------


def masks_section(runs: Sequence[ReportRun]) -> str:
    """A card per weight that has images or histograms: its masks, its fan-in."""
    paths = sorted({p for r in runs for p in (*r.run.masks, *r.run.fan_in)}, key=natural)
    if not paths:
        return ""
    cards = [_card(p, runs) for p in paths]
    return render(
        "report/masks.html",
        several=len(runs) > 1,
        shown=cards[:_SHOWN_CARDS],
        folded=cards[_SHOWN_CARDS:],
    )


def _card(path: str, runs: Sequence[ReportRun]) -> dict[str, Any]:
    rows = [
        (
            run,
            [_image(i) for i in evenly_spaced(run.run.masks.get(path, ()), MAX_IMAGES)],
            _fan_in(run.run.fan_in.get(path, ())),
        )
        for run in runs
        if path in run.run.masks or path in run.run.fan_in
    ]
    return {"path": path, "pixel": _pixel(path, runs), "runs": rows}


def _pixel(path: str, runs: Sequence[ReportRun]) -> str:
    """What a pixel of the masks stands for."""
    for run in runs:
        shape, images = run.record.get(path, {}).get("shape"), run.run.masks.get(path)
        if shape and images:
            size = "×".join(f"{n:,}" for n in shape)
            across = (images[-1].height, images[-1].width)
            if tuple(shape) == across:
                return f"{size}. A pixel is a weight."
            if len(shape) == 2:
                cell = "×".join(
                    f"{n // k}" if n % k == 0 else f"about {n / k:.1f}"
                    for n, k in zip(shape, across, strict=True)
                )
                return f"{size}. A pixel is the share kept of {cell} weights."
            return f"{size}. A pixel is the share kept of a cell of weights."
    return "A pixel is the share kept of a cell of weights."


def _image(image: Image) -> dict[str, Any]:
    return {
        "step": image.step,
        "width": image.width,
        "height": image.height,
        # whole multiples, as anything else would make stripes
        "scale": max(1, 128 // max(image.width, image.height, 1)),
        "data": base64.b64encode(image.png).decode(),
    }


def _fan_in(histograms: Sequence[Histogram]) -> dict[str, Any] | None:
    """The outlines, as SVG paths, of the last histogram and of the first, '' where it is one."""
    if not histograms:
        return None
    first, last = _whole_numbers(histograms[0]), _whole_numbers(histograms[-1])
    shown = [last] if first.step == last.step else [last, first]
    low = min(h.edges[0] for h in shown)
    high = max(h.edges[-1] for h in shown)

    def outline(h: Histogram) -> str:
        density = _density(h)
        x = (h.edges - low) / ((high - low) or 1.0) * 300
        # each has its own scale: next to one with a spike, nothing of the other would be seen
        y = 60 - density / (density.max() or 1.0) * 58
        # up to each bucket, and along it
        points = "".join(
            f"L{a:.1f} {v:.1f}L{b:.1f} {v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True)
        )
        return f"M{x[0]:.1f} 60{points}L{x[-1]:.1f} 60"

    return {
        "mean": _mean(last),
        "low": low + 0.5,
        "high": high - 0.5,
        "last": outline(last),
        "first": outline(first) if len(shown) > 1 else "",
    }


def _whole_numbers(h: Histogram) -> Histogram:
    """The same with each bucket as wide as the whole numbers in it, as fan-in has no others.

    Some buckets hold one whole number, some two or none, which would look like gaps and peaks.
    """
    ends = np.ceil(h.edges - 1e-6)
    ends[-1] = np.floor(h.edges[-1] + 1e-6) + 1
    has_any = np.diff(ends) > 0
    if not has_any.any():
        return h
    return Histogram(h.step, np.append(ends[:-1][has_any], ends[-1]) - 0.5, h.counts[has_any])


def _density(h: Histogram) -> np.ndarray:
    return h.counts / np.diff(h.edges) / (h.counts.sum() or 1.0)


def _mean(h: Histogram) -> float:
    centers = (h.edges[:-1] + h.edges[1:]) / 2
    return float((centers * h.counts).sum() / (h.counts.sum() or 1.0))


# -- configuration --------------------------------------------------------------------------------


def config_section(runs: Sequence[ReportRun]) -> str:
    """The important settings, where runs differ, the planned weights, and the whole files."""
    bindings = [r.run.bindings for r in runs]
    differing = [
        name
        for name in dict.fromkeys(itertools.chain(*bindings))
        # the folder is the run's own anyway
        if name != "MODEL_DIR" and len({b.get(name) for b in bindings}) > 1
    ]
    important = shown_macros()
    common = [n for n in important if n not in differing and any(n in b for b in bindings)]
    # macros before what they are bound to
    order = {name: i for i, name in enumerate(important)}
    differing.sort(key=lambda n: (order.get(n, len(order)), not n.isupper()))
    return render(
        "report/configuration.html",
        runs=runs,
        differing=differing,
        common=common,
        weights=_weights,
    )


def _weights(run: ReportRun) -> list[tuple[str, ...]]:
    """A row per weight of the run's record."""
    actual, targets = run.run.group("sparsity"), run.targets()
    rows = []
    for path in sorted(run.record, key=natural):
        values = run.record[path]
        shape = values.get("shape", ())
        rows.append(
            (
                path,
                "×".join(map(str, shape)),
                f"{math.prod(shape):,}" if shape else "",
                _percent(values.get("sparsity")),
                _percent(targets.get(path)),
                _percent(actual[path].last if path in actual else None),
                str(values.get("pattern", "")).removesuffix("()"),
                values.get("algorithm", ""),
            )
        )
    return rows


def _percent(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""
