"""`t5x-sparsity fit-scaling`: the sparse scaling law of a table of runs."""

import json
import sys

from t5x_sparsity.commands.fit_scaling.analysis import Analysis
from t5x_sparsity.commands.fit_scaling.options import FitScalingOptions
from t5x_sparsity.commands.fit_scaling.report import as_dict, as_text
from t5x_sparsity.commands.fit_scaling.table import read
from t5x_sparsity.commands.output import check_page, spinner, write_page


def run(options: FitScalingOptions) -> int:
    """Prints the report; returns the exit code."""
    source = read(options.table)
    out = None if options.plots is None else check_page(options.plots, "--plots", "fit-scaling")
    with spinner("fitting"):
        analysis = Analysis(source=source, options=options)
        if options.json:
            report = json.dumps(as_dict(analysis), indent=1, allow_nan=False)
        else:
            report = as_text(analysis)
        if out:
            from t5x_sparsity.commands.fit_scaling.page import page

            write_page(out, page(analysis), "--plots")
    print(report)
    if out:
        print(f"wrote {out}", file=sys.stderr)
    return 0
