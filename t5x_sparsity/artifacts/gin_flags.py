"""Gin bindings on a command line. Imports the standard library alone, so that help is quick."""

from collections.abc import Sequence

_FLAG = "--gin."


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
    """The same arguments, each `--gin.NAME=VALUE` as `--gin_bindings=NAME = VALUE`.

    Raises:
      ValueError: such an argument has no name, or no value.
    """

    def rewrite(arg: str) -> str:
        if not arg.startswith(_FLAG):
            return arg
        name, equals, value = arg.removeprefix(_FLAG).partition("=")
        if not name.strip() or not equals:
            raise ValueError(
                f"The argument {arg!r} sets nothing; write {_FLAG}NAME=VALUE, such as "
                f"{_FLAG}TRAIN_STEPS=100."
            )
        return f"--gin_bindings={name} = {value}"

    return [rewrite(arg) for arg in args]
