"""Programs in environments of their own that answer requests, sent as lines of JSON.

A request is {"do": NAME, ...}, answered by what the worker's method NAME returns for the rest.
Only the standard library is imported, because the other environment has its own packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Worker:
    """A program that calls :func:`serve`; it ends with the context in which it is used."""

    def __init__(self, python: str | Path, script: Path) -> None:
        self.script = script
        self.process = subprocess.Popen(
            [str(python), str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **values: Any) -> Any:
        """Sends one request and waits for its answer; RuntimeError if the program has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps({"do": do, **values}), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            code = self.process.wait()
            raise RuntimeError(
                f"{self.script.name} ended with {code} when it was asked to {do}: see its messages"
            ) from None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()  # closes its input: without requests a worker ends


def serve(worker: object) -> None:
    """Answers requests with the worker's methods until the input ends."""
    # what libraries print must not end up between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)
