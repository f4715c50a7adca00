"""The page of `t5x-sparsity report`: one HTML file that needs nothing else, and no network."""

import base64
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_sparsity import __version__
from t5x_sparsity.artifacts.events import Histogram, Image
from t5x_sparsity.artifacts.macros import shown_macros
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.pages import render
from t5x_sparsity.commands.report import figures
from t5x_sparsity.commands.report.run import ReportRun, smoothed, window
from t5x_sparsity.commands.text import block_of, evenly_spaced, natural, trim

# Masks shown per weight: the first, the last, and some between.
MAX_IMAGES = 3
# Weights whose masks are shown at once; the others are folded.
_SHOWN_CARDS = 6
# With more weights than this, the bars are folded by blocks.
_FOLD = 40


def make_page(runs: Sequence[ReportRun]) -> str:
    """The whole page.

    Args:
      runs: at least one, in the order and with the indices that they are to be shown in.
    """
    sections = list(_sections(runs))
    # the same tiles for all runs, so that they stand below each other
    tiles = [_tiles(r) for r in runs]
    names = dict.fromkeys(name for shown in tiles for name in shown)
    panels = [{name: shown.get(name, ("–", "")) for name in names} for shown in tiles]
    charts = [chart for s in sections for chart in s["charts"]]
    return render(
        "report/page.html",
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        generator=generator("report"),
        panels=list(zip(runs, panels, strict=True)),
        sections=sections,
        data=[{"id": c.id, "data": c.data, "layout": c.layout} for c in charts],
        version=__version__,
        max_points=figures.MAX_POINTS,
        max_columns=figures.MAX_COLUMNS,
    )


def _section(
    title: str, charts: Iterable[figures.Chart] = (), content: str = "", notes: Iterable[str] = ()
) -> dict[str, Any]:
    """A section of the page: its charts, then HTML, then notes."""
    charts = list(charts)
    # two stand side by side, so the last of an odd number takes both places
    narrow = [i for i, c in enumerate(charts) if not c.is_wide]
    if len(narrow) % 2:
        charts[narrow[-1]] = dataclasses.replace(charts[narrow[-1]], is_wide=True)
    notes = [note for note in notes if note]
    return {"title": title, "charts": charts, "content": content, "notes": notes}


def _sections(runs: Sequence[ReportRun]) -> Iterator[dict[str, Any]]:
    notes = [
        _note(runs, [r for r in runs if not r.train_loss], "has no training loss in its events"),
        _note(runs, [r for r in runs if not r.eval_losses], "has no validation loss in its events"),
    ]
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        notes += [f"{name}{remark}" for remark in run.remarks]
    yield _section("Loss", figures.loss_charts(runs), notes=notes)
    sparse = [r for r in runs if r.is_sparse]
    if sparse:
        yield from _sparse_sections(sparse, [r.name for r in runs if not r.is_sparse])
    else:
        text = "No weight was made sparse: there are neither masks nor a sparsity.json to show."
        yield _section("Sparsity", notes=[text])
    yield _section("Configuration", content=config_section(runs))


def _sparse_sections(runs: Sequence[ReportRun], dense: Sequence[str]) -> Iterator[dict[str, Any]]:
    def without(tag: str) -> list[ReportRun]:
        return [r for r in runs if tag not in r.train]

    no_target = "has no targets in its events; bars are set against the plan for the run's end"
    yield _section(
        "Sparsity",
        figures.sparsity_charts(runs),
        layers_section(runs),
        [
            f"Dense, so not in this part of the page: {', '.join(dense)}." if dense else "",
            _note(runs, without("sparsity/total"), "has no sparsity in its events"),
            _note(runs, without("sparsity_target/total"), no_target),
        ],
    )
    churn = [(r, r.train["mask_churn/total"]) for r in runs if "mask_churn/total" in r.train]
    only_prune = [r for r, series in churn if not series.values.any()]
    reasons = "no mask update had happened, or the version that wrote them had none"
    no_churn = f"has no churn in its events: {reasons}"
    yield _section(
        "Churn",
        figures.churn_charts(runs),
        notes=[
            _note(runs, without("mask_churn/total"), no_churn),
            _note(runs, only_prune, "never grew a weight back, so the churn is 0 throughout"),
        ],
    )
    unseen = [r for r in runs if not r.masks]
    no_images = _note(runs, unseen, "has no images of masks in its events")
    yield _section("Masks", content=masks_section(runs), notes=[no_images])
    no_flops = _note(runs, without("flops/training"), "has no FLOPs in its events")
    yield _section("FLOPs", figures.flops_charts(runs), notes=[no_flops])


