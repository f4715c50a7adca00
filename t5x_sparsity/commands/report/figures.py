"""The charts of `t5x-sparsity report`, as plotly takes them.

Colours are names such as '@run0', which the page replaces by the colours of its theme.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_sparsity.artifacts.events import Series
from t5x_sparsity.commands.report.run import TOTAL, ReportRun, smoothed, window
from t5x_sparsity.commands.text import block_of, evenly_spaced, natural, short, trim

# The most points of a curve on the page, and the most columns of a heatmap.
MAX_POINTS = 1000
MAX_COLUMNS = 200
# axes; formats are those of d3
_STEPS = {"title": {"text": "step"}, "hoverformat": ","}
_FLOPS_SO_FAR = {
    "title": {"text": "training FLOPs so far"},
    "hoverformat": ",.4~s",
    "tickformat": "~s",
}
_FLOPS = {"hoverformat": ".4s", "tickformat": "~s"}
_NUMBERS = {"hoverformat": ",.5~g"}
# below this many points, each is marked, and nothing is smoothed
_FEW = 40


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart of the page."""

    id: str  # of its element
    title: str
    note: str  # below the title, plain text
    # what a line that is 'line', 'dash', 'dot' or 'light' means, where there are several kinds
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    data: Sequence[Mapping[str, Any]]  # plotly's traces; `meta` is the index of the run
    # plotly's, without what all charts share
    layout: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"xaxis": _STEPS, "yaxis": _NUMBERS}
    )
    height: int = 300  # in CSS pixels
    is_wide: bool = False  # takes the whole width of the page

    @property
    def runs(self) -> set[int]:
        """The indices of the runs that it shows."""
        return {trace["meta"] for trace in self.data}


