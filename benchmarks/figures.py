"""Runs the benchmarks at their published settings and writes the figures of the docs.

    python benchmarks/figures.py
    python benchmarks/figures.py --only=selection
    python benchmarks/figures.py --quick --out=/tmp/figures

One after another, each in a process of its own, on a machine that should do nothing else. Results
are kept as JSON in runs/figures. Tables go between the markers `<!-- figures: NAME -->` and
`<!-- /figures: NAME -->` of docs/benchmarks.md, the plot to docs/img. A table of which nothing was
run stays as it is. --quick takes tiny sizes, to see that everything runs; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import commandline
import selection
import slices
import steps
import whole_run
from tabulate import tabulate

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = ("docs/benchmarks.md",)
PLOT = "docs/img/mask_update.svg"
RESULTS = "runs/figures"
OPENING = re.compile(r"<!-- figures: (\S+) -->")

# name -> script and its flags, in the order in which they run
PUBLISHED = {
    "steps_1": "steps.py --devices=1 --compiles=3",
    "steps_4": "steps.py --devices=4 --compiles=3",
    "adafactor": "steps.py --optimizer=adafactor",
    "methods": "steps.py --methods=magnitude,snfs,magnitude_ste,top_kast --steps=16 --period=4",
    "large": "steps.py --d_model=1024 --layers=4 --steps=6 --period=3 --peer=no",
    "deep": "steps.py --layers=24 --steps=4 --period=2 --peer=no",
    "selection": "selection.py --weights=1M,4M,16M,64M,256M,1G --devices=1,4 --repeats=3 "
    "--sort_seconds=5",
    "whole_run_1": "whole_run.py --devices=1 --d_model=128 --blocks=12",
    "whole_run_4": "whole_run.py --devices=4 --d_model=128 --blocks=12",
    "slices": "slices.py --sizes=base --layers=2 --topology=v5e:4x4 --optimizer=adamw",
}
_TINY = "--d_model=32 --layers=1 --batch=2 --length=8 --period=2"
QUICK = {
    "steps_1": f"steps.py --devices=1 {_TINY} --steps=4 --peer=no",
    "steps_4": f"steps.py --devices=4 {_TINY} --steps=4 --peer=no",
    "adafactor": f"steps.py --optimizer=adafactor {_TINY} --steps=4 --peer=no",
    "methods": f"steps.py --methods=magnitude {_TINY} --steps=4 --peer=no",
    "large": f"steps.py {_TINY} --steps=4 --peer=no",
    "deep": f"steps.py {_TINY} --steps=4 --peer=no",
    "selection": "selection.py --weights=64K --dtypes=float32 --devices=1,2 --tensors=1,2 "
    "--tensors_weights=64K --repeats=1",
    "whole_run_1": f"whole_run.py --devices=1 {_TINY} --blocks=1",
    "whole_run_4": f"whole_run.py --devices=4 {_TINY} --blocks=1",
    "slices": "slices.py --sizes=small --layers=1 --topology=v5e:2x2 --model_parallel=2 "
    "--vocab=1024 --batch=8 --length=64",
}

Results = Mapping[str, Mapping[str, Any]]


def _captioned(caption: str, table: str) -> str:
    return f"{caption}:\n\n{table}"


def _steps(name: str) -> Callable[[Results], str]:
    def block(results: Results) -> str:
        result = results[name]
        return _captioned(steps.title(result), steps.table(result, "github"))

    return block


def summary(results: Results) -> str:
    """The train steps of all device counts in short, one row per run."""
    found = [results[name] for name in ("steps_1", "steps_4")]
    rows = []
    for result in found:
        runs: dict[str, dict] = {}
        for x in result["steps_timed"]:
            runs.setdefault(x["run"], {})[x["step"]] = x
        for name, of in runs.items():
            plain, update = of["plain"], of.get("update")
            rows.append(
                (
                    result["devices"],
                    name,
                    f"{plain['ratio']:.3f}x",
                    f"{update['extra']:.2f}" if update else "",
                    _both(plain, update, lambda x: str(_gathers(x))),
                    _both(plain, update, lambda x: f"{x['compile_ratio']:.1f}x"),
                    f"{8 * plain['mask_bytes'] * result['devices'] / result['weights']:.2f}",
                )
            )
    headers = (
        "devices", "run", "plain step", "extra of a mask update, in plain steps",
        "all-gathers: plain, update", "compile: plain, update", "mask bits per weight",
    )  # fmt: skip
    align = ("right", "left", *["right"] * 5)
    table = tabulate(
        rows, headers=headers, tablefmt="github", colalign=align, disable_numparse=True
    )
    first = found[0]
    caption = (
        f"T5 1.1 of {first['weights'] / 1e6:.1f}M weights under {first['optimizer']}, on the "
        f"{first['host']} host; {first['machine']}"
    )
    return _captioned(caption, table)


def _both(plain: Mapping, update: Mapping | None, shown: Callable[[Mapping], str]) -> str:
    return shown(plain) if update is None else f"{shown(plain)}, {shown(update)}"


def _gathers(x: Mapping[str, Any]) -> int:
    return x["collectives"].get("all-gather", {"count": 0})["count"]


def _selection(results: Results) -> str:
    result = results["selection"]
    image = f"![Seconds of a mask update over the number of weights]({PLOT.removeprefix('docs/')})"
    return _captioned(f"{image}\n\n{result['machine']}", selection.table(result, "github"))


def _against_steps(results: Results) -> str:
    """The selection of 100M weights next to the step of the model that holds as many."""
    large = results["large"]
    step = next(x for x in large["steps_timed"] if x["run"] == "dense")["seconds"]
    update = next(x for x in large["steps_timed"] if (x["run"], x["step"]) == ("rigl", "update"))
    return (
        f"A model of {large['weights'] / 1e6:.0f}M weights, batches of {large['batch']} x "
        f"{large['length']} tokens: the dense step takes {step:.2f} s, and a mask update adds "
        f"{update['extra']:.2f} plain steps to its step."
    )


def _whole_run(results: Results) -> str:
    found = [results[name] for name in ("whole_run_1", "whole_run_4")]
    caption = f"{found[0]['host']} host; {found[0]['machine']}"
    return _captioned(caption, whole_run.table(found, "github"))


def _slices(results: Results) -> str:
    result = results["slices"]
    return _captioned(slices.title(result), slices.table(result, "github"))


# name of a marker -> (the results it takes, what makes its text of them)
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[[Results], str]]] = {
    "steps": (("steps_1", "steps_4"), summary),
    "steps_1": (("steps_1",), _steps("steps_1")),
    "steps_4": (("steps_4",), _steps("steps_4")),
    "adafactor": (("adafactor",), _steps("adafactor")),
    "methods": (("methods",), _steps("methods")),
    "large": (("large",), _against_steps),
    "deep": (("deep",), _steps("deep")),
    "selection": (("selection",), _selection),
    "whole_run": (("whole_run_1", "whole_run_4"), _whole_run),
    "slices": (("slices",), _slices),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commandline.parser(__doc__)
    one_of = commandline.one_of(*PUBLISHED)
    parser.add_argument(
        "--only",
        type=commandline.several(one_of),
        default=",".join(PUBLISHED),
        help=f"run these, by comma, of {', '.join(PUBLISHED)}",
    )
    parser.add_argument("--render", action="store_true", help="run nothing; write what results say")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; needs --out")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder to write to; the repository")
    args = parser.parse_args(argv)
    if args.quick and args.out.resolve() == ROOT.resolve():
        parser.error("--quick would write figures that mean nothing; give it a folder by --out")
    for page in PAGES:
        try:
            check_markers((ROOT / page).read_text())
        except ValueError as e:
            parser.error(f"{page}: {e}")
    return args


def check_markers(text: str) -> None:
    """Raises ValueError for a marker that has no end, or that no figures belong to."""
    for name in OPENING.findall(text):
        if name not in BLOCKS:
            raise ValueError(f"no figures are called {name!r}; there are {', '.join(BLOCKS)}")
        if text.count(f"<!-- /figures: {name} -->") != text.count(f"<!-- figures: {name} -->"):
            raise ValueError(f"'<!-- figures: {name} -->' needs a '<!-- /figures: {name} -->'")


def run(name: str, command: str, file: Path) -> None:
    """Runs one benchmark; its results go to `file`."""
    print(f"{name}: python benchmarks/{command}", file=sys.stderr, flush=True)
    script, *flags = command.split()
    tick = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *flags, f"--json={file}"], stdout=sys.stderr
    )
    if done.returncode:
        raise SystemExit(f"{name} failed; nothing more was run, and no table was written")
    print(f"{name}: {time.monotonic() - tick:.0f} s", file=sys.stderr, flush=True)


def filled(text: str, results: Results, commands: Mapping[str, str], new: Sequence[str]) -> str:
    """A page with the tables in it whose results are all there, some of them new."""
    for name in dict.fromkeys(OPENING.findall(text)):
        needed, block = BLOCKS[name]
        if all(n in results for n in needed) and any(n in new for n in needed):
            how = "\n".join(f"    python benchmarks/{commands[n]}" for n in needed)
            body = f"{how}\n\n{block(results)}"
            start, end = f"<!-- figures: {name} -->", f"<!-- /figures: {name} -->"
            pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
            text = pattern.sub(lambda _, s=start, b=body, e=end: f"{s}\n\n{b}\n\n{e}", text)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    commands, folder = QUICK if args.quick else PUBLISHED, args.out / RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in commands}
    new = list(files) if args.render else [name for name in files if name in args.only]
    if not args.render:
        for name in new:
            run(name, commands[name], files[name])
    results = {n: json.loads(file.read_text()) for n, file in files.items() if file.exists()}
    for page in PAGES:
        text = filled((ROOT / page).read_text(), results, commands, new)
        (args.out / page).parent.mkdir(parents=True, exist_ok=True)
        (args.out / page).write_text(text)
    if "selection" in results and "selection" in new:
        selection.plot(results["selection"]["points"], args.out / PLOT)
    commandline.write_json(args.json, results)


if __name__ == "__main__":
    main(sys.argv[1:])
