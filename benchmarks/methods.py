"""Trains every method on the standard library's text and prints the table of docs/results.md.

    python benchmarks/methods.py --sparsities=0.8,0.95 --steps=800 --seeds=3

A run is `stdlib.gin` and the method's own gin file, in a process of its own. A seed sets the
weights, the order of the data and the masks. Results are kept in --out, a JSON file, and a run that
is in it already is not run again. Methods of N:M have one level, and are run once.

FLOPs are relative to the dense model's, attention and logits included, were zeros skipped: of a
forward pass with the final masks, and of all train steps, from the masks as logged on the way.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from absl import app, flags
from tabulate import tabulate

FOLDER = Path(__file__).parent
N_BY_M = ("iterative_nm", "sr_ste", "structure_decay")
METHODS = (
    "dense", "static", "set", "rigl", "snfs", "mest", "granet", "srigl", "top_kast", "magnitude",
    "random", "saliency", "adam_fisher", "global_magnitude", "lamp", "global_saliency", "acdc",
    "magnitude_ste", "random_ste", "decaying_mask", *N_BY_M,
)  # fmt: skip
# What differs from the methods' own files: N:M is 2:4 in all, and a phase of AC/DC is 5% of the
# run, as in its paper.
_TWO_FOUR = {"NM_N": 2, "NM_M": 4}

_MARKERS = ("<!-- benchmarks/methods.py -->", "<!-- /benchmarks/methods.py -->")

_SPARSITIES = flags.DEFINE_list("sparsities", ["0.8", "0.95"], "Sparsities of all but N:M.")
_STEPS = flags.DEFINE_integer("steps", 800, "Train steps of a run.")
_PERIOD = flags.DEFINE_integer("period", 20, "Steps from one mask update to the next.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds per method.")
_METHODS = flags.DEFINE_list("methods", list(METHODS), "Gin files of gin/sparsity to run.")
_OUT = flags.DEFINE_string("out", "runs/methods.json", "Results, read and written.")
_PAGE = flags.DEFINE_string("page", None, "A page to put the table into: docs/results.md.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.")


def bindings(method: str, sparsity: float | None, seed: int, steps: int, period: int) -> list[str]:
    """The gin bindings of a run, but for its MODEL_DIR."""
    macros = {
        "TRAIN_STEPS": steps,
        "RANDOM_SEED": seed,
        "DATA_SEED": seed,
        "t5x_sparsity.SparsityConfig.seed": seed,
    }
    if sparsity is not None:
        macros["SPARSITY"] = sparsity
    if method in N_BY_M:
        macros |= _TWO_FOUR
    if method == "acdc":
        macros["MASK_UPDATE_PERIOD"] = max(steps // 20, 1)
    elif method not in ("dense", "static") and not method.endswith("_ste"):
        macros["MASK_UPDATE_PERIOD"] = period
    return [f"{name} = {value!r}" for name, value in macros.items()]


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """step -> value of a scalar in TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    if tag not in events.Tags()["tensors"]:
        return {}
    return {e.step: float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)}


def train(task: tuple[str, list[str]]) -> dict[str, float]:
    """One run, in a process that has done nothing else; returns its losses and costs."""
    method, macros = task
    import gin
    import jax

    from t5x_sparsity import host
    from t5x_sparsity import train as script

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    sys.modules["__main__"] = script  # where gin files look for train()
    run = gin.configurable(script.train)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        host.gin_utils.parse_gin_flags(
            [str(FOLDER), str(FOLDER.parent / "gin")],
            [str(FOLDER / "stdlib.gin"), f"sparsity/{method}.gin"],
            [*macros, f"MODEL_DIR = {folder!r}"],
        )
        steps, state = run()
        losses = scalars(
            Path(folder, "training_eval", "stdlib_lm"), "cross_ent_loss_per_all_target_tokens"
        )
        costs = measure(state, Path(folder, "train"), steps)
    return {"loss": losses[max(losses)], "seconds": time.time() - start, **costs}


def measure(state, events: Path, steps: int) -> dict[str, float]:
    """FLOPs relative to dense, final sparsity, and bytes of extra state per sparse weight."""
    from t5x_sparsity.monitoring import flops

    optimizer = state._optimizer
    plan = optimizer.optimizer_def.plan(state.params)
    embedder = state.params["decoder"]["token_embedder"]["embedding"]
    # logits, and the products of queries with keys and of scores with values
    other = 2 * embedder.size + other_attention(state.params)
    if not plan:
        return {"inference": 1.0, "training": 1.0, "sparsity": 0.0, "extra": 0.0}
    logged = {p: scalars(events, f"sparsity/{p}") for p in plan}
    times = sorted(next(iter(logged.values())))
    sizes = sum(layer.size for layer in plan.values())
    dense = 2.0 * sizes + other
    spent, since = 0.0, 0
    for at in times:  # what is logged at a step holds for the steps that led to it
        densities = {p: 1 - logged[p][at] for p in plan}
        for step in range(since, at):
            spent += flops.flops_per_token(plan, densities, step)[1] + 3 * other
        since = at
    assert since == steps, (since, steps)
    final = flops.flops_per_token(plan, densities, steps)[0] + other
    slots = optimizer.state.sparsity.slots
    extra = sum(x.nbytes for arrays in slots.values() for x in arrays.values())
    return {
        "inference": final / dense,
        "training": spent / (3 * dense * steps),
        "sparsity": 1 - sum(densities[p] * layer.size for p, layer in plan.items()) / sizes,
        "extra": extra / sizes,
    }


