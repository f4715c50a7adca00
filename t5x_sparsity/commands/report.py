"""`t5x-sparsity report`: one HTML page of one or more runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

from etils import epath

from t5x_sparsity.cli.report import ReportOptions
from t5x_sparsity.commands import CommandError
from t5x_sparsity.commands.report_page import GENERATOR, make_page
from t5x_sparsity.commands.report_run import ReportRun
from t5x_sparsity.events import read_run

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
    try:
        out = _out(options, folders)
    except OSError as e:
        raise CommandError(f"the page can't be written ({e}); name another by --out") from e
    runs = []
    for i, folder in enumerate(folders):
        try:
            found = read_run(str(folder))
        except (ValueError, OSError) as e:
            raise CommandError(str(e)) from e
        runs.append(ReportRun(name=names[i], index=i, run=found))
    _write(out, make_page(runs))
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
    if len(set(parts)) < len(parts):
        raise CommandError("one folder is given twice; give each run once")
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def _out(options: ReportOptions, folders: Sequence[epath.Path]) -> epath.Path:
    if options.out is not None:
        out = epath.Path(options.out)
    else:
        out = folders[0] / _PAGE if len(folders) == 1 else epath.Path(_PAGE)
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder; name a file, such as {out / _PAGE}")
    if options.out is not None and not out.parent.is_dir():
        raise CommandError(f"there is no folder {out.parent} to write {out.name} to; make it first")
    if out.exists():
        with out.open("rb") as f:
            start = f.read(4096)
        if GENERATOR.encode() not in start:
            raise CommandError(
                f"{out} is there and is no page of this command, so it isn't replaced; name "
                "another by --out"
            )
    return out


def _write(out: epath.Path, page: str) -> None:
    """All of the page or nothing."""
    draft = out.parent / f"{out.name}.tmp"
    try:
        draft.write_text(page, encoding="utf-8")
        draft.replace(out)
    except OSError as e:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise CommandError(f"{out} can't be written ({e}); name another by --out") from e
