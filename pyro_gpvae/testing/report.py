r"""What a check of a guide found."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "GuideError",
    "Promise",
    "Report",
]


@dataclass(frozen=True)
class Promise:
    """One promise of the guide contract, and how the guide kept it.

    Attributes:
        name: One word.
        statement: What is promised.
        figure: What was measured.
        threshold: What it must be.
        kept: Whether it is; None if the promise was not checked.
        account: If it is not: what was seen, and the likely cause. If it was not checked: why.
    """

    name: str
    statement: str
    figure: str
    threshold: str
    kept: bool | None
    account: str

    @property
    def verdict(self) -> str:
        return {True: "ok", False: "BROKEN", None: "not checked"}[self.kept]


@dataclass(frozen=True)
class Report:
    """What :func:`check_guide` found; ``print(report)`` shows a table."""

    promises: tuple[Promise, ...]

    @property
    def broken(self) -> tuple[Promise, ...]:
        return tuple(promise for promise in self.promises if promise.kept is False)

    def __getitem__(self, name: str) -> Promise:
        return next(promise for promise in self.promises if promise.name == name)

    def __str__(self) -> str:
        rows = [("promise", "", "figure", "threshold", "verdict")]
        rows += [(p.name, p.statement, p.figure, p.threshold, p.verdict) for p in self.promises]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += [f"{p.name}: {p.account}" for p in self.promises if p.kept is None]
        return "\n".join(lines)


class GuideError(AssertionError):
    """A guide breaks a promise; ``promise`` is the first, ``report`` has all of them."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.promise = report.broken[0]
        super().__init__(
            f"the guide breaks the promise {self.promise.name!r}: {self.promise.statement}.\n"
            f"{self.promise.account}\n\n{report}"
        )
