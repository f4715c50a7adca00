"""`t5x-sparsity report`: one HTML page of one or more runs."""

import json
from collections.abc import Sequence

from etils import epath

from t5x_sparsity.artifacts.events import read_run
from t5x_sparsity.commands import CommandError, one_line
from t5x_sparsity.commands.output import check_page, write_page
from t5x_sparsity.commands.report.options import ReportOptions
from t5x_sparsity.commands.report.page import make_page
from t5x_sparsity.commands.report.run import ReportRun

# as many as colours that can be told from each other
MAX_RUNS = 8
_PAGE = "sparsity_report.html"


def run(options: ReportOptions) -> int:
    """Writes the page and prints where; returns the exit code."""
    folders = [epath.Path(f) for f in options.model_dirs]
    if len(folders) > MAX_RUNS:
        raise CommandError(
            f"{len(folders)} runs are too many to tell apart on a page; give at most {MAX_RUNS}"
        )
    names = _names(options, folders)
    runs = []
    for i, folder in enumerate(folders):
        try:
            found = read_run(str(folder))
        except (ValueError, OSError) as e:
            raise CommandError(one_line(e)) from e
        runs.append(ReportRun(**vars(found), name=names[i], index=i))
    out = options.out
    if out is None:
        out = folders[0] / _PAGE if len(folders) == 1 else _PAGE
    out = check_page(out, "--out", "report")
    write_page(out, make_page(runs), "--out")
    if options.json:
        result = {"page": str(out), "runs": [r.key_numbers() for r in runs]}
        print(json.dumps(result, indent=1, allow_nan=False))
    else:
        print(out)
    return 0


def _names(options: ReportOptions, folders: Sequence[epath.Path]) -> list[str]:
    """Names of the runs: those given, or the least of their paths that tells them apart."""
    if options.names:
        if len(options.names) != len(folders):
            raise CommandError(
                f"{len(options.names)} names for {len(folders)} runs; give --name once a run, in "
                "their order"
            )
        if len(set(options.names)) < len(folders):
            raise CommandError(f"two runs have one name: {', '.join(options.names)}")
        return list(options.names)
    # '.' has no name of its own
    parts = [f.resolve().parts for f in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise CommandError("one folder is given twice; give each run once")
