"""The charts of `t5x-sparsity report`, as plotly takes them.

Colours are names such as '@run0', which the page replaces by the colours of its theme.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.artifacts.events import Series
from t5x_sparsity.commands.report.names import block_of, natural, short, trim
from t5x_sparsity.commands.report.run import TOTAL, ReportRun, smoothed, window
from t5x_sparsity.commands.text import evenly_spaced

# The most points of a curve on the page, and the most columns of a heatmap.
MAX_POINTS = 1000
MAX_COLUMNS = 200
# of one height, however many rows there are
_COLORBAR = {"lenmode": "pixels", "len": 200, "y": 1, "yanchor": "top"}
# below this many points, each is marked, and nothing is smoothed
_FEW = 40


class Key(NamedTuple):
    """A line of a chart's legend: what a style of line means.

    Attributes:
      style: 'line', 'dash', 'dot' or 'light'.
      text: what it means.
    """

    style: str
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page.

    Attributes:
      id: of its element.
      title: above it.
      note: below the title, plain text.
      runs: the runs that it has.
      keys: its legend next to the runs' colours; one kind of line needs none.
      data: plotly's traces; `meta` is the index of the run.
      layout: plotly's layout, without what all charts share.
      height: in CSS pixels.
      is_wide: takes the whole width of the page.
    """

    id: str
    title: str
    note: str = ""
    runs: Sequence[ReportRun] = ()
    keys: Sequence[Key] = ()
    data: Sequence[Mapping[str, Any]] = ()
    layout: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    height: int = 300
    is_wide: bool = False


def loss_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Training loss, then validation loss by task."""
    with_loss = [r for r in runs if r.train_loss]
    if with_loss:
        series = [r.train_loss[1] for r in with_loss]
        smooth = any(len(s.steps) > _FEW for s in series)
        points = max(window(s) for s in series)
        yield Chart(
            id="chart-train-loss",
            title="Training loss",
            note=_smoothing(points) if smooth else "Nats a target token.",
            runs=with_loss,
            keys=[Key("line", "smoothed"), Key("light", "as logged")] if smooth else [],
            data=[t for r, s in zip(with_loss, series, strict=True) for t in _loss_lines(r, s)],
            layout=_axes(),
        )
    for i, task in enumerate(sorted({t for r in runs for t in r.eval_losses})):
        found = [r for r in runs if task in r.eval_losses]
        yield Chart(
            id=f"chart-validation-{i}",
            title=f"Validation loss, {task}",
            note="Nats a target token, at each evaluation.",
            runs=found,
            data=[_line(r, r.eval_losses[task], "loss", always_marked=True) for r in found],
            layout=_axes(),
        )


def _smoothing(points: int) -> str:
    return f"Nats a target token; the line is the exponential mean over about {points} points."


def _loss_lines(run: ReportRun, series: Series) -> Iterator[dict[str, Any]]:
    if len(series.steps) > _FEW:
        raw = _line(run, series, "as logged")
        raw |= {"opacity": 0.3, "hoverinfo": "skip", "line": raw["line"] | {"width": 1}}
        yield raw
        series = smoothed(series)
    yield _line(run, series, "loss")


def sparsity_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Actual and target sparsity of all sparse weights together; ITOP's share if tracked."""
    found = [r for r in runs if "sparsity/total" in r.run.train]
    if not found:
        return
    pair = ("sparsity/total", "actual"), ("sparsity_target/total", "target")
    data = _pairs(runs, found, *pair, "dash")
    has_target = len(data) > len(found)
    yield Chart(
        id="chart-sparsity",
        title="Sparsity over the run",
        note="Share of the sparse layers' weights that are zero, all those layers together.",
        runs=found,
        keys=[Key("line", "actual"), Key("dash", "target")] if has_target else [],
        data=data,
        layout=_axes(share=_share_range(data)),
    )
    explored = [r for r in runs if "mask_explored/total" in r.run.train]
    if explored:
        data = [_line(r, r.run.train["mask_explored/total"], "ever active") for r in explored]
        yield Chart(
            id="chart-explored",
            title="Weights ever active",
            note="Share of weights that any mask so far has kept (ITOP).",
            runs=explored,
            data=data,
            layout=_axes(share=_share_range(data)),
        )


