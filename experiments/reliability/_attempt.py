"""Helpers of the campaigns: one attempt in a process of its own, and the record of a campaign."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._errors import NonFiniteError
from pyro_gpvae.core._files import write_json, write_text

#: What an attempt may use: bytes beyond what the process has already, and seconds.
MEMORY, SECONDS = 2 << 30, 20


def attempt(work: Callable[[], Any], seconds: int = SECONDS) -> tuple[str, str]:
    """Calls a function in a forked process that may use little memory and time.

    Returns:
        "accepted" and the JSON of the result; "refused" and the message, if it raised the errors
        that a command prints as one line; else "broken" and what happened.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        try:
            _limit(seconds)
            os.write(writer, json.dumps(_outcome(work))[:60_000].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == -signal.SIGALRM:
        return "slow", f"more than {seconds} s"
    if not content:
        return "broken", f"the process ended with status {status}"
    kind, text = json.loads(content)
    return kind, text


def damaged(content: bytes, kind: str, choose: random.Random, flips: Sequence[int]) -> bytearray:
    """Returns the content of a file with flipped bits, cut, repeated, or empty; else as it is.

    Arguments:
        content: The content, not empty.
        kind: "bits", "cut", "repeat", "empty", or anything else.
        choose: What is random.
        flips: How many bits may be flipped; one of the numbers is chosen.
    """
    array = bytearray(content)
    if kind == "bits":
        for _ in range(choose.choice(flips)):
            array[choose.randrange(len(array))] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del array[choose.randrange(len(array)) :]
    elif kind == "repeat":
        array += content
    elif kind == "empty":
        array.clear()
    return array


def _limit(seconds: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _outcome(work: Callable[[], Any]) -> tuple[str, str]:
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(nowhere):
                return "accepted", json.dumps(work(), sort_keys=True, default=str)
    except (ValueError, OSError, NonFiniteError) as error:
        return "refused", f"{type(error).__name__}: {error}"
    except BaseException as error:
        return "broken", f"{type(error).__name__}: {error}"[:500]


def publish(
    name: str, out: Path | None, options: Mapping[str, Any], found: Sequence[tuple[str, str, str]]
) -> bool:
    """Prints, and writes to ``out``, how often each victim did what; True if nothing is broken.

    Arguments:
        name: The name of the files.
        out: Their folder; None is none.
        options: The options of the campaign.
        found: Victim, outcome and a description of each attempt.
    """
    counts = Counter((victim, outcome) for victim, outcome, _ in found)
    outcomes = sorted({outcome for _, outcome in counts} | {"broken"})
    head = f"| victim | {' | '.join(outcomes)} |\n|---|{'--:|' * len(outcomes)}\n"
    rows = [
        f"| {victim} | {' | '.join(str(counts[victim, o]) for o in outcomes)} |"
        for victim in dict.fromkeys(victim for victim, _, _ in found)
    ]
    broken = [f"{victim}: {text}" for victim, outcome, text in found if outcome == "broken"]
    text = head + "\n".join([*rows, "", f"{len(found)} attempts, {len(broken)} broken.", *broken])
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {"options": dict(options), "broken": broken, **environment(torch.device("cpu"))}
        record["counts"] = {f"{victim}: {outcome}": n for (victim, outcome), n in counts.items()}
        write_json(out / f"{name}.json", record)
        write_text(out / f"{name}.md", text + "\n")
    return not broken
