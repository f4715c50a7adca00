r"""Trains a model, on T5X where it is importable, else on the embedded host.

The flags are those of T5X's own train script, and `--host` to force one of the two:

    python -m t5x_sparsity.train --gin_file=examples/rigl_stdlib.gin --gin.SPARSITY=0.9

Another --gin_file=sparsity/<method>.gin, the last, trains by another method. Each of those files
lists its macros, such as SPARSITY, with their ranges and defaults. `t5x-sparsity plan` takes the
same flags and shows what the run would be; inspect, report and export look into a run.

Exit codes: 0; 2 for gin files and bindings that can't be read, with one line that says why; 1 for
all else.
"""

import argparse
import importlib.resources
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NoReturn

# T5X's train script wants this set before flax is imported: profiles then name modules.
os.environ.setdefault("FLAX_PROFILE", "true")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from t5x_sparsity.commands import one_line, quiet
from t5x_sparsity.extras import MissingExtra, requires


def _stop(error: object) -> NoReturn:
    """Ends the command with one line of error, before anything runs."""
    print(f"t5x_sparsity.train: error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    # read before anything that depends on it is imported; absl looks at it again
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--host")
    wanted = early.parse_known_args(sys.argv)[0].host
    if wanted:
        os.environ["T5X_SPARSITY_HOST"] = wanted

try:
    with quiet(), requires("embedded", "training"):
        import gin
        import jax
        import seqio
        from absl import flags, logging

        from t5x_sparsity import host
        from t5x_sparsity.artifacts.macros import check_bindings
except MissingExtra as e:
    if __name__ != "__main__":
        raise
    _stop(e)

# gin files bind it as `__main__.train`
train = host.train_lib.train


def _define_flags() -> None:
    flags.DEFINE_multi_string(
        "gin_file", None, "Gin file; may be given several times, later ones override earlier ones."
    )
    flags.DEFINE_multi_string("gin_bindings", [], "A gin binding; --gin.NAME=VALUE for short.")
    flags.DEFINE_list("gin_search_paths", ["."], "Folders that gin files are searched in.")
    flags.DEFINE_string("tfds_data_dir", None, "Folder of TensorFlow Datasets, for all tasks.")
    flags.DEFINE_list("seqio_additional_cache_dirs", [], "Folders of cached seqio tasks.")
    flags.DEFINE_enum(
        "host", "auto", ["auto", "t5x", "embedded"], "auto: T5X where importable, else embedded."
    )
    flags.DEFINE_boolean("multiprocess_gpu", False, "Join the processes named by the next flags.")
    flags.DEFINE_string("coordinator_address", None, "IP:PORT of the coordinator.")
    flags.DEFINE_integer("process_count", None, "Number of processes.")
    flags.DEFINE_integer("process_index", None, "Index of this process.")
    flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for the others.")


def _join_processes(values) -> None:
    if host.NAME != "t5x":
        _stop(
            "the embedded host trains on one process; run several with T5X, or drop "
            "--multiprocess_gpu"
        )
    jax.distributed.initialize(
        values.coordinator_address,
        values.process_count,
        values.process_index,
        initialization_timeout=values.initialization_timeout,
    )


def _methods() -> str:
    """The files to include, for the help."""
    folder = importlib.resources.files("sparsity")
    names = sorted(f.name.removesuffix(".gin") for f in folder.iterdir() if f.name.endswith(".gin"))
    methods = [n for n in names if n not in ("base", "from_dense")]
    return textwrap.fill(f"Methods: {', '.join(methods)}.", 100)


def main(argv: Sequence[str]) -> None:
    """Parses the gin files and bindings, and trains."""
    if len(argv) > 1:
        _stop(f"unexpected arguments: {' '.join(argv[1:])}; --help lists the flags")
    values = flags.FLAGS
    if not values.gin_file and not values.gin_bindings:
        _stop("no run is given; add --gin_file=FILE, such as --gin_file=examples/rigl_stdlib.gin")
    search, shown = list(values.gin_search_paths), "the embedded host of t5x_sparsity"
    if host.NAME == "t5x":
        folder = os.path.dirname(host.train_lib.__file__)
        # T5X's gin files are found relative to its package's parent
        search, shown = [*search, os.path.dirname(folder)], f"T5X at {folder}"
    logging.info("Host: %s", shown)
    if values.multiprocess_gpu:
        _join_processes(values)
    if values.tfds_data_dir:
        seqio.set_tfds_data_dir_override(values.tfds_data_dir)
    if values.seqio_additional_cache_dirs:
        seqio.add_global_cache_dirs(values.seqio_additional_cache_dirs)
    train_using_gin = gin.configurable(train)
    try:
        check_bindings(values.gin_bindings)
        host.gin_utils.parse_gin_flags(search, values.gin_file, values.gin_bindings)
    except (OSError, SyntaxError, ValueError) as e:
        _stop(e)
    train_using_gin()
    jax.effects_barrier()


if __name__ == "__main__":
    __doc__ += f"\n{_methods()}\n"  # absl's help begins with it
    _define_flags()
    host.gin_utils.run(main)
