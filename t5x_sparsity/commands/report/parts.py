"""Parts of the page of `t5x-sparsity report` that aren't charts: bars, masks and tables."""

from __future__ import annotations

import base64
import html
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_sparsity.artifacts.events import Histogram, Image
from t5x_sparsity.artifacts.macros import shown_macros
from t5x_sparsity.commands.report.names import block_of, natural, short, trim
from t5x_sparsity.commands.report.run import TOTAL, ReportRun

# Of each weight's masks so many are shown: the first, the last, and some between.
MAX_IMAGES = 3
# As many weights' masks are shown at once; the others are folded.
_SHOWN_CARDS = 6
# More weights than this are folded by blocks.
_FOLD = 40


def escape(text: Any) -> str:
    """Any text as it stands in HTML, and in its attributes."""
    return html.escape(str(text))


def breakable(text: Any) -> str:
    """The same of a path or a name in code, which may go on in a new line after its parts."""
    return re.sub(r"([_./])", r"\1<wbr>", escape(text))


def chip(run: ReportRun) -> str:
    """The run's colour and its name, in short where it is long."""
    name = f'<span title="{escape(run.name)}">{escape(short(run.name, 32))}</span>'
    return f'<span class="chip run{run.index}"></span>{name}'


# -- bars of layers -------------------------------------------------------------------------------


def layers_section(runs: Sequence[ReportRun]) -> str:
    """Bars of every sparse weight's sparsity at the last step, against its target.

    More than 40 weights are folded by blocks, each with its mean weighted by size.
    """
    actual = {r.index: r.run.group("sparsity") for r in runs}
    paths = sorted({p for s in actual.values() for p in s if p != TOTAL}, key=natural)
    if not paths:
        return ""
    values = {r.index: {p: s.last for p, s in actual[r.index].items()} for r in runs}
    targets = {r.index: r.targets() for r in runs}
    names = dict(zip(paths, trim(paths), strict=True))
    if len(paths) <= _FOLD:
        content = "".join(_layer(runs, p, names[p], values, targets) for p in paths)
    else:
        content = "".join(
            _fold(runs, block, list(members), names, values, targets)
            for block, members in itertools.groupby(paths, block_of)
        )
    chips = "".join(f'<li data-run="{r.index}">{chip(r)}</li>' for r in runs)
    legend = chips if len(runs) > 1 else '<li><span class="chip run0"></span>actual</li>'
    legend += '<li><span class="tick-key"></span>target</li>'
    return (
        '<figure class="card"><figcaption><h3>Sparsity by layer</h3><p>At the last step. '
        f"{len(paths):,} sparse weights{_same(paths, names)}.</p></figcaption>"
        f'<ul class="legend">{legend}</ul><div class="layers" tabindex="0">{content}</div></figure>'
    )


def _same(paths: Sequence[str], names: Mapping[str, str]) -> str:
    """What the short names leave out."""
    path, name = paths[0], names[paths[0]]
    start, _, end = path.partition(name)
    left_out = " and ".join(f"“{p}”" for p in (start, end) if p)
    return f", named without {left_out}, which all have" if left_out and len(paths) > 1 else ""


def _fold(runs, block, members, names, values, targets) -> str:
    def means(of: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, float]]:
        found = {}
        for run in runs:
            known = [p for p in members if p in of[run.index]]
            sizes = [run.size(p) or 1 for p in known]
            if known:
                mean = np.average([of[run.index][p] for p in known], weights=sizes)
                found[run.index] = {block: float(mean)}
        return {r.index: found.get(r.index, {}) for r in runs}

    summary = _layer(runs, block, f"{block} ({len(members)})", means(values), means(targets))
    rows = "".join(
        _layer(runs, p, p.removeprefix(f"{block}/") or names[p], values, targets) for p in members
    )
    return f"<details><summary>{summary}</summary>{rows}</details>"


def _layer(runs, path, name, values, targets) -> str:
    bars = "".join(
        _bar(r, values[r.index][path], targets[r.index].get(path))
        for r in runs
        if path in values[r.index]
    )
    return (
        f'<div class="layer"><div class="name" title="{escape(path)}">{breakable(name)}</div>'
        f'<div class="bars">{bars}</div></div>'
    )


