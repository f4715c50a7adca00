"""The arguments of `t5x-sparsity inspect`."""

from __future__ import annotations


def add(commands) -> None:
    """Adds the subcommand to those of `t5x-sparsity`."""
    commands.add_parser(
        "inspect", allow_abbrev=False, help="show a checkpoint's sparsity, weight by weight"
    )
