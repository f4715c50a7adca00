"""How commands write pages, and show their progress."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from etils import epath

from t5x_sparsity.commands import CommandError


def generator(command: str) -> str:
    """The tag that marks a page as made by a command."""
    return f'<meta name="generator" content="t5x-sparsity {command}">'


def check_page(path: str, flag: str, command: str) -> epath.Path:
    """The path of a page that may be written: a new one, or an earlier page of the command.

    Raises:
      CommandError: it is a folder, has no folder, or is another file. It names `flag`.
    """
    out = epath.Path(path)
    try:
        if out.is_dir():
            raise CommandError(f"{flag} {out} is a folder; name a file in it, such as page.html")
        if not out.parent.is_dir():
            raise CommandError(
                f"there is no folder {out.parent} to write {out.name} to; make it first, or name "
                f"another file by {flag}"
            )
        if not out.exists():
            return out
        if not out.is_file():
            raise CommandError(f"{flag} {out} is no ordinary file; name another")
        with out.open("rb") as f:
            start = f.read(4096)
    except OSError as e:
        raise CommandError(f"{out} can't be written ({e}); name another by {flag}") from e
    if generator(command).encode() not in start:
        raise CommandError(
            f"{out} is there and is no page of this command, so it isn't replaced; name another "
            f"by {flag}"
        )
    return out


def write_page(out: epath.Path, page: str, flag: str) -> None:
    """Writes all of the page or nothing."""
    # a name that no other process and no user has
    draft = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        # text that was read may hold half of a surrogate pair, which UTF-8 can't encode
        draft.write_text(page.encode(errors="replace").decode(), encoding="utf-8")
        draft.replace(out)
    except OSError as e:
        raise CommandError(f"{out} can't be written ({e}); name another by {flag}") from e
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Says on standard error what is being done: a spinner on a terminal, a line elsewhere."""
    with status(what) as say:
        if say is None:
            print(f"{what} ...", file=sys.stderr, flush=True)
        yield


@contextlib.contextmanager
def status(what: str) -> Iterator[Callable[[str], None] | None]:
    """Shows a spinner on standard error; yields a function that changes its text.

    Yields None where standard error is no terminal.
    """
    if not _is_terminal():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as shown:
        yield shown.update


@contextlib.contextmanager
def progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how much of `size` bytes is done; yields what is to be told of more."""
    if not _is_terminal():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=size)
        yield lambda n: bar.advance(task, n)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