def loss_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Training loss, then validation loss by task."""
    losses = [r.train_loss for r in runs if r.train_loss]
    if losses:
        smooth = any(len(loss.steps) > _FEW for loss in losses)
        points = max(map(window, losses))
        mean = f"; the line is the exponential mean over about {points} points" if smooth else ""
        yield Chart(
            id="chart-train-loss",
            title="Training loss",
            note=f"Nats a target token{mean}.",
            keys={"line": "smoothed", "light": "as logged"} if smooth else {},
            data=[line for r in runs if r.train_loss for line in _loss_lines(r, r.train_loss)],
        )
    for i, task in enumerate(_tasks(runs)):
        yield Chart(
            id=f"chart-validation-{i}",
            title=f"Validation loss, {task}",
            note="Nats a target token, at each evaluation.",
            data=[_eval_line(r, r.eval_losses[task]) for r in runs if task in r.eval_losses],
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
        {"sparsity/total": "actual", "sparsity_target/total": "target"},
        id="chart-sparsity",
        title="Sparsity over the run",
        note="Share of the sparse layers' weights that are zero, all those layers together.",
    )
    yield from _series_chart(
        runs,
        {"mask_explored/total": "ever active"},
        id="chart-explored",
        title="Weights ever active",
        note="Share of weights that any mask so far has kept (ITOP).",
    )


def churn_charts(runs: Sequence[ReportRun]) -> Iterator[Chart]:
    """Churn, grown and dropped in total; churn by layer."""
    yield from _series_chart(
        runs,
        {"mask_churn/total": "churn"},
        from_zero=True,
        shape="hv",
        id="chart-churn",
        title="Churn of a mask update",
        note="Of the weights then updated, the share of active ones that was replaced.",
    )
    yield from _series_chart(
        runs,
        {"mask_grown/total": "grown", "mask_dropped/total": "dropped"},
        axis=_NUMBERS,
        shape="hv",
        id="chart-grown",
        title="Weights grown and dropped",
        note="Counts at the last mask update.",
    )
    by_layer = [(run, *_churn_by_layer(run)) for run in runs]
    highest = max((np.nanmax(churn) for *_, churn in by_layer if (churn > 0).any()), default=0.0)
    for run, paths, steps, churn in by_layer:
        if (churn > 0).any():
            yield _heatmap(run, paths, steps, churn, float(highest), len(runs) > 1)


def _churn_by_layer(run: ReportRun) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, steps, and churn of shape [paths, steps], NaN where a mask wasn't updated."""
    series = {p: s for p, s in run.group("mask_churn").items() if p != TOTAL}
    paths = sorted(series, key=natural)
    steps = np.unique(np.concatenate([[], *(s.steps for s in series.values())]).astype(int))
    steps = np.array(evenly_spaced(steps, MAX_COLUMNS))
    churn = np.full((len(paths), len(steps)), np.nan)
    for row, path in enumerate(paths):
        finite = np.isfinite(series[path].values)
        # a column stands for the steps after the one before it, and shows the last of them: weights
        # may be updated at steps of their own
        at = np.searchsorted(steps, series[path].steps[finite])
        churn[row, at] = series[path].values[finite]
    return paths, steps, churn


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
        data=[
            {
                "type": "heatmap",
                "meta": run.index,
                "x": steps.tolist(),
                "y": names,
                "z": [[_number(v) for v in row] for row in churn],
                "zmin": 0,
                "zmax": max(highest, 1e-6),
                "colorscale": "@heat",
                "xgap": 0,
                "ygap": 1 if row_height > 8 else 0,
                # its height doesn't depend on the number of rows
                "colorbar": {"tickformat": ".2~%", "thickness": 10, "outlinewidth": 0}
                | {"lenmode": "pixels", "len": 200, "y": 1, "yanchor": "top"},
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
        {"flops/training": "spent", "flops/training_dense": "dense"},
        keys={"line": "this run", "dot": "dense"},
        axis=_FLOPS,
        id="chart-flops",
        title="Training FLOPs so far",
        note="Of matrix products, were zeros skipped; dense is the same run without masks.",
    )
    yield from _series_chart(
        runs,
        {"flops/training_share": "training so far", "flops/inference_share": "inference"},
        from_zero=True,
        id="chart-flops-share",
        title="FLOPs as a share of dense",
        note="Training so far in the run, and inference with the masks of that step.",
    )
    found = [r for r in runs if "flops/training" in r.train]
    # for one run it would repeat the validation loss
    for i, task in enumerate(_tasks(found) if len(found) > 1 else ()):
        lines = [_by_flops(r, r.eval_losses[task]) for r in found if task in r.eval_losses]
        if any(lines):
            yield Chart(
                id=f"chart-loss-flops-{i}",
                title=f"Validation loss by FLOPs, {task}",
                note="At each evaluation; lower and further left is better.",
                data=[line for line in lines if line],
                layout={"xaxis": _FLOPS_SO_FAR, "yaxis": _NUMBERS},
            )


def _by_flops(run: ReportRun, loss: Series) -> dict[str, Any] | None:
    """The loss at the FLOPs of its step, between those that were logged."""
    flops = run.train["flops/training"]
    inside = (loss.steps >= flops.steps[0]) & (loss.steps <= flops.steps[-1])
    if not inside.any():
        return None
    line = _eval_line(run, Series(loss.steps[inside], loss.values[inside]))
    line["x"] = [_number(v) for v in np.interp(line["x"], flops.steps, flops.values)]
    return line


# -- parts ----------------------------------------------------------------------------------------


def _eval_line(run: ReportRun, loss: Series) -> dict[str, Any]:
    return _line(run, loss, "loss", most_marked=120)


def _line(
    run: ReportRun, series: Series, what: str, shape: str = "linear", most_marked: int = _FEW
) -> dict[str, Any]:
    thin = thinned(series)
    marked = len(thin.steps) <= most_marked
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
    names: Mapping[str, str],
    *,
    keys: Mapping[str, str] | None = None,
    axis: Mapping[str, Any] | None = None,
    from_zero: bool = False,
    shape: str = "linear",
    **chart: Any,
) -> Iterator[Chart]:
    """The chart of a series of training, and of one to compare it with: tag -> name of each.

    There is none where no run has the first. `keys` are needed where they aren't the names. The
    vertical axis has shares by default, `from_zero` or not.
    """
    first = next(iter(names))
    found = [r for r in runs if first in r.train]
    keys = keys or dict(zip(("line", "dash"), names.values(), strict=False))
    data = []
    for run in found:
        for tag, name in names.items():
            if tag not in run.train:
                continue
            line = _line(run, run.train[tag], name, shape)
            if tag != first:
                # another style, since one line may lie on the other
                line["mode"] = "lines"
                line["line"] |= {"width": 1.5, "dash": list(keys)[1]}
                line["line"] |= {} if len(runs) > 1 else {"color": "@ink"}
            data.append(line)
    if found:
        keys = keys if len(data) > len(found) else {}
        layout = {"xaxis": _STEPS, "yaxis": axis or _shares(data, from_zero)}
        yield Chart(keys=keys, data=data, layout=layout, **chart)


def _shares(data: Sequence[Mapping[str, Any]], from_zero: bool) -> dict[str, Any]:
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


def thinned(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: the lowest and the highest of each of limit / 2 stretches.

    A stretch without any finite value keeps its first. No spike is lost.
    """
    n = len(series.steps)
    if n <= limit:
        return series
    chosen = set()
    for part in np.array_split(np.arange(n), limit // 2):
        finite = part[np.isfinite(series.values[part])]
        if len(finite):
            values = series.values[finite]
            chosen |= {finite[np.argmin(values)], finite[np.argmax(values)]}
        else:
            chosen.add(part[0])
    # the last value is what the reader looks for
    index = np.array(sorted({*sorted(chosen)[: limit - 1], n - 1}))
    return Series(series.steps[index], series.values[index])


def _number(value: float) -> float | None:
    """For JSON, which has no NaN; six digits are more than a chart can show."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
