"""The scripts of experiments/ are no package: each of its folders is put on the path."""

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
for room in ("tables", "sweep", "studies", "reliability", "benchmarks"):
    sys.path.insert(0, str(EXPERIMENTS / room))