def _bar(run: ReportRun, value: float, target: float | None) -> str:
    tick = "" if target is None else f'<b style="left:{100 * target:.3f}%"></b>'
    says = "" if target is None else f", target {target:.2%}"
    return (
        f'<div class="bar" data-run="{run.index}" title="{escape(run.name)}: {value:.2%}{says}">'
        f'<span class="track"><i class="run{run.index}" style="width:{100 * value:.3f}%"></i>{tick}'
        f'</span><span class="number">{value:.2%}</span></div>'
    )


# -- masks ----------------------------------------------------------------------------------------


def masks_section(runs: Sequence[ReportRun]) -> str:
    """A card a weight that there are images or histograms of: its masks, its fan-in."""
    paths = sorted({p for r in runs for p in (*r.run.masks, *r.run.fan_in)}, key=natural)
    if not paths:
        return ""
    legend = (
        '<ul class="legend masks-legend"><li><span class="ramp"></span>pruned to kept</li>'
        "<li>rows are the weight’s first axis; select a mask to enlarge it</li>"
        "<li>histograms: weights kept per output neuron, the last filled, the first as a line, "
        "each to its own height</li>"
        "</ul>"
    )
    shown, folded = paths[:_SHOWN_CARDS], paths[_SHOWN_CARDS:]
    more = f"<summary>{len(folded)} more weights</summary>{_cards(folded, runs)}"
    more = f"<details>{more}</details>" if folded else ""
    return f'<div class="masks">{legend}{_cards(shown, runs)}{more}</div>'


def _cards(paths: Sequence[str], runs: Sequence[ReportRun]) -> str:
    return f'<div class="grid">{"".join(_card(p, runs) for p in paths)}</div>'


def _card(path: str, runs: Sequence[ReportRun]) -> str:
    rows = []
    for run in runs:
        images, histograms = run.run.masks.get(path, ()), run.run.fan_in.get(path, ())
        if images or histograms:
            name = f"<h4>{chip(run)}</h4>" if len(runs) > 1 else ""
            strip = "".join(_image(i, path) for i in chosen(images))
            rows.append(
                f'<div class="mask-run" data-run="{run.index}">{name}'
                f'<div class="strip">{strip}</div>{_fan_in(run, histograms)}</div>'
            )
    return (
        f'<figure class="card mask"><figcaption><h3 class="path-name">{breakable(path)}</h3><p>'
        f'{escape(_pixel(path, runs))}<span class="gain"></span></p></figcaption>'
        f"{''.join(rows)}</figure>"
    )


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


def chosen(images: Sequence[Image]) -> list[Image]:
    """The first, the last, and some between, at most `MAX_IMAGES`."""
    if len(images) <= MAX_IMAGES:
        return list(images)
    at = np.linspace(0, len(images) - 1, MAX_IMAGES).round().astype(int)
    return [images[i] for i in at]


