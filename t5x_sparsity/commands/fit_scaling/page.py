"""The page of plots of `t5x-sparsity fit-scaling`: one HTML file that needs no other."""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from t5x_sparsity.commands.fit_scaling import report
from t5x_sparsity.commands.fit_scaling.analysis import Analysis
from t5x_sparsity.commands.output import generator
from t5x_sparsity.commands.pages import render
from t5x_sparsity.commands.text import evenly_spaced
from t5x_sparsity.scaling.law import COEFFICIENTS, distinct
from t5x_sparsity.scaling.optimum import optimum, training_flops

_PANELS, _CURVES, _PAIRS = 3, 6, 4
_POINTS = 40
_BLUE, _RED = "#2563a8", "#c2410c"
_DOTTED = {"color": "#6b7280", "dash": "dot"}


def page(analysis: Analysis) -> str:
    """The whole page, as HTML."""
    resampled = bool(analysis.bootstrap.laws)
    return render(
        "fit_scaling/page.html",
        analysis=analysis,
        formula=report.FORMULA,
        generator=generator("fit-scaling"),
        table_lines=report.table_lines(analysis),
        fit_lines=report.fit_lines(analysis),
        warnings=list(analysis.warnings()),
        grids=report.grids(analysis),
        by_sparsity=_by_sparsity(analysis),
        errors=_errors(analysis),
        contours=[_contours(analysis)] if analysis.optima else [],
        histograms=[_histogram(analysis, n) for n in COEFFICIENTS if resampled],
        pairs=[_pair(analysis, *pair) for pair in list(analysis.ties)[:_PAIRS]],
        # JSON that can't end the script that it is in
        script_json=lambda figure: figure.to_json().replace("<", "\\u003c"),
    )


def _figure(title: str, x: str, y: str, *, height: int = 380, **layout) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}, "x": 0.02},
        height=height,
        margin={"l": 56, "r": 16, "t": 44, "b": 48},
        font={"family": "system-ui, sans-serif", "size": 12},
        xaxis={"title": x, "exponentformat": "e"},
        yaxis={"title": y, "exponentformat": "e"},
        **layout,
    )
    return figure


def _viridis(number: int) -> list[str]:
    """Colours that can all be told from the white page."""
    return sample_colorscale("Viridis", np.linspace(0, 0.85, number))


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the level nearest to each value, by ratio."""
    return np.abs(np.log(values)[:, None] - np.log(levels)).argmin(1)


def _by_sparsity(analysis: Analysis) -> list[go.Figure]:
    t, law = analysis.source.table, analysis.fit.law
    tokens = np.array(evenly_spaced(distinct(t.tokens), _PANELS))
    sizes = np.array(evenly_spaced(distinct(t.nonzero), _CURVES))
    panel, curve = _nearest(t.tokens, tokens), _nearest(t.nonzero, sizes)
    moved = law.loss(t.sparsity, sizes[curve], tokens[panel]) / np.exp(analysis.fit.residuals)
    s = np.linspace(0, t.sparsity.max(), 100)
    legend = {"orientation": "h", "y": -0.22}
    figures = []
    for i, d in enumerate(tokens):
        title = f"{d:.3g} tokens"
        figure = _figure(title, "sparsity", "loss, nats a token", legend=legend, height=440)
        figure.update_yaxes(range=[moved.min() * 0.97, moved.max() * 1.03])
        for j, (n, color) in enumerate(zip(sizes, _viridis(len(sizes)), strict=True)):
            here = (panel == i) & (curve == j)
            group = {"name": f"{n:.3g}", "legendgroup": f"{n:.3g}"}
            line, marker = {"color": color, "width": 2}, {"color": color, "size": 8}
            figure.add_scatter(x=s, y=law.loss(s, n, d), mode="lines", line=line, **group)
            points = {"x": t.sparsity[here], "y": moved[here], "mode": "markers"}
            figure.add_scatter(**points, marker=marker, showlegend=False, **group)
        figures.append(figure)
    return figures


def _errors(analysis: Analysis) -> list[go.Figure]:
    t, residuals = analysis.source.table, analysis.fit.residuals
    predicted, x = t.loss * np.exp(residuals), "predicted, nats a token"
    loss = _figure("Loss", x, "measured", showlegend=False)
    ends = np.concatenate([t.loss, predicted])
    ends = [ends.min(), ends.max()]
    loss.add_scatter(x=ends, y=ends, mode="lines", line=_DOTTED)
    errors = _figure("Errors of the fit", x, "predicted over measured - 1, %")
    errors.add_hline(y=0, line=_DOTTED)
    marker = {
        "color": t.sparsity,
        "colorscale": _viridis(10),
        "cmin": 0,
        "cmax": float(t.sparsity.max()),
        "size": 8,
        "showscale": True,
        "colorbar": {"title": {"text": "sparsity"}, "thickness": 12},
    }
    for figure, y in ((loss, t.loss), (errors, 100 * np.expm1(residuals))):
        figure.add_scatter(x=predicted, y=y, mode="markers", marker=marker)
    return [loss, errors]


def _contours(analysis: Analysis) -> go.Figure:
    t, cost = analysis.source.table, analysis.options.cost
    flops = training_flops(t.sparsity, t.nonzero, t.tokens, cost)
    n = np.geomspace(t.nonzero.min(), t.nonzero.max(), _POINTS)
    c = np.geomspace(flops.min(), flops.max(), _POINTS)
    most = float(t.sparsity.max())
    z = [
        [optimum(analysis.fit.law, y, nonzero=x, cost=cost, max_sparsity=most).sparsity for x in n]
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
    runs = zip(t.sparsity, t.tokens, strict=True)
    figure.add_scatter(
        x=t.nonzero,
        y=flops,
        mode="markers",
        marker={"color": _RED, "size": 7, "line": {"color": "white", "width": 1}},
        text=[f"sparsity {s:.4g}, {d:.3g} tokens" for s, d in runs],
        name="run",
    )
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(type="log", exponentformat="power", dtick=1)
    return figure


def _is_wide(values: np.ndarray) -> bool:
    """Whether a logarithmic axis suits the values."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def _histogram(analysis: Analysis, name: str) -> go.Figure:
    values, best = analysis.bootstrap.values(name), getattr(analysis.fit.law, name)
    low, high = analysis.coefficients[name]["interval"]
    label = name
    if _is_wide(values) and best > 0:
        values, best, low, high = (np.log10(x) for x in (values, best, low, high))
        label = f"log10 of {name}"
    figure = _figure(name, label, "tables", height=260, showlegend=False, bargap=0.05)
    figure.add_vrect(x0=low, x1=high, fillcolor=_BLUE, opacity=0.12, line_width=0)
    figure.add_histogram(x=values, nbinsx=30, marker={"color": _BLUE})
    figure.add_vline(x=best, line={"color": _RED, "width": 2})
    return figure


def _pair(analysis: Analysis, one: str, other: str) -> go.Figure:
    figure = _figure(f"{one} and {other}", one, other, height=280, showlegend=False)
    x, y = analysis.bootstrap.values(one), analysis.bootstrap.values(other)
    points = {"color": _BLUE, "size": 4, "opacity": 0.6}
    figure.add_scatter(x=x, y=y, mode="markers", marker=points)
    best = {"x": [getattr(analysis.fit.law, one)], "y": [getattr(analysis.fit.law, other)]}
    figure.add_scatter(**best, mode="markers", marker={"color": _RED, "size": 10, "symbol": "x"})
    figure.update_xaxes(type="log" if _is_wide(x) else "linear")
    figure.update_yaxes(type="log" if _is_wide(y) else "linear")
    return figure
