"""Tables as plain text: the same on a terminal, in a pipe and in a file, never truncated."""

from collections.abc import Iterable, Sequence


def text_table(rows: Iterable[Sequence[str]], *, headers: Sequence[str], align: str) -> str:
    """The rows under their headers, with a line of dashes between.

    >>> print(text_table([("a", "10"), ("b", "5")], headers=("name", "size"), align="lr"))
    name      size
    ------  ------
    a           10
    b            5

    Args:
      rows: text, one per column.
      headers: one per column.
      align: one character per column, 'l' or 'r'.
    """
    rows = [[cell.strip() for cell in row] for row in rows]
    columns = zip(headers, *rows, strict=True)
    # columns are two blanks wider than their header, which separates short values
    widths = [max(len(header) + 2, *map(len, cells), 0) for header, *cells in columns]
    justify = [str.ljust if a == "l" else str.rjust for a in align]

    def line(cells: Sequence[str]) -> str:
        whole = (j(c, w) for j, c, w in zip(justify, cells, widths, strict=True))
        return "  ".join(whole).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, rows)])
