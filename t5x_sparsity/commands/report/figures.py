"""The charts of `t5x-sparsity report`, as plotly takes them.

Colours are names such as '@run0', which the page replaces by the colours of its theme.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5x_sparsity.artifacts.events import Series
from t5x_sparsity.commands.report.names import block_of, natural, short, trim
from t5x_sparsity.commands.report.run import TOTAL, ReportRun, smoothed, window
from t5x_sparsity.commands.text import evenly_spaced

# The most points of a curve on the page, and the most columns of a heatmap.
MAX_POINTS = 1000
MAX_COLUMNS = 200
# its height doesn't depend on the number of rows
_COLORBAR = {"lenmode": "pixels", "len": 200, "y": 1, "yanchor": "top"}
# axes; formats are those of d3
_STEPS = {"title": {"text": "step"}, "hoverformat": ","}
_FLOPS_SO_FAR = {
    "title": {"text": "training FLOPs so far"},
    "hoverformat": ",.4~s",
    "tickformat": "~s",
}
_FLOPS = {"hoverformat": ".4s", "tickformat": "~s"}
_NUMBERS = {"hoverformat": ",.5~g"}
_OVER_STEPS = {"xaxis": _STEPS, "yaxis": _NUMBERS}
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
      runs: that it shows.
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
        mean = f"; the line is the exponential mean over about {max(map(window, series))} points"
        yield Chart(
            id="chart-train-loss",
            title="Training loss",
            note=f"Nats a target token{mean if smooth else ''}.",
            runs=with_loss,
            keys=[Key("line", "smoothed"), Key("light", "as logged")] if smooth else [],
            data=[t for r, s in zip(with_loss, series, strict=True) for t in _loss_lines(r, s)],
            layout=_OVER_STEPS,
        )
    for i, task in enumerate(_tasks(runs)):
        found = [r for r in runs if task in r.eval_losses]
        yield Chart(
            id=f"chart-validation-{i}",
            title=f"Validation loss, {task}",
            note="Nats a target token, at each evaluation.",
            runs=found,
            data=[_line(r, r.eval_losses[task], "loss", always_marked=True) for r in found],
            layout=_OVER_STEPS,
        )


def _tasks(runs: Sequence[ReportRun]) -> list[str]:
    return sorted({task for run in runs for task in run.eval_losses})


def _loss_lines(run: ReportRun, series: Series) -> Iterator[dict[str, Any]]:
    if len(series.steps) > _FEW:
        raw = _line(run, series, "as logged")
        raw |= {"opacity": 0.3, "hoverinfo": "skip", "line": raw["line"] | {"width": 1}}
        yield raw
        series = smoothed(series)
    yield _line(run, series, "loss")


def sparsity_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Actual and target sparsity of all sparse weights together; ITOP's share if tracked."""
    yield from _series_chart(
        runs,
        ("sparsity/total", "actual"),
        ("sparsity_target/total", "target"),
        id="chart-sparsity",
        title="Sparsity over the run",
        note="Share of the sparse layers' weights that are zero, all those layers together.",
        axis=_shares,
    )
    yield from _series_chart(
        runs,
        ("mask_explored/total", "ever active"),
        id="chart-explored",
        title="Weights ever active",
        note="Share of weights that any mask so far has kept (ITOP).",
        axis=_shares,
    )