def _note(runs: Sequence[ReportRun], some: Sequence[ReportRun], what: str) -> str:
    """A note on some of the runs, '' for none."""
    if not some:
        return ""
    return f"{'The run' if len(runs) == 1 else ', '.join(r.name for r in some)} {what}."


def _tiles(run: ReportRun) -> dict[str, tuple[str, str]]:
    """Name -> value and what is written below it."""
    tiles = {}
    numbers = run.key_numbers()
    for task, series in run.eval_losses.items():
        best = numbers["validation"][task]
        name = "Validation loss" + (f", {task}" if len(run.eval_losses) > 1 else "")
        more = ""
        if best["best_step"] is not None:
            more = f"best {best['best_loss']:.4f} at step {best['best_step']:,}"
        tiles[name] = f"{series.last:.4f}", more
    if run.train_loss:
        points = window(run.train_loss)
        more = f"mean of about {points} points" if points > 1 else "at the last step"
        tiles["Training loss"] = f"{smoothed(run.train_loss).last:.4f}", more
    for name, key, digits, more in (
        ("Sparsity", "sparsity", 2, _if_known("target {:.2%}", numbers["sparsity_target"])),
        ("Training FLOPs", "flops_training_share", 1, "of dense, so far"),
        ("Inference FLOPs", "flops_inference_share", 1, "of dense"),
        ("Mean churn", "churn_mean", 2, _if_known("last {:.2%}", numbers["churn"])),
        ("Ever active", "explored", 1, "of sparse weights"),
    ):
        if numbers[key] is not None:
            tiles[name] = f"{numbers[key]:.{digits}%}", more
    if numbers["weights"] is not None:
        kept = numbers["weights_kept" if run.is_sparse else "weights"]
        tiles["Weights kept"] = _if_known("{:,}", kept) or "–", f"of {numbers['weights']:,}"
    tiles["Steps"] = f"{numbers['steps']:,}", _if_known("of {:,}", numbers["total_steps"])
    return tiles


def _if_known(text: str, number: float | None) -> str:
    return "" if number is None else text.format(number)


# -- bars of layers -------------------------------------------------------------------------------


def layers_section(runs: Sequence[ReportRun]) -> str:
    """Bars of every sparse weight's sparsity at the last step, against its target.

    More than 40 weights are folded by blocks, each with its mean weighted by size.
    """
    shares = [(r, r.actual(), r.targets()) for r in runs]
    paths = sorted({p for _, actual, _ in shares for p in actual}, key=natural)
    if not paths:
        return ""
    names = dict(zip(paths, trim(paths), strict=True))

    def layer(path: str, name: str, members: Sequence[str]) -> dict[str, Any]:
        """A bar per run that has any of the members: the run, the sparsity, the target or None."""
        bars = [
            (run, value, _mean_by_size(run, targets, members))
            for run, actual, targets in shares
            if (value := _mean_by_size(run, actual, members)) is not None
        ]
        return {"path": path, "name": name, "bars": bars}

    blocks: list[tuple[dict[str, Any] | None, list[dict[str, Any]]]] = []
    if len(paths) <= _FOLD:
        blocks.append((None, [layer(p, names[p], [p]) for p in paths]))
    else:
        for block, members in itertools.groupby(paths, block_of):
            members = list(members)
            rows = [layer(p, p.removeprefix(f"{block}/") or names[p], [p]) for p in members]
            blocks.append((layer(block, f"{block} ({len(members)})", members), rows))
    left_out = []
    if len(paths) > 1:
        start, _, end = paths[0].partition(names[paths[0]])
        left_out = [f"“{part}”" for part in (start, end) if part]
    return render(
        "report/layers.html",
        runs=runs,
        blocks=blocks,
        count=len(paths),
        left_out=" and ".join(left_out),
    )


