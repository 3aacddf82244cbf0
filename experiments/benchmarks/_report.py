"""What the benchmarks write: figures reached or missed, profiles, a record and its page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _bench import Ceilings, Options, Program, seconds_of, short
from torch.profiler import ProfilerActivity

from pyro_gpvae.core._environment import environment
from pyro_gpvae.core._files import write_json, write_text


@dataclass(frozen=True)
class Target:
    """A figure to reach: at most the limit, or at least."""

    name: str
    limit: float
    measured: float | None
    at_least: bool = False

    @property
    def reached(self) -> bool | None:
        """None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        bound = f"at {'least' if self.at_least else 'most'} {self.limit:g}"
        if self.measured is None:
            return f"not measured: {self.name} ({bound})"
        verdict = "reached" if self.reached else "**missed**"
        return f"{verdict}: {self.name}, {short(self.measured)} ({bound})"


def profile(program: Program, device: torch.device, seconds: float, rows: int = 8) -> str:
    """Where a program spends its time: the operators with most time of their own, as Markdown."""
    calls = min(max(3, round(seconds / seconds_of(program, device, 3))), 100)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        seconds_of(program, device, calls)
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # on a GPU, annotations cover what the kernels inside them count again
    events = [
        event
        for event in found.key_averages()
        if event.device_type.name.lower() == device.type
        and not (device.type == "cuda" and event.is_user_annotation)
    ]
    total = sum(getattr(event, own) for event in events) or 1
    events.sort(key=lambda event: -getattr(event, own))
    lines = ["| operator | share | calls |", "|---|--:|--:|"]
    lines += [
        f"| `{event.key[:40]}` | {getattr(event, own) / total:.1%} | {event.count / calls:g} |"
        for event in events[:rows]
    ]
    return "\n".join(lines)


@dataclass
class Report:
    """A record and its page: targets, then tables; device and threads are named."""

    name: str
    title: str
    options: Options
    caption: str
    ceilings: Ceilings
    targets: list[Target] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """Writes NAME_DEVICE.json and .md to the folder of results."""
        device = self.options.on()
        where = environment(device)
        # names, not paths, which are a machine's own
        options = {k: v.name if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        options.pop("out")
        targets = [asdict(target) | {"reached": target.reached} for target in self.targets]
        record = {**options, **where, "ceilings": asdict(self.ceilings), "targets": targets}
        name = f"{self.name}_{device.type}"
        self.options.out.mkdir(parents=True, exist_ok=True)
        write_json(self.options.out / f"{name}.json", record | self.record)
        lines = [f"# {self.title}", "", *(f"* {target}" for target in self.targets), ""]
        for heading, table in self.tables.items():
            lines += [f"## {heading}", "", table, ""]
        threads = f"{where['threads']} thread{'s' if where['threads'] != 1 else ''}"
        text = (
            f"{self.caption} Median (quartiles) of {self.options.rounds} rounds, in which all "
            "variants take turns in random order; ratios are taken within a round. "
            f"{where['device']}, {threads}, torch {where['versions']['torch']}. Ceilings "
            f"measured in the same run: {self.ceilings.gflops:,.0f} GFLOP/s (matrix product), "
            f"{self.ceilings.gb_per_second:,.0f} GB/s (copy)."
        )
        page = "\n".join([*lines, " ".join(text.split()), ""])
        write_text(self.options.out / f"{name}.md", page)
        print(page)