def churn_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Churn, grown and dropped in total; churn by layer."""
    yield from _series_chart(
        runs,
        ("mask_churn/total", "churn"),
        id="chart-churn",
        title="Churn of a mask update",
        note="Of the weights then updated, the share of active ones that was replaced.",
        axis=_shares_from_zero,
        shape="hv",
    )
    yield from _series_chart(
        runs,
        ("mask_grown/total", "grown"),
        ("mask_dropped/total", "dropped"),
        id="chart-grown",
        title="Weights grown and dropped",
        note="Counts at the last mask update.",
        axis=lambda data: _NUMBERS,
        shape="hv",
    )
    by_layer = [(run, layers) for run in runs if (layers := _churn_by_layer(run))]
    highest = max((np.nanmax(churn) for _, (_, _, churn) in by_layer), default=0.0)
    for run, (paths, steps, churn) in by_layer:
        if np.nanmax(churn) > 0:
            yield _heatmap(run, paths, steps, churn, highest, len(runs) > 1)


def _churn_by_layer(run: ReportRun) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """Paths, steps, and churn of shape [paths, steps], NaN where a mask wasn't updated.

    None where nothing is finite.
    """
    series = {p: s for p, s in run.run.group("mask_churn").items() if p != TOTAL}
    paths = sorted(series, key=natural)
    if not paths:
        return None
    steps = np.unique(np.concatenate([s.steps for s in series.values()]))
    steps = np.array(evenly_spaced(steps, MAX_COLUMNS))
    churn = np.full((len(paths), len(steps)), np.nan)
    for row, path in enumerate(paths):
        finite = np.isfinite(series[path].values)
        # a column stands for the steps after the one before it, and shows the last of them: weights
        # may be updated at steps of their own
        at = np.searchsorted(steps, series[path].steps[finite])
        churn[row, at] = series[path].values[finite]
    return None if np.isnan(churn).all() else (paths, steps, churn)


def _heatmap(run: ReportRun, paths, steps, churn, highest: float, named: bool) -> Chart:
    row_height = 22.0 if len(paths) <= 20 else max(4.5, min(22.0, 560 / len(paths)))
    names = [html.escape(p) for p in paths]
    at, labels = _row_labels(paths, row_height)
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
                "z": [[_number(v) for v in row] for row in churn],
                "zmin": 0,
                "zmax": max(float(highest), 1e-6),
                "colorscale": "@heat",
                "xgap": 0,
                "ygap": 1 if row_height > 8 else 0,
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
        height=round(len(paths) * row_height) + 64,
        is_wide=True,
    )


def _row_labels(paths: Sequence[str], row_height: float) -> tuple[list[int], list[str]]:
    """Rows that are named, and their names: all that there is room for, or the starts of blocks."""
    if row_height >= 12:
        return list(range(len(paths))), trim(paths)
    starts = [i for i, p in enumerate(paths) if i == 0 or block_of(p) != block_of(paths[i - 1])]
    at = [starts[0]]
    for i in starts[1:]:
        if (i - at[-1]) * row_height >= 12:
            at.append(i)
    return at, [block_of(paths[i]) for i in at]


def flops_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """FLOPs so far against dense, their shares, and the loss they buy."""
    yield from _series_chart(
        runs,
        ("flops/training", "spent"),
        ("flops/training_dense", "dense"),
        id="chart-flops",
        title="Training FLOPs so far",
        note="Of matrix products, were zeros skipped; dense is the same run without masks.",
        keys=[Key("line", "this run"), Key("dot", "dense")],
        axis=lambda data: _FLOPS,
    )
    yield from _series_chart(
        runs,
        ("flops/training_share", "training so far"),
        ("flops/inference_share", "inference"),
        id="chart-flops-share",
        title="FLOPs as a share of dense",
        note="Training so far in the run, and inference with the masks of that step.",
        axis=_shares_from_zero,
    )
    found = [r for r in runs if "flops/training" in r.run.train]
    # for one run it would repeat the validation loss
    for i, task in enumerate(_tasks(found) if len(found) > 1 else ()):
        lines = [(r, _by_flops(r, r.eval_losses[task])) for r in found if task in r.eval_losses]
        lines = [(r, line) for r, line in lines if line is not None]
        if lines:
            yield Chart(
                id=f"chart-loss-flops-{i}",
                title=f"Validation loss by FLOPs, {task}",
                note="At each evaluation; lower and further left is better.",
                runs=[r for r, _ in lines],
                data=[line for _, line in lines],
                layout={"xaxis": _FLOPS_SO_FAR, "yaxis": _NUMBERS},
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


def _series_chart(
    runs: Sequence[ReportRun],
    first: tuple[str, str],
    second: tuple[str, str] | None = None,
    *,
    axis: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    keys: Sequence[Key] = (),
    shape: str = "linear",
    **chart: Any,
) -> Iterator[Chart]:
    """The chart of a series of training, and of a second to compare it with: (tag, name) of each.

    There is none where no run has the first. `axis` makes the vertical axis from the traces; `keys`
    are needed where they aren't the names.
    """
    found = [r for r in runs if first[0] in r.run.train]
    if not found:
        return
    if second and not keys:
        keys = [Key("line", first[1]), Key("dash", second[1])]
    data = []
    for run in found:
        data.append(_line(run, run.run.train[first[0]], first[1], shape=shape))
        if second and second[0] in run.run.train:
            # another style, since one line may lie on the other
            line = _line(run, run.run.train[second[0]], second[1], shape=shape)
            color = line["line"]["color"] if len(runs) > 1 else "@ink"
            style = {"color": color, "width": 1.5, "dash": keys[1].style, "shape": shape}
            data.append(line | {"mode": "lines", "line": style})
    keys = keys if len(data) > len(found) else ()
    yield Chart(
        runs=found, keys=keys, data=data, layout={"xaxis": _STEPS, "yaxis": axis(data)}, **chart
    )


def _shares(data: Sequence[Mapping[str, Any]], *, from_zero: bool = False) -> dict[str, Any]:
    """An axis of shares, over the part of [0, 1] that shows all values with some room."""
    values = [v for trace in data for v in trace["y"] if v is not None]
    low, high = 0.0, 1.0
    if values:
        least, most = (0.0 if from_zero else min(values)), max(values)
        room = max(0.08 * (most - least), 0.002) if most - least > 0.02 else 0.02
        # a curve at an end of the scale stays visible if the scale goes on a little
        low, high = max(least - room, -0.01), min(most + room, 1.01)
    digits = 0 if high - low > 0.08 else 1 if high - low > 0.008 else 2
    return {"hoverformat": ".2%", "tickformat": f".{digits}%", "range": [low, high]}


_shares_from_zero = functools.partial(_shares, from_zero=True)


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: the lowest and the highest of each of limit / 2 stretches.

    A stretch without any finite value keeps its first. No spike is lost.
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
