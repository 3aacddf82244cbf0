"""Helpers of the benchmarks: variants timed in turns, ratios within a round, records and pages."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import read_json, write_json, write_text

Program = Callable[[], object]


@dataclass(kw_only=True)
class Options:
    """Options of a benchmark.

    Attributes:
        rounds: How often each variant is timed.
        seconds: Approximate duration of one timing. Fast variants are called many times in it.
        device: "cpu" or "cuda"; None is CUDA if it is available.
        seed: Seed of networks, images and of the order of variants.
        out: Folder of the record and its page.
        render: Only make the page again from the record in --out.
    """

    rounds: int = 30
    seconds: float = 0.1
    device: str | None = None
    seed: int = 0
    out: Path = Path("docs/results")
    render: bool = False

    def on(self) -> torch.device:
        """Returns the device to measure on."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Quartiles:
        return Quartiles(*map(float, np.quantile(values, [0.25, 0.5, 0.75])))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.low)} to {short(self.high)})"


@dataclass(frozen=True)
class Timings:
    """Seconds of one call of each variant, one number per round."""

    seconds: dict[str, list[float]]

    def of(self, name: str) -> Quartiles:
        """Returns the seconds of a call."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> Quartiles:
        """Returns the time over that of the baseline in the same round.

        Load that slows down a round slows down both.
        """
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return Quartiles.of([mine / other for mine, other in pairs])

    def table(self, baseline: str) -> str:
        """Returns a Markdown table of ratios and milliseconds."""
        lines = [f"| | ratio to {baseline} | ms |", "|---|--:|--:|"]
        for name, seconds in self.seconds.items():
            milliseconds = Quartiles.of([1000 * s for s in seconds])
            lines.append(f"| {name} | {self.ratio(name, baseline)} | {milliseconds} |")
        return "\n".join(lines)


def short(value: float) -> str:
    """Formats a number with three digits, or with its whole integer part."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def interleave(
    programs: Mapping[str, Program], device: torch.device, options: Options, warm_up: int = 3
) -> Timings:
    """Times programs in turns, in another order in every round."""
    calls = {}
    for name, program in programs.items():  # includes the time of compilation
        for _ in range(warm_up):
            program()
        calls[name] = max(1, round(options.seconds / seconds_of(program, device)))
    timings: dict[str, list[float]] = {name: [] for name in programs}
    order, generator = list(programs), random.Random(options.seed)
    for _ in range(options.rounds):
        generator.shuffle(order)
        for name in order:
            timings[name].append(seconds_of(programs[name], device, calls[name]))
    return Timings(timings)


def seconds_of(program: Program, device: torch.device, calls: int = 1) -> float:
    """Returns the mean time of some calls in a row, including the work of the device."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        program()
    wait(device)
    return (time.perf_counter() - start) / calls


def wait(device: torch.device) -> None:
    """Waits until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def publish(
    name: str,
    options: Options,
    measure: Callable[[], dict[str, Any]],
    page: Callable[[dict[str, Any]], Iterable[str]],
) -> None:
    """Writes the record NAME_DEVICE.json, unless it is only rendered, and its page.

    Arguments:
        name: Name of the benchmark.
        options: Its options, which become part of the record.
        measure: Returns the measured part of the record.
        page: Makes the parts of the Markdown page from a record.
    """
    file = options.out / f"{name}_{options.on().type}.json"
    if not options.render:
        # names instead of paths, which differ between machines
        chosen = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items()}
        chosen = {k: v for k, v in chosen.items() if k not in ("out", "render")}
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(file, chosen | environment(options.on()) | measure())
    record = read_json(file)
    threads = f"{record['threads']} thread{'s' if record['threads'] != 1 else ''}"
    caption = (
        f"Median (quartiles) of {record['rounds']} rounds, in which all variants take turns in "
        f"random order; ratios are taken within a round. {record['device']}, {threads}, torch "
        f"{record['versions']['torch']}."
    )
    text = "\n\n".join([*page(record), caption]) + "\n"
    write_text(file.with_suffix(".md"), text)
    print(text)
