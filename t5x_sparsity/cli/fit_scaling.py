"""The arguments of `t5x-sparsity fit-scaling`."""

from __future__ import annotations


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
    commands.add_parser(
        "fit-scaling", allow_abbrev=False, help="fit the sparse scaling law to a table of runs"
    )