def churn_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Churn, grown and dropped in total; churn by layer."""
    found = [r for r in runs if "mask_churn/total" in r.run.train]
    if found:
        data = [_line(r, r.run.train["mask_churn/total"], "churn", shape="hv") for r in found]
        yield Chart(
            id="chart-churn",
            title="Churn of a mask update",
            note="Of the weights then updated, the share of active ones that was replaced.",
            runs=found,
            data=data,
            layout=_axes(share=_share_range(data, from_zero=True)),
        )
    counted = [r for r in runs if "mask_grown/total" in r.run.train]
    if counted:
        pair = ("mask_grown/total", "grown"), ("mask_dropped/total", "dropped")
        data = _pairs(runs, counted, *pair, "dash", shape="hv")
        yield Chart(
            id="chart-grown",
            title="Weights grown and dropped",
            note="Counts at the last mask update.",
            runs=counted,
            keys=[Key("line", "grown"), Key("dash", "dropped")],
            data=data,
            layout=_axes(),
        )
    by_layer = {r.index: _layers_of(r) for r in runs}
    highest = max((np.nanmax(z) for _, _, z in by_layer.values() if z.size), default=0.0)
    for run in runs:
        paths, steps, z = by_layer[run.index]
        if z.size and np.nanmax(z) > 0:
            yield _heatmap(run, paths, steps, z, highest, len(runs) > 1)


def _layers_of(run: ReportRun) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, steps, and churn of shape [paths, steps]; NaN where a mask wasn't updated."""
    series = {p: s for p, s in run.run.group("mask_churn").items() if p != TOTAL}
    paths = sorted(series, key=natural)
    if not paths:
        return [], np.zeros(0), np.zeros((0, 0))
    steps = np.unique(np.concatenate([s.steps for s in series.values()]))
    steps = np.array(evenly_spaced(steps, MAX_COLUMNS))
    z = np.full((len(paths), len(steps)), np.nan)
    for row, path in enumerate(paths):
        finite = np.isfinite(series[path].values)
        # of the steps up to a column's, after the column before, the last counts: weights may be
        # updated at steps of their own
        at = np.searchsorted(steps, series[path].steps[finite])
        z[row, at] = series[path].values[finite]
    # nothing but what isn't finite
    return ([], np.zeros(0), np.zeros((0, 0))) if np.isnan(z).all() else (paths, steps, z)


def _heatmap(run: ReportRun, paths, steps, z, highest: float, named: bool) -> Chart:
    row = 22.0 if len(paths) <= 20 else max(4.5, min(22.0, 560 / len(paths)))
    names = [html.escape(p) for p in paths]
    at, labels = _row_labels(paths, row)
    return Chart(
        id=f"chart-churn-layers-{run.index}",
        title="Churn by layer" + (f", {short(run.name, 32)}" if named else ""),
        note="A row a weight, the first layer on top; the stronger the colour, the more was "
        "replaced; blank where its mask wasn't updated."
        + (" One scale for all runs." if named else ""),
        runs=[run],
        data=[
            {
                "type": "heatmap",
                "meta": run.index,
                "x": steps.tolist(),
                "y": names,
                "z": [[_number(v) for v in r] for r in z],
                "zmin": 0,
                "zmax": max(float(highest), 1e-6),
                "colorscale": "@heat",
                "xgap": 0,
                "ygap": 1 if row > 8 else 0,
                "colorbar": {"tickformat": ".2~%", "thickness": 10, "outlinewidth": 0} | _COLORBAR,
                "hovertemplate": "%{y}<br>step %{x:,}<br>churn %{z:.2%}<extra></extra>",
            }
        ],
        layout={
            "xaxis": {"title": {"text": "step"}, "showgrid": False},
            "yaxis": {
                "autorange": "reversed",
                "type": "category",
                "tickvals": [names[i] for i in at],
                "showgrid": False,
            },
            "hovermode": "closest",
            # the page takes those that fit its width
            "meta": {
                "long": [html.escape(short(n, 40)) for n in labels],
                "short": [html.escape(short(n, 20)) for n in labels],
            },
        },
        height=round(len(paths) * row) + 64,
        is_wide=True,
    )


def _row_labels(paths: Sequence[str], row: float) -> tuple[list[int], list[str]]:
    """Rows that are named, and their names: all that there is room for, or the starts of blocks."""
    if row >= 12:
        return list(range(len(paths))), trim(paths)
    starts = [i for i, p in enumerate(paths) if i == 0 or block_of(p) != block_of(paths[i - 1])]
    at = [starts[0]]
    for i in starts[1:]:
        if (i - at[-1]) * row >= 12:
            at.append(i)
    return at, [block_of(paths[i]) for i in at]


def flops_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """FLOPs so far against dense, their shares, and the loss they buy."""
    found = [r for r in runs if "flops/training" in r.run.train]
    if found:
        pair = ("flops/training", "spent"), ("flops/training_dense", "dense")
        data = _pairs(runs, found, *pair, "dot")
        yield Chart(
            id="chart-flops",
            title="Training FLOPs so far",
            note="Of matrix products, were zeros skipped; dense is the same run without masks.",
            runs=found,
            keys=[Key("line", "this run"), Key("dot", "dense")],
            data=data,
            layout=_axes(tickformat="~s", hover=".4s"),
        )
    shared = [r for r in runs if "flops/training_share" in r.run.train]
    if shared:
        pair = ("flops/training_share", "training so far"), ("flops/inference_share", "inference")
        data = _pairs(runs, shared, *pair, "dash")
        yield Chart(
            id="chart-flops-share",
            title="FLOPs as a share of dense",
            note="Training so far in the run, and inference with the masks of that step.",
            runs=shared,
            keys=[Key("line", "training so far"), Key("dash", "inference")],
            data=data,
            layout=_axes(share=_share_range(data, from_zero=True)),
        )
    # for one run it would repeat the validation loss
    tasks = sorted({t for r in found for t in r.eval_losses}) if len(found) > 1 else ()
    for i, task in enumerate(tasks):
        lines = [(r, _by_flops(r, r.eval_losses[task])) for r in found if task in r.eval_losses]
        lines = [(r, line) for r, line in lines if line is not None]
        if lines:
            yield Chart(
                id=f"chart-loss-flops-{i}",
                title=f"Validation loss by FLOPs, {task}",
                note="At each evaluation; lower and further left is better.",
                runs=[r for r, _ in lines],
                data=[line for _, line in lines],
                layout=_axes(x="training FLOPs so far", x_format="~s"),
            )