def _image(image: Image, path: str) -> str:
    # whole multiples, as anything else would make stripes
    scale = max(1, 128 // max(image.width, image.height, 1))
    data = base64.b64encode(image.png).decode()
    step = f"step {image.step:,}"
    return (
        f'<button type="button" class="zoom" aria-label="Enlarge the mask of {escape(path)}, '
        f'{step}"><img class="pixels" alt="Mask at {step}" width="{image.width * scale}" '
        f'height="{image.height * scale}" src="data:image/png;base64,{data}">'
        f"<span>{step}</span></button>"
    )


def _fan_in(run: ReportRun, histograms: Sequence[Histogram]) -> str:
    """The last histogram as bars, the first as a line."""
    if not histograms:
        return ""
    first, last = _whole_numbers(histograms[0]), _whole_numbers(histograms[-1])
    shown = [last] if first.step == last.step else [last, first]
    low = min(h.edges[0] for h in shown)
    high = max(h.edges[-1] for h in shown)
    density = [_density(h) for h in shown]

    def outline(h: Histogram, d: np.ndarray) -> str:
        x = (h.edges - low) / ((high - low) or 1.0) * 300
        # each to a height of its own: one spike would leave nothing to see of the other
        y = 60 - d / (d.max() or 1.0) * 58
        # up and along each bucket
        points = "".join(
            f"L{a:.1f} {v:.1f}L{b:.1f} {v:.1f}" for a, b, v in zip(x[:-1], x[1:], y, strict=True)
        )
        return f"M{x[0]:.1f} 60{points}L{x[-1]:.1f} 60"

    paths = f'<path class="fill run{run.index}" d="{outline(last, density[0])}Z"/>'
    if len(shown) > 1:
        paths += f'<path class="first" d="{outline(first, density[1])}"/>'
    return (
        f'<div class="fan-in"><p>Fan-in, mean {_mean(last):,.1f}</p>'
        '<svg viewBox="0 0 300 60" preserveAspectRatio="none" role="img" '
        f'aria-label="Histogram of fan-in">{paths}</svg><p class="ends">'
        f"<span>{low + 0.5:,.0f}</span><span>{high - 0.5:,.0f}</span></p></div>"
    )


def _whole_numbers(h: Histogram) -> Histogram:
    """The same by the whole numbers in each bucket, as fan-in has no others.

    Buckets hold now one of them, now two or none, which would look like gaps and peaks.
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
    return _settings(runs) + "".join(_weights(r, runs) + _whole(r, runs) for r in runs)


def _settings(runs: Sequence[ReportRun]) -> str:
    """Settings that matter to every run, and all that differ between these."""
    bindings = [r.run.bindings for r in runs]
    differing = [
        name
        for name in dict.fromkeys(itertools.chain(*bindings))
        # the folder is the run's own anyway
        if name != "MODEL_DIR" and len({b.get(name) for b in bindings}) > 1
    ]
    important = shown_macros()
    common = [n for n in important if n not in differing and any(n in b for b in bindings)]
    if not differing and not common:
        return ""
    # macros before what they are bound to
    order = {name: i for i, name in enumerate(important)}
    differing.sort(key=lambda n: (order.get(n, len(order)), not n.isupper()))
    rows = [
        [breakable(name), *(f"<code>{breakable(b.get(name, '–'))}</code>" for b in bindings)]
        for name in (*differing, *common)
    ]
    classes = ["differs"] * len(differing) + [""] * len(common)
    note = "The settings that matter most; the whole is below."
    if len(runs) > 1:
        note = (
            f"{len(differing)} settings differ, MODEL_DIR aside; they come first, marked ≠."
            if differing
            else "No setting differs, MODEL_DIR aside."
        )
    head = ["setting", *(chip(r) if len(runs) > 1 else "value" for r in runs)]
    return (
        f'<figure class="card"><figcaption><h3>Settings</h3><p>{note}</p></figcaption>'
        f"{_table(head, rows, classes)}</figure>"
    )


def _weights(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    if not run.record:
        return ""
    actual, targets = run.run.group("sparsity"), run.targets()
    rows = []
    for path in sorted(run.record, key=natural):
        values = run.record[path]
        found, target = actual.get(path), targets.get(path)
        shape = values.get("shape", ())
        rows.append(
            [
                breakable(path),
                escape("×".join(map(str, shape))),
                f"{math.prod(shape):,}" if shape else "",
                _percent(values.get("sparsity")),
                _percent(target),
                "" if found is None else _percent(found.last),
                escape(values.get("pattern", "")).removesuffix("()"),
                escape(values.get("algorithm", "")),
            ]
        )
    head = ["weight", "shape", "weights", "planned", "target", "actual", "pattern", "algorithm"]
    name = f", {escape(run.name)}" if len(runs) > 1 else ""
    return (
        f'<details class="card" data-run="{run.index}"><summary>Sparse weights{name} '
        f"<small>{len(rows):,} of sparsity.json</small></summary>"
        f"<p>Planned is the sparsity of the run’s end; target and actual are of step "
        f"{run.last_step:,}.</p>{_table(head, rows, numbers=(2, 3, 4, 5))}</details>"
    )


def _percent(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""


def _whole(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    if run.run.config is None:
        return ""
    name = f", {escape(run.name)}" if len(runs) > 1 else ""
    lines = run.run.config.count("\n")
    return (
        f'<details class="card" data-run="{run.index}"><summary>config.gin{name} '
        f'<small>{lines:,} lines</small></summary><div class="scroll" tabindex="0">'
        f"<pre>{escape(run.run.config)}</pre></div></details>"
    )


def _table(
    head: Iterable[str],
    rows: Sequence[Sequence[str]],
    classes: Sequence[str] | None = None,
    numbers: Sequence[int] = (),
) -> str:
    """A table that scrolls in itself; cells are HTML, the first of a row its heading."""

    def cell(i: int, text: str, tag: str) -> str:
        return f"<{tag}{' class=number' if i in numbers else ''}>{text}</{tag}>"

    top = "".join(cell(i, h, "th") for i, h in enumerate(head))
    body = "".join(
        f'<tr class="{name}">'
        + "".join(cell(i, t, "td" if i else "th") for i, t in enumerate(row))
        + "</tr>"
        for name, row in zip(classes or [""] * len(rows), rows, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
