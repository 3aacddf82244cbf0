"""Texts that come from files."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns a text with escapes for control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
