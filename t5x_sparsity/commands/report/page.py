"""The page of `t5x-sparsity report`: one HTML file that needs nothing else, and no network."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from t5x_sparsity import __version__
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.report import figures, parts
from t5x_sparsity.commands.report.parts import chip, escape
from t5x_sparsity.commands.report.run import ReportRun, smoothed, window

# what tells a page of ours from any other file

# what the page may load: nothing that isn't in it
_POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
_KEYS = {"line": "", "dash": "5 3", "dot": "1.5 2.5", "light": ""}


def make_page(runs: Sequence[ReportRun]) -> str:
    """The whole page.

    Args:
      runs: at least one, in the order and with the indices that they are to be shown in.
    """
    charts: list[figures.Chart] = []
    sections = [
        *_loss(runs, charts),
        *_sparse_sections(runs, charts),
        _section("configuration", "Configuration", parts.config_section(runs)),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    nav = "".join(f'<a href="#{i}">{escape(t)}</a>' for i, t, _ in sections)
    body = "\n".join(text for _, _, text in sections)
    data = [{"id": c.id, "data": c.data, "layout": c.layout} for c in charts]
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            generator("report"),
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{_resource('page.css')}</style></head>",
            f'<body><header class="top"><h1>{escape(title)}</h1><nav>{nav}</nav></header>',
            _run_bar(runs) if len(runs) > 1 else "",
            f"<main>{''.join(_panel(r, runs) for r in runs)}",
            body,
            "</main>",
            f"<footer>Made by t5x-sparsity {escape(__version__)}. Curves have at most "
            f"{figures.MAX_POINTS:,} points, the lowest and the highest of each stretch; heatmaps "
            f"at most {figures.MAX_COLUMNS} steps.</footer>",
            '<dialog id="zoom"><img alt=""><p></p></dialog>',
            f'<script type="application/json" id="charts">{_script_json(data)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_resource('page.js')}</script>",
            "</body></html>",
        )
    )


def _resource(name: str) -> str:
    return (
        importlib.resources.files("t5x_sparsity.commands.report").joinpath(name).read_text("utf-8")
    )


def _script_json(data: Any) -> str:
    """JSON that can't end the element that it is in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# -- sections -------------------------------------------------------------------------------------

# id, title, HTML
_Section = tuple[str, str, str]


def _section(name: str, title: str, content: str, lead: str = "") -> _Section:
    lead = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return name, title, f'<section id="{name}"><h2>{escape(title)}</h2>{lead}{content}</section>'


def _loss(runs: Sequence[ReportRun], charts: list[figures.Chart]) -> Iterable[_Section]:
    notes = [
        _missing(runs, lambda r: r.train_loss, "has no training loss in its events"),
        _missing(runs, lambda r: r.eval_losses, "has no validation loss in its events"),
    ]
    for run in runs:
        notes += [f"{_of(run, runs)}{remark}" for remark in run.run.remarks]
    yield _section("loss", "Loss", _charts(figures.loss_charts(runs), charts, runs) + _notes(notes))


def _sparse_sections(runs: Sequence[ReportRun], charts: list[figures.Chart]) -> Iterable[_Section]:
    dense = [r for r in runs if not r.is_sparse]
    runs = [r for r in runs if r.is_sparse]
    if not runs:
        text = "No weight was made sparse: there are neither masks nor a sparsity.json to show."
        yield _section("sparsity", "Sparsity", _notes([text]))
        return
    named = ", ".join(r.name for r in dense)
    notes = [f"Dense, so not in this part of the page: {named}."] if dense else []
    has = _has
    no_target = "has no targets in its events; bars are set against the plan for the run's end"
    yield _section(
        "sparsity",
        "Sparsity",
        _charts(figures.sparsity_charts(runs), charts, runs)
        + parts.layers_section(runs)
        + _notes(
            [
                *notes,
                _missing(runs, has("sparsity/total"), "has no sparsity in its events"),
                _missing(runs, has("sparsity_target/total"), no_target),
            ]
        ),
    )
    reasons = "no mask update had happened, or the version that wrote them had none"
    no_churn = f"has no churn in its events: {reasons}"
    only_pruned = "never grew a weight back, so the churn is 0 throughout"
    yield _section(
        "churn",
        "Churn",
        _charts(figures.churn_charts(runs), charts, runs)
        + _notes(
            [
                _missing(runs, has("mask_churn/total"), no_churn),
                _missing(runs, lambda r: not _only_prunes(r), only_pruned),
            ]
        ),
    )
    yield _section(
        "masks",
        "Masks",
        parts.masks_section(runs)
        + _notes([_missing(runs, lambda r: r.run.masks, "has no images of masks in its events")]),
    )
    yield _section(
        "flops",
        "FLOPs",
        _charts(figures.flops_charts(runs), charts, runs)
        + _notes([_missing(runs, has("flops/training"), "has no FLOPs in its events")]),
    )


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


