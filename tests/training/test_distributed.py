"""The script for several processes: two of them find the parameters of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "distributed_training.py"


@pytest.mark.slow
def test_two_processes_find_the_parameters_of_one(tmp_path):
    # a point as posterior draws nothing: all that differs is the order of sums
    (tmp_path / "point.py").write_text(
        "import pyro, torch\n"
        "import pyro.distributions as dist\n"
        "class Point(torch.nn.Module):\n"
        "    def __init__(self, model):\n"
        "        super().__init__()\n"
        "        self.net = torch.nn.Linear(784, model.latent_dim)\n"
        "    def forward(self, x):\n"
        "        with pyro.plate('data', len(x)):\n"
        "            pyro.sample('z', dist.Delta(self.net(x.flatten(1)), event_dim=1))\n"
    )
    found = []
    for count in (1, 2):
        out = tmp_path / f"weights-{count}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
        command += ["--standalone", str(SCRIPT), "--guide=point:Point", "--latent-dim=2"]
        command += ["--train-images=32", "--batch-size=8", "--epochs=2", f"--out={out}"]
        path = f"{SCRIPT.parents[1]}:{tmp_path}"
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    for role in ("model", "guide"):
        for name, tensor in one[role].items():
            torch.testing.assert_close(two[role][name], tensor, rtol=1e-4, atol=1e-6)
