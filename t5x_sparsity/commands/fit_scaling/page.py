"""The page of plots of `t5x-sparsity fit-scaling`: one HTML file that needs no other."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.offline import get_plotlyjs

from t5x_sparsity.commands.fit_scaling.report import FORMULA, Grid, Report
from t5x_sparsity.commands.output import generator
from t5x_sparsity.scaling.law import COEFFICIENTS, distinct
from t5x_sparsity.scaling.optimum import optimum, training_flops

_PANELS, _CURVES, _PAIRS = 3, 6, 4
_POINTS = 40
_BLUE, _RED, _GREY = "#2563a8", "#c2410c", "#6b7280"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 16px; background: #fff; color: #1f2937;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.25rem; }
p { max-width: 75ch; margin: 0.5rem 0; } code { font-size: 0.9em; overflow-wrap: anywhere; }
.note { color: #4b5563; font-size: 0.92rem; }
.beware { border-left: 4px solid #c2410c; background: #fff7ed; padding: 0.25rem 1rem; }
.beware li { margin: 0.25rem 0; }
.plots { display: grid; gap: 8px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px),
  1fr)); }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.plots > div { min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th { color: #4b5563; font-weight: 600; } .l { text-align: left; } .r { text-align: right; }
@media (max-width: 600px) { table { font-size: 0.8rem; } th, td { padding: 3px 6px; }
}
"""

# Drawn once all places are there, as a plot takes the width that its place has by then.
_DRAW = """
for (const data of document.querySelectorAll(".plots script")) {
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.parentNode, figure.data, figure.layout,
    {responsive: true, displaylogo: false, displayModeBar: false});
}
"""


def page(report: Report) -> str:
    """The whole page, as HTML."""
    path = html.escape(report.source.path)
    parts = [
        f"<h1>Sparse scaling law of {path}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in report.table_lines()),
        f"<p><code>{html.escape(FORMULA)}</code></p>",
        _warnings(report.warnings),
        "<h2>Coefficients</h2>",
        _grid(report.coefficients()),
        *(f'<p class="note">{html.escape(line)}</p>' for line in report.fit_lines()),
        "<h2>Loss against sparsity</h2>",
        '<p class="note">Lines are the law, one for each number of non-zero weights; points are '
        "runs. A run whose weights or tokens are between those of lines and panels is moved along "
        "the law to the nearest.</p>",
        _plots(_by_sparsity(report)),
        "<h2>Predicted and measured</h2>",
        _plots([_predicted(report), _residuals(report)]),
        f"<h2>{html.escape(report.held_out_grid().title)}</h2>",
        _grid(report.held_out_grid()),
        f"<h2>{html.escape(report.gains_grid().title)}</h2>",
        _grid(report.gains_grid()),
        f"<h2>{html.escape(report.optima_grid().title)}</h2>",
        _grid(report.optima_grid()),
    ]
    if report.optima:
        parts += [
            "<h2>Best sparsity for weights and compute</h2>",
            f'<p class="note">Training at {report.options.cost} cost, over the range of the table, '
            "whose runs are the points; no sparser than the sparsest of them.</p>",
            _plots([_contours(report)]),
        ]
    if report.bootstrap:
        parts += [
            "<h2>Coefficients over the bootstrap</h2>",
            f'<p class="note">Of {len(report.bootstrap.laws)} resampled tables; the line is the '
            "fit to the table itself, the band the interval.</p>",
            _plots([_histogram(report, name) for name in COEFFICIENTS], small=True),
        ]
        if report.ties:
            parts += [
                "<h2>Coefficients that make up for each other</h2>",
                '<p class="note">One resampled table a point. Compare predictions between tables, '
                "not these coefficients one by one.</p>",
                _plots([_pair(report, *pair) for pair in list(report.ties)[:_PAIRS]], small=True),
            ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{generator('fit-scaling')}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Sparse scaling law of {path}</title><style>{_STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>\n"
        + "\n".join(parts)
        + f"\n<script>{_DRAW}</script></body></html>\n"
    )


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{html.escape(w)}</li>" for w in warnings)
    return f'<div class="beware"><strong>Beware</strong><ul>{items}</ul></div>'


def _grid(grid: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        marked = zip(cells, grid.align, strict=True)
        return "<tr>" + "".join(f'<{tag} class="{a}">{html.escape(c)}</{tag}>' for c, a in marked)

    body = "\n".join(row(cells, "td") for cells in grid.rows)
    return f'<div class="scroll"><table>{row(grid.headers, "th")}\n{body}</table></div>'


def _plots(figures: Sequence[go.Figure], *, small: bool = False) -> str:
    # "</" would end the script that the figure is in
    data = "".join(
        f"<div><script type='application/json'>{f.to_json().replace('</', '<' + chr(92) + '/')}"
        "</script></div>\n"
        for f in figures
    )
    return f'<div class="plots{" small" if small else ""}">{data}</div>'


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


def _spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the different values, first and last among them."""
    found = distinct(values)
    if len(found) <= most:
        return found
    return found[np.linspace(0, len(found) - 1, most).round().astype(int)]


def _nearest(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The index of the level nearest to each value, by ratio."""
    return np.abs(np.log(values)[:, None] - np.log(levels)).argmin(1)


def _by_sparsity(report: Report) -> list[go.Figure]:
    t, law = report.source.table, report.fit.law
    tokens, sizes = _spread(t.tokens, _PANELS), _spread(t.nonzero, _CURVES)
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
