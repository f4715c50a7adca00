"""The page of `t5x-sparsity report`: one HTML file that needs nothing else, and no network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from t5x_sparsity import __version__
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.pages import render
from t5x_sparsity.commands.report import figures, parts
from t5x_sparsity.commands.report.run import ReportRun, smoothed, window


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
    charts = [chart for s in sections for chart in s.charts]
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


class _Section(NamedTuple):
    """A section of the page: its charts, then HTML, then notes."""

    id: str
    title: str
    charts: Sequence[figures.Chart] = ()
    content: str = ""
    notes: Sequence[str] = ()


def _section(
    id: str,
    title: str,
    charts: Iterable[figures.Chart] = (),
    content: str = "",
    notes: Iterable[str] = (),
) -> _Section:
    charts = list(charts)
    # two stand side by side, so the last of an odd number takes both places
    narrow = [i for i, c in enumerate(charts) if not c.is_wide]
    if len(narrow) % 2:
        charts[narrow[-1]] = dataclasses.replace(charts[narrow[-1]], is_wide=True)
    return _Section(id, title, charts, content, [n for n in notes if n])


def _sections(runs: Sequence[ReportRun]) -> Iterator[_Section]:
    notes = [
        _missing(runs, lambda r: r.train_loss, "has no training loss in its events"),
        _missing(runs, lambda r: r.eval_losses, "has no validation loss in its events"),
    ]
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        notes += [f"{name}{remark}" for remark in run.run.remarks]
    yield _section("loss", "Loss", figures.loss_charts(runs), notes=notes)
    sparse = [r for r in runs if r.is_sparse]
    if sparse:
        yield from _sparse_sections(sparse, [r.name for r in runs if not r.is_sparse])
    else:
        text = "No weight was made sparse: there are neither masks nor a sparsity.json to show."
        yield _section("sparsity", "Sparsity", notes=[text])
    yield _section("configuration", "Configuration", content=parts.config_section(runs))


def _sparse_sections(runs: Sequence[ReportRun], dense: Sequence[str]) -> Iterator[_Section]:
    no_target = "has no targets in its events; bars are set against the plan for the run's end"
    yield _section(
        "sparsity",
        "Sparsity",
        figures.sparsity_charts(runs),
        parts.layers_section(runs),
        [
            f"Dense, so not in this part of the page: {', '.join(dense)}." if dense else "",
            _missing(runs, _has("sparsity/total"), "has no sparsity in its events"),
            _missing(runs, _has("sparsity_target/total"), no_target),
        ],
    )
    reasons = "no mask update had happened, or the version that wrote them had none"
    no_churn = f"has no churn in its events: {reasons}"
    only_pruned = "never grew a weight back, so the churn is 0 throughout"
    yield _section(
        "churn",
        "Churn",
        figures.churn_charts(runs),
        notes=[
            _missing(runs, _has("mask_churn/total"), no_churn),
            _missing(runs, lambda r: not _only_prunes(r), only_pruned),
        ],
    )
    no_images = _missing(runs, lambda r: r.run.masks, "has no images of masks in its events")
    yield _section("masks", "Masks", content=parts.masks_section(runs), notes=[no_images])
    no_flops = _missing(runs, _has("flops/training"), "has no FLOPs in its events")
    yield _section("flops", "FLOPs", figures.flops_charts(runs), notes=[no_flops])


def _has(tag: str) -> Callable[[ReportRun], bool]:
    return lambda run: tag in run.run.train


def _only_prunes(run: ReportRun) -> bool:
    churn = run.run.train.get("mask_churn/total")
    return churn is not None and not churn.values.any()


def _missing(runs: Sequence[ReportRun], has: Callable[[ReportRun], Any], what: str) -> str:
    """A note on the runs that lack something, '' where none does."""
    without = [r for r in runs if not has(r)]
    if not without:
        return ""
    return f"{'The run' if len(runs) == 1 else ', '.join(r.name for r in without)} {what}."


def _tiles(run: ReportRun) -> dict[str, tuple[str, str]]:
    """Name -> value and what is written below it."""
    tiles = {}
    numbers = run.key_numbers()
    for task, series in run.eval_losses.items():
        best = numbers["validation"][task]
        more = "" if best["best_loss"] is None else f"best {_loss_text(best['best_loss'])}"
        more += "" if best["best_step"] is None else f" at step {best['best_step']:,}"
        name = "Validation loss" + (f", {task}" if len(run.eval_losses) > 1 else "")
        tiles[name] = _loss_text(series.last), more
    if run.train_loss:
        series = run.train_loss[1]
        points = window(series)
        more = f"mean of about {points} points" if points > 1 else "at the last step"
        tiles["Training loss"] = _loss_text(smoothed(series).last), more
    if numbers["sparsity"] is not None:
        target = numbers["sparsity_target"]
        more = "" if target is None else f"target {target:.2%}"
        tiles["Sparsity"] = f"{numbers['sparsity']:.2%}", more
    for name, key, more in (
        ("Training FLOPs", "flops_training_share", "of dense, so far"),
        ("Inference FLOPs", "flops_inference_share", "of dense"),
    ):
        if numbers[key] is not None:
            tiles[name] = f"{numbers[key]:.1%}", more
    if numbers["churn_mean"] is not None:
        last = numbers["churn"]
        more = "" if last is None else f"last {last:.2%}"
        tiles["Mean churn"] = f"{numbers['churn_mean']:.2%}", more
    if numbers["explored"] is not None:
        tiles["Ever active"] = f"{numbers['explored']:.1%}", "of sparse weights"
    if numbers["weights"] is not None:
        kept = numbers["weights"] if not run.is_sparse else numbers["weights_kept"]
        value = "–" if kept is None else f"{kept:,}"
        tiles["Weights kept"] = value, f"of {numbers['weights']:,}"
    total = numbers["total_steps"]
    tiles["Steps"] = f"{numbers['steps']:,}", "" if total is None else f"of {total:,}"
    return tiles


def _loss_text(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)