def _mean_by_size(
    run: ReportRun, shares: Mapping[str, float], paths: Sequence[str]
) -> float | None:
    """The mean share of those weights that have one, None where none has."""
    known = [p for p in paths if p in shares]
    if len(known) < 2:
        return shares[known[0]] if known else None
    sizes = [run.size(p) or 1 for p in known]
    return float(np.average([shares[p] for p in known], weights=sizes))


# -- masks ----------------------------------------------------------------------------------------


def masks_section(runs: Sequence[ReportRun]) -> str:
    """A card per weight that has images or histograms: its masks, its fan-in."""
    paths = sorted({p for r in runs for p in (*r.masks, *r.fan_in)}, key=natural)
    if not paths:
        return ""
    cards = []
    for path in paths:
        shown = [
            (
                run,
                [_image(i) for i in evenly_spaced(run.masks.get(path, ()), MAX_IMAGES)],
                _fan_in(run.fan_in.get(path, ())),
            )
            for run in runs
            if path in run.masks or path in run.fan_in
        ]
        cards.append({"path": path, "pixel": _pixel(path, runs), "runs": shown})
    return render(
        "report/masks.html",
        several=len(runs) > 1,
        shown=cards[:_SHOWN_CARDS],
        folded=cards[_SHOWN_CARDS:],
    )


def _pixel(path: str, runs: Sequence[ReportRun]) -> str:
    """The size of the masks, where known, and what a pixel of them stands for."""
    pixel = "the share kept of a cell of weights"
    for run in runs:
        shape, images = run.record.get(path, {}).get("shape"), run.masks.get(path)
        if shape and images:
            across = (images[-1].height, images[-1].width)
            if tuple(shape) == across:
                pixel = "a weight"
            elif len(shape) == 2:
                cell = "×".join(
                    f"{n // k}" if n % k == 0 else f"about {n / k:.1f}"
                    for n, k in zip(shape, across, strict=True)
                )
                pixel = f"the share kept of {cell} weights"
            return f"{'×'.join(f'{n:,}' for n in shape)}. A pixel is {pixel}."
    return f"A pixel is {pixel}."


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

    centers = (last.edges[:-1] + last.edges[1:]) / 2
    return {
        "mean": (centers * last.counts).sum() / (last.counts.sum() or 1.0),
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


# -- configuration --------------------------------------------------------------------------------


def config_section(runs: Sequence[ReportRun]) -> str:
    """The important settings, where runs differ, the planned weights, and the whole files."""
    bindings = [r.bindings for r in runs]
    names = dict.fromkeys(itertools.chain(*bindings))
    # the folder is the run's own anyway
    differing = [n for n in names if n != "MODEL_DIR" and len({b.get(n) for b in bindings}) > 1]
    important = shown_macros()
    # macros before what they are bound to
    order = {name: i for i, name in enumerate(important)}
    differing.sort(key=lambda n: (order.get(n, len(order)), not n.isupper()))
    return render(
        "report/configuration.html",
        runs=runs,
        differing=differing,
        common=[n for n in important if n in names and n not in differing],
        weights=_weights,
    )


def _weights(run: ReportRun) -> list[tuple[str, ...]]:
    """A row per weight of the run's record."""
    actual, targets = run.actual(), run.targets()
    rows = []
    for path in sorted(run.record, key=natural):
        values = run.record[path]
        shape = values.get("shape", ())
        shares = values.get("sparsity"), targets.get(path), actual.get(path)
        rows.append(
            (
                path,
                "×".join(map(str, shape)),
                f"{math.prod(shape):,}" if shape else "",
                *("" if share is None else f"{share:.2%}" for share in shares),
                str(values.get("pattern", "")).removesuffix("()"),
                values.get("algorithm", ""),
            )
        )
    return rows
