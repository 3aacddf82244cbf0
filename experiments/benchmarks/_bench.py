"""What the benchmarks share: timing in turns, ratios, the machine's ceilings and a step's limit."""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

Program = Callable[[], object]


@dataclass(kw_only=True)
class Options:
    """Options of a benchmark.

    Attributes:
        rounds: How often each variant is timed.
        seconds: How long one timing takes, about: fast variants are called many times in it.
        device: "cpu" or "cuda"; None is CUDA if there is one.
        seed: Seed of networks, images and of the order of variants.
        out: Folder of the results.
    """

    rounds: int = 30
    seconds: float = 0.1
    device: str | None = None
    seed: int = 0
    out: Path = Path("docs/results")

    def on(self) -> torch.device:
        """The device to measure on."""
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
    """Seconds of one call of each variant: one number a round."""

    seconds: dict[str, list[float]]

    def of(self, name: str) -> Quartiles:
        """Seconds of a call."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> Quartiles:
        """Time over the baseline's in the same round: what slows a round slows both."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return Quartiles.of([mine / other for mine, other in pairs])

    def fastest(self, names: Iterable[str]) -> str:
        return min(names, key=lambda name: self.of(name).median)

    def table(self, baseline: str, limits: Mapping[str, float] | None = None) -> str:
        """Markdown, ratios first. ``limits`` are the least seconds that calls can take."""
        lines = [f"| | ratio to {baseline} | ms |", "|---|--:|--:|"]
        if limits is not None:
            lines = [f"{lines[0]} times the limit |", f"{lines[1]}--:|"]
        for name, seconds in self.seconds.items():
            milliseconds = Quartiles.of([1000 * s for s in seconds])
            cells = [name, str(self.ratio(name, baseline)), str(milliseconds)]
            cells += [] if limits is None else [short(self.of(name).median / limits[name])]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def short(value: float) -> str:
    """Three digits, or all of the integer part."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def interleave(
    programs: Mapping[str, Program], device: torch.device, options: Options, warm_up: int = 3
) -> Timings:
    """Times programs in turns, every round in another order, each for ``options.seconds``."""
    calls = {}
    for name, program in programs.items():  # what is compiled or captured is so here
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
    """Seconds of one call, the mean of some in a row; the last waits for the device."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        program()
    wait(device)
    return (time.perf_counter() - start) / calls


def page_faults() -> int:
    """Minor page faults of this process so far: pages that the kernel gave it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at most: matrix products, and copies (read and written bytes)."""

    gflops: float
    gb_per_second: float

    @staticmethod
    def measure(device: torch.device) -> Ceilings:
        cuda = device.type == "cuda"
        a = torch.randn(*(2 * [8192 if cuda else 1024]), device=device)
        source = torch.zeros((1 << 30) if cuda else (1 << 28), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # TF32, which CUDA's convolutions use anyway
        try:
            programs = {"matmul": lambda: a @ a, "copy": lambda: target.copy_(source)}
            timings = interleave(programs, device, Options(rounds=40, seconds=0.01))
        finally:
            torch.set_float32_matmul_precision(precision)
        flops, copied = 2 * len(a) ** 3, 2 * len(source)
        best = {name: min(seconds) for name, seconds in timings.seconds.items()}
        return Ceilings(flops / best["matmul"] / 1e9, copied / best["copy"] / 1e9)

    def limit(self, work: Work) -> float:
        """The least number of seconds for some work, if arithmetic and copies overlap."""
        return max(work.flops / self.gflops, work.bytes / self.gb_per_second) / 1e9


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and the bytes that no implementation can keep in a cache."""

    flops: float
    bytes: float

    @staticmethod
    def of(program: Program, parameters: Iterable[Tensor], batch: Tensor) -> Work:
        """The work of an eager step of Adam, or without a gradient of a forward pass.

        Bytes: parameter, gradient and two moments of Adam are read, and all but the gradient
        written; the batch is read. Activations are taken to stay in the cache.
        """
        with FlopCounterMode(display=False) as counter:
            program()
        tensors = [(p, 7 if p.requires_grad else 1) for p in parameters] + [(batch, 1)]
        moved = sum(times * t.numel() * t.element_size() for t, times in tensors)
        return Work(counter.get_total_flops(), moved)