def _by_flops(run: ReportRun, loss: Series) -> dict[str, Any] | None:
    """The loss at the FLOPs of its step, between those that were logged."""
    flops = run.run.train["flops/training"]
    inside = (loss.steps >= flops.steps[0]) & (loss.steps <= flops.steps[-1])
    if not inside.any():
        return None
    line = _line(run, Series(loss.steps[inside], loss.values[inside]), "loss", always_marked=True)
    line["x"] = [_number(v) for v in np.interp(line["x"], flops.steps, flops.values)]
    return line


# -- parts ----------------------------------------------------------------------------------------


def _line(
    run: ReportRun,
    series: Series,
    what: str,
    *,
    shape: str = "linear",
    always_marked: bool = False,
) -> dict[str, Any]:
    thin = thinned(series)
    marked = len(thin.steps) <= _FEW or (always_marked and len(thin.steps) <= 120)
    color = f"@run{run.index}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if marked else "lines",
        "name": f"{html.escape(short(run.name, 28))} {what}",
        "meta": run.index,
        "x": thin.steps.tolist(),
        "y": [_number(v) for v in thin.values],
        "line": {"color": color, "width": 2, "shape": shape},
        "marker": {"size": 5, "color": color},
    }


def _pairs(
    runs: Sequence[ReportRun],
    found: Sequence[ReportRun],
    first: tuple[str, str],
    second: tuple[str, str],
    dash: str,
    **line: Any,
) -> list[dict[str, Any]]:
    """One line per run found, and a second where it has one: (tag, name) of both."""
    data = []
    for run in found:
        data.append(_line(run, run.run.train[first[0]], first[1], **line))
        series = run.run.train.get(second[0])
        if series is not None:
            data.append(_second(runs, run, series, second[1], dash, **line))
    return data


def _second(runs, run: ReportRun, series: Series, what: str, dash: str, shape: str = "linear"):
    """A line to compare a run's line with; it shows where one lies on the other."""
    line = _line(run, series, what, shape=shape)
    color = line["line"]["color"] if len(runs) > 1 else "@ink"
    style = {"color": color, "width": 1.5, "dash": dash, "shape": shape}
    return line | {"mode": "lines", "line": style}


def _axes(
    *,
    x: str = "step",
    x_format: str | None = None,
    tickformat: str | None = None,
    hover: str = ",.5~g",
    share: tuple[float, float] | None = None,
) -> dict[str, Any]:
    yaxis: dict[str, Any] = {"hoverformat": hover}
    if tickformat:
        yaxis["tickformat"] = tickformat
    if share:
        span = share[1] - share[0]
        digits = 0 if span > 0.08 else 1 if span > 0.008 else 2
        yaxis |= {"range": list(share), "tickformat": f".{digits}%", "hoverformat": ".2%"}
    xaxis: dict[str, Any] = {"title": {"text": x}, "hoverformat": ",.4~s" if x_format else ","}
    if x_format:
        xaxis["tickformat"] = x_format
    return {"xaxis": xaxis, "yaxis": yaxis}


def _share_range(data: Sequence[Mapping[str, Any]], *, from_zero: bool = False):
    """A range of [0, 1] that shows all values with some room, however near each other they are."""
    values = [v for trace in data for v in trace["y"] if v is not None]
    if not values:
        return (0.0, 1.0)
    low, high = (0.0 if from_zero else min(values)), max(values)
    room = max(0.08 * (high - low), 0.002)
    # a curve at an end of the scale stays visible if the scale goes on a little
    return (
        (max(low - room, -0.01), min(high + room, 1.01))
        if high - low > 0.02
        else (
            max(low - 0.02, -0.01),
            min(high + 0.02, 1.01),
        )
    )


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: the lowest and the highest of each of limit / 2 stretches.

    What isn't finite stays where a stretch has nothing else. No spike is lost.
    """
    n = len(series.steps)
    if n <= limit:
        return series
    chosen = set()
    for part in np.array_split(np.arange(n), limit // 2):
        values = series.values[part]
        if np.isfinite(values).any():
            chosen |= {part[np.argmin(np.where(np.isfinite(values), values, np.inf))]}
            chosen |= {part[np.argmax(np.where(np.isfinite(values), values, -np.inf))]}
        else:
            chosen |= {part[0]}
    # the last value is what the reader looks for
    index = np.array(sorted({*sorted(chosen)[: limit - 1], n - 1}))
    return Series(series.steps[index], series.values[index])


def _number(value: float) -> float | None:
    """For JSON, which has no NaN; six digits are more than a chart can show."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