def _of(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(n)}</li>" for n in notes if n)
    return f'<ul class="notes">{items}</ul>' if items else ""


# -- charts ---------------------------------------------------------------------------------------


def _charts(
    made: Iterable[figures.Chart], charts: list[figures.Chart], runs: Sequence[ReportRun]
) -> str:
    """Adds charts to those that the page draws; where they go."""
    made = list(made)
    # two stand side by side, so one that is left over takes both places
    narrow = [i for i, c in enumerate(made) if not c.is_wide]
    if len(narrow) % 2:
        made[narrow[-1]] = dataclasses.replace(made[narrow[-1]], is_wide=True)
    charts += made
    return f'<div class="grid">{"".join(_chart(c, runs) for c in made)}</div>' if made else ""


def _chart(chart: figures.Chart, runs: Sequence[ReportRun]) -> str:
    chips = ""
    if len(runs) > 1 and "heatmap" not in chart.data[0]["type"]:
        chips = "".join(f'<li data-run="{r.index}">{chip(r)}</li>' for r in chart.runs)
    keys = "".join(f"<li>{_key(k)}</li>" for k in chart.keys)
    legend = f'<ul class="legend">{chips}{keys}</ul>' if chips or keys else ""
    of_run = f' data-run="{chart.runs[0].index}"' if len(chart.runs) == 1 < len(runs) else ""
    return (
        f'<figure class="card chart{" wide" if chart.is_wide else ""}"{of_run}><figcaption>'
        f"<h3>{escape(chart.title)}</h3><p>{escape(chart.note)}</p></figcaption>{legend}"
        f'<div class="plot" id="{chart.id}" style="height:{chart.height}px" role="img" '
        f'aria-label="{escape(chart.title)}"></div></figure>'
    )


def _key(key: figures.Key) -> str:
    return (
        f'<svg class="key {key.style}" width="24" height="8" aria-hidden="true"><line x1="1" '
        f'x2="23" y1="4" y2="4" stroke-dasharray="{_KEYS[key.style]}"/></svg>{escape(key.text)}'
    )


# -- the head -------------------------------------------------------------------------------------


def _run_bar(runs: Sequence[ReportRun]) -> str:
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-toggle="{r.index}">{chip(r)}</button>'
        for r in runs
    )
    return f'<div class="runs" role="group" aria-label="Runs to show">{buttons}</div>'


def _panel(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    # the same tiles for all runs, so that they stand below each other
    names = dict.fromkeys(name for r in runs for name in _tiles(r))
    shown = _tiles(run)
    tiles = "".join(_tile(name, *shown.get(name, ("–", ""))) for name in names)
    heading = f'<h2><span class="chip run{run.index}"></span>{escape(run.name)}</h2>'
    heading = heading if len(runs) > 1 else ""
    return (
        f'<div class="panel card" data-run="{run.index}">{heading}<p class="what">'
        f'{escape(_described(run))}</p><p class="path">{escape(run.run.folder)}</p>'
        f'<dl class="tiles">{tiles}</dl></div>'
    )


def _described(run: ReportRun) -> str:
    if not run.is_sparse:
        return "Dense: no weight was made sparse"
    level = ""
    if run.record:
        level = sum(run.size(p) * v.get("sparsity", 0) for p, v in run.record.items())
        level = f"{round(100 * level / max(run.sparse_weights, 1), 2):g}% sparse"
        level += f", {run.distribution}" if run.distribution else ""
    found = [" + ".join(run.methods) or "Sparse", level, " + ".join(run.patterns)]
    return " · ".join(part for part in found if part)


def _tiles(run: ReportRun) -> dict[str, tuple[str, str]]:
    """Name -> value and what stands below it."""
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


def _tile(name: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
    )
