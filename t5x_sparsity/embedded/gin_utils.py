"""Gin configuration from the command line, and its record next to the run."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import gin
from absl import app, logging

from t5x_sparsity.artifacts.gin_flags import rewrite_gin_args


def parse_gin_flags(
    gin_search_paths: Sequence[str],
    gin_files: Sequence[str] | None,
    gin_bindings: Sequence[str] | None,
    skip_unknown: bool | Sequence[str] = False,
    finalize_config: bool = True,
) -> None:
    """Read gin files, then bindings such as "train.total_steps = 100"; the last one wins.

    Files and their includes are looked for in `gin_search_paths`, in order. `skip_unknown`, True or
    names, lets unknown configurables (or these) pass. `finalize_config` locks the configuration.
    """
    for folder in gin_search_paths:
        gin.add_config_file_search_path(folder)
    gin.parse_config_files_and_bindings(
        list(gin_files or ()),
        list(gin_bindings or ()),
        skip_unknown=skip_unknown,
        finalize_config=finalize_config,
    )
    logging.info("Gin configuration:\n%s", gin.config_str())


def summarize_gin_config(model_dir: str, summary_writer: Any | None, step: int) -> None:
    """Write the configuration to `<model_dir>/config.gin` and to the summary of `step`."""
    config = gin.config_str()
    os.makedirs(model_dir, exist_ok=True)
    with open(os.path.join(model_dir, "config.gin"), "w", encoding="utf-8") as out:
        out.write(config)
    if summary_writer is not None:
        summary_writer.write_texts(step, {"config": gin.markdown(config)})
        summary_writer.flush()


def run(main: Callable[[Sequence[str]], Any]) -> None:
    """absl's app.run for a `main(argv)` whose command line may hold `--gin.NAME=VALUE`."""
    app.run(main, flags_parser=lambda argv: app.parse_flags_with_usage(rewrite_gin_args(argv)))
