"""What numbers depend on apart from their options: versions, commit, device and data."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the versions, commit and device, on which numbers may depend."""
    versions = {"python": platform.python_version()}
    for package in ("pyro-gpvae", "torch", "pyro-ppl", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            versions[package] = "unknown"
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Returns the name of the processor; on Linux, Python itself only knows the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Returns the commit of this package's checkout, with "+" if files have changed since.

    It is None if the package does not lie in a checkout.
    """
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not merely inside another repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sha256(*data: Tensor) -> str:
    """Returns the SHA-256 of the values of tensors, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in data:
        for part in tensor.split(4096):  # they may be more than memory holds
            flat = part.cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            # as bytes, because numpy has no bfloat16
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
