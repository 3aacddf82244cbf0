"""The smaller experiments run, with tiny settings, and write what they promise."""

import os
import subprocess
import sys
from pathlib import Path

import gradient_variance
import pytest
import rme_ablation

from pyro_gpvae import load_data
from pyro_gpvae.core._files import read_json


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    few = load_data("mnist5k").take(train=96, test=8)
    for module in (gradient_variance, rme_ablation):
        monkeypatch.setattr(module, "load_data", lambda name: few)


def test_gradient_variance(tmp_path):
    options = gradient_variance.Options(epochs=1, draws=3, latent_dim=2, batch=8, out=tmp_path)
    gradient_variance.main(options)
    variances = read_json(tmp_path / "gradient_variance.json")["variances"]
    assert list(variances) == list(gradient_variance.ESTIMATORS)
    assert all(value > 0 for row in variances.values() for value in row.values())
    text = (tmp_path / "gradient_variance.md").read_text()
    assert "| functions, analytic KL | 1 | 1 |" in text
    assert "3 draws, seed 0" in text


def test_rme_ablation(tmp_path, monkeypatch):
    monkeypatch.setattr(rme_ablation, "GUIDES", ("vae", "rme:2"))
    options = rme_ablation.Options(epochs=1, latent_dim=2, validation=16, out=tmp_path)
    rme_ablation.main(options)
    scores = read_json(tmp_path / "rme_ablation.json")["scores"]
    assert set(scores) == {"vae", "rme:2"}
    assert "16 held-out training digits" in (tmp_path / "rme_ablation.md").read_text()


def test_twenty_kills_lose_nothing(tmp_path):
    # in a process of its own: it forks, which torch survives only before its threads have run
    script = Path(__file__).parents[2] / "experiments" / "reliability" / "crash_campaign.py"
    done = subprocess.run(
        [sys.executable, script, "--kills=20", f"--out={tmp_path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read_json(tmp_path / "crash_campaign.json")["summary"]
    assert summary["kills"] == 20
    assert summary["inside_a_checkpoint"] > 0
    assert "All promises were kept." in done.stdout