def other_attention(params, length: int = 64) -> int:
    """FLOPs per token of the attention products; the length is stdlib.gin's."""
    layers = [x for name, x in params["decoder"].items() if name.startswith("layers_")]
    return sum(4 * length * x["self_attention"]["query"]["kernel"].shape[1] for x in layers)


def tasks() -> dict[str, tuple[str, list[str]]]:
    """Key in the results -> the run, seed by seed, so that an early stop leaves whole tables."""
    found = {}
    for seed in range(_SEEDS.value):
        for method in _METHODS.value:
            for level in levels(method):
                macros = bindings(method, level, seed, _STEPS.value, _PERIOD.value)
                found[key(method, level, seed)] = method, macros
    return found


def levels(method: str) -> list[float | None]:
    if method == "dense" or method in N_BY_M:
        return [None]
    return [float(s) for s in _SPARSITIES.value]


def key(method: str, level: float | None, seed: int) -> str:
    return f"{method} sparsity={level} steps={_STEPS.value} period={_PERIOD.value} seed={seed}"


def table(results: dict[str, dict]) -> str:
    """Means over the seeds, one row per method, the best at the first sparsity first."""
    several = [float(s) for s in _SPARSITIES.value]
    rows = []
    for method in _METHODS.value:
        at = {level: found for level in levels(method) if (found := runs(results, method, level))}
        if not at:
            continue
        first = next(iter(at.values()))
        cells = {name: {} for name in ("loss", "training", "inference")}
        for level, found in at.items():
            spread = statistics.stdev(x["loss"] for x in found) if len(found) > 1 else math.nan
            cells["loss"][level] = f"{mean(found, 'loss'):.3f} ± {spread:.3f}"
            for name in ("training", "inference"):
                cells[name][level] = f"{mean(found, name):.2f}"
        columns = [
            # a method of one level has its own, whatever the columns say
            " / ".join(of.get(s, "") for s in several) if several[0] in of else of[None]
            for of in cells.values()
        ]
        level = f"{mean(first, 'sparsity'):.0%}" if None in at else ", ".join(_SPARSITIES.value)
        extra = f"{mean(first, 'extra'):.3g}"
        rows.append((mean(first, "loss"), (method, level, *columns, extra)))
    headers = (
        "method", "sparsity", "validation loss", "training FLOPs", "inference FLOPs", "extra state",
    )  # fmt: skip
    body = [row for _, row in sorted(rows)]
    return tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)


def runs(results: dict[str, dict], method: str, level: float | None) -> list[dict]:
    """What there is of a method at a sparsity, one result per seed."""
    keys = [key(method, level, seed) for seed in range(_SEEDS.value)]
    return [results[k] for k in keys if k in results]


def mean(found: list[dict], name: str) -> float:
    return statistics.mean(x[name] for x in found)


def write_page(path: Path, text: str) -> None:
    """Puts the table between the two markers of a page."""
    before, rest = path.read_text().split(_MARKERS[0])
    after = rest.split(_MARKERS[1])[1]
    path.write_text(f"{before}{_MARKERS[0]}\n\n{text}\n\n{_MARKERS[1]}{after}")


def main(_) -> None:
    out = Path(_OUT.value)
    results = json.loads(out.read_text()) if out.exists() else {}
    todo = {k: task for k, task in tasks().items() if k not in results}
    # a server that has imported everything, and run nothing, forks one process per run
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["t5x_sparsity.train", "tensorboard.util.tensor_util"])
    with context.Pool(_JOBS.value, maxtasksperchild=1) as pool:
        for name, result in zip(todo, pool.imap(train, todo.values()), strict=True):
            results[name] = result
            out.parent.mkdir(parents=True, exist_ok=True)
            partial = out.with_suffix(".tmp")
            partial.write_text(json.dumps(results, indent=1))
            os.replace(partial, out)
            print(f"{name}: {result['loss']:.4f} ({result['seconds']:.0f} s)", flush=True)
    print(table(results))
    if _PAGE.value:
        write_page(Path(_PAGE.value), table(results))


if __name__ == "__main__":
    app.run(main)
