"""Programs in environments of their own that answer requests, sent as lines of JSON.

A request is {"do": NAME, ...}, answered by what the worker's method NAME returns for the rest.
Only the standard library is imported, because the other environment has its own packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Worker:
    """A program that waits for requests; it ends with the context in which it is used.

    Arguments:
        python: The Python of the environment that the program needs.
        script: The program, which calls :func:`serve`.
        arguments: Its arguments.

    Raises:
        RuntimeError: From :meth:`ask`, if the program has ended. Its message is on stderr.
    """

    def __init__(self, python: str | Path, script: Path, arguments: Sequence[str] = ()) -> None:
        self.script = script
        self.process = subprocess.Popen(
            [str(python), str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **values: Any) -> Any:
        """Sends one request and waits for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"{self.script.name} ended with {self.process.wait()} when it was asked to "
                f"{do}: see its messages above"
            )
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()  # without requests a worker ends
        self.process.wait()


def serve(worker: object) -> None:
    """Answers requests with the worker's methods until the input ends."""
    # what libraries print must not end up between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
