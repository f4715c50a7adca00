"""The page of plots of `t5x-sparsity fit-scaling`: one HTML file that needs no other."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from t5x_sparsity.commands.fit_scaling.report import FORMULA, Report
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.pages import render
from t5x_sparsity.commands.text import evenly_spaced
from t5x_sparsity.scaling.law import COEFFICIENTS, distinct
from t5x_sparsity.scaling.optimum import optimum, training_flops

_PANELS, _CURVES, _PAIRS = 3, 6, 4
_POINTS = 40
_BLUE, _RED, _GREY = "#2563a8", "#c2410c", "#6b7280"


def page(report: Report) -> str:
    """The whole page, as HTML."""
    return render(
        "fit_scaling/page.html",
        report=report,
        formula=FORMULA,
        generator=generator("fit-scaling"),
        by_sparsity=_by_sparsity(report),
        errors=[_predicted(report), _residuals(report)],
        contours=[_contours(report)] if report.optima else [],
        histograms=[_histogram(report, n) for n in COEFFICIENTS] if report.bootstrap else [],
        pairs=[_pair(report, *pair) for pair in list(report.ties)[:_PAIRS]],
        script_json=_script_json,
    )


def _script_json(figure: go.Figure) -> str:
    """A figure as JSON that can't end the script that it is in."""
    return figure.to_json().replace("<", "\\u003c")


def _figure(title: str, x: str, y: str, *, height: int = 380, **layout) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}, "x": 0.02},
        height=height,
        margin={"l": 56, "r": 16, "t": 44, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12},
        xaxis_title=x,
        yaxis_title=y,
        **layout,
    )
    figure.update_xaxes(exponentformat="e")
    figure.update_yaxes(exponentformat="e")
    return figure


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the level nearest to each value, by ratio."""
    return np.abs(np.log(values)[:, None] - np.log(levels)).argmin(1)


def _by_sparsity(report: Report) -> list[go.Figure]:
    t, law = report.source.table, report.fit.law
    tokens = np.array(evenly_spaced(distinct(t.tokens), _PANELS))
    sizes = np.array(evenly_spaced(distinct(t.nonzero), _CURVES))
    colors = sample_colorscale("Viridis", np.linspace(0, 0.85, len(sizes)))
    panel, curve = _nearest(t.tokens, tokens), _nearest(t.nonzero, sizes)
    moved = law.loss(t.sparsity, sizes[curve], tokens[panel]) / np.exp(report.fit.residuals)
    s = np.linspace(0, t.sparsity.max(), 100)
    figures = []
    for i, d in enumerate(tokens):
        figure = _figure(
            f"{d:.3g} tokens",
            "sparsity",
            "loss, nats a token",
            legend={"orientation": "h", "y": -0.22},
            height=440,
        )
        figure.update_yaxes(range=[moved.min() * 0.97, moved.max() * 1.03])
        for j, n in enumerate(sizes):
            name = f"{n:.3g}"
            line = {"color": colors[j], "width": 2}
            figure.add_scatter(
                x=s, y=law.loss(s, n, d), mode="lines", line=line, name=name, legendgroup=name
            )
            here = (panel == i) & (curve == j)
            figure.add_scatter(
                x=t.sparsity[here],
                y=moved[here],
                mode="markers",
                marker={"color": colors[j], "size": 8},
                name=name,
                legendgroup=name,
                showlegend=False,
            )
        figures.append(figure)
    return figures


def _markers(report: Report) -> dict:
    sparsity = report.source.table.sparsity
    return {
        "color": sparsity,
        "colorscale": sample_colorscale("Viridis", np.linspace(0, 0.85, 10)),
        "cmin": 0,
        "cmax": float(sparsity.max()),
        "size": 8,
        "showscale": True,
        "colorbar": {"title": {"text": "sparsity"}, "thickness": 12},
    }


def _predicted(report: Report) -> go.Figure:
    measured = report.source.table.loss
    predicted = measured * np.exp(report.fit.residuals)
    both = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
    figure = _figure("Loss", "predicted, nats a token", "measured", showlegend=False)
    figure.add_scatter(x=both, y=both, mode="lines", line={"color": _GREY, "dash": "dot"})
    figure.add_scatter(x=predicted, y=measured, mode="markers", marker=_markers(report))
    return figure


def _residuals(report: Report) -> go.Figure:
    residuals = report.fit.residuals
    predicted = report.source.table.loss * np.exp(residuals)
    figure = _figure(
        "Errors of the fit", "predicted, nats a token", "predicted over measured - 1, %"
    )
    figure.add_hline(y=0, line={"color": _GREY, "dash": "dot"})
    figure.add_scatter(
        x=predicted, y=100 * np.expm1(residuals), mode="markers", marker=_markers(report)
    )
    return figure


def _contours(report: Report) -> go.Figure:
    t, cost = report.source.table, report.options.cost
    flops = training_flops(t.sparsity, t.nonzero, t.tokens, cost)
    n = np.geomspace(t.nonzero.min(), t.nonzero.max(), _POINTS)
    c = np.geomspace(flops.min(), flops.max(), _POINTS)
    most = float(t.sparsity.max())
    z = [
        [optimum(report.fit.law, y, nonzero=x, cost=cost, max_sparsity=most).sparsity for x in n]
        for y in c
    ]
    figure = _figure("", "non-zero weights", "training FLOPs", height=480, showlegend=False)
    figure.add_contour(
        x=n,
        y=c,
        z=z,
        # not so dark that labels can't be read
        colorscale=sample_colorscale("Blues", np.linspace(0, 0.6, 10)),
        contours={"start": 0.1, "end": most, "size": 0.1, "showlabels": True},
        colorbar={"title": {"text": "best<br>sparsity"}, "thickness": 12},
    )
    figure.add_scatter(
        x=t.nonzero,
        y=flops,
        mode="markers",
        marker={"color": _RED, "size": 7, "line": {"color": "white", "width": 1}},
        text=[
            f"sparsity {s:.4g}, {d:.3g} tokens" for s, d in zip(t.sparsity, t.tokens, strict=True)
        ],
        name="run",
    )
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    return figure


def _shown(values: np.ndarray) -> bool:
    """Whether a logarithmic axis suits them."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def _histogram(report: Report, name: str) -> go.Figure:
    values, best = report.bootstrap.values(name), getattr(report.fit.law, name)
    low, high = report.intervals[name]
    label = name
    if _shown(values) and best > 0:
        values, best, low, high = (np.log10(x) for x in (values, best, low, high))
        label = f"log10 of {name}"
    figure = _figure(name, label, "tables", height=260, showlegend=False, bargap=0.05)
    figure.add_vrect(x0=low, x1=high, fillcolor=_BLUE, opacity=0.12, line_width=0)
    figure.add_histogram(x=values, nbinsx=30, marker={"color": _BLUE})
    figure.add_vline(x=best, line={"color": _RED, "width": 2})
    return figure


def _pair(report: Report, one: str, other: str) -> go.Figure:
    laws, law = report.bootstrap, report.fit.law
    figure = _figure(f"{one} and {other}", one, other, height=280, showlegend=False)
    x, y = laws.values(one), laws.values(other)
    figure.add_scatter(x=x, y=y, mode="markers", marker={"color": _BLUE, "size": 4, "opacity": 0.6})
    figure.add_scatter(
        x=[getattr(law, one)],
        y=[getattr(law, other)],
        mode="markers",
        marker={"color": _RED, "size": 10, "symbol": "x"},
    )
    if _shown(x):
        figure.update_xaxes(type="log")
    if _shown(y):
        figure.update_yaxes(type="log")
    return figure
