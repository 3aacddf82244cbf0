r"""Tables as Markdown that is readable as plain text too."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table"]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right.

    Example:
        >>> print(markdown_table(("", "ELBO"), [("vae", "-7.5"), ("gp", "12.25")]))
        |     |  ELBO |
        |-----|------:|
        | vae |  -7.5 |
        | gp  | 12.25 |
    """
    table = [head, *rows]
    widths = [max(3, *(len(row[i]) for row in table)) for i in range(len(head))]
    lines = [
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in table
    ]
    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([lines[0], rule, *lines[1:]])
