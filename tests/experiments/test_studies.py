"""The studies run with tiny settings, and their arithmetic is right."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ablation
import crash_campaign
import gradient_variance
import newton
import pytest

from pyro_gpvae import load_data
from pyro_gpvae.core._files import read_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few_digits(monkeypatch):
    few = load_data("mnist5k").take(train=96, test=8)
    for module in (gradient_variance, newton):
        monkeypatch.setattr(module, "load_data", lambda name: few)


@pytest.mark.usefixtures("few_digits")
def test_gradient_variance(tmp_path):
    options = gradient_variance.Options(epochs=1, draws=3, latent_dim=2, batch=8, out=tmp_path)
    gradient_variance.main(options)
    variances = read_json(tmp_path / "gradient_variance.json")["variances"]
    assert list(variances) == list(gradient_variance.ESTIMATORS)
    assert all(value > 0 for row in variances.values() for value in row.values())
    text = (tmp_path / "gradient_variance.md").read_text()
    assert "| functions, analytic KL | 1 | 1 |" in text
    assert "3 draws, seed 0" in text


@pytest.mark.usefixtures("few_digits")
def test_newton(tmp_path, monkeypatch):
    monkeypatch.setattr(newton, "TRAINED", ("vae", "newton:1"))
    monkeypatch.setattr(newton, "UNTRAINED", ("sa:1",))
    monkeypatch.setattr(newton, "END_TO_END", ("newton:1",))
    monkeypatch.setattr(newton, "REPEATS", 1)
    monkeypatch.setattr(newton, "REFERENCE_SAMPLES", 100)
    options = {"epochs": 1, "latent_dim": 2, "num_samples": 5, "seeds": 2, "end_to_end": 1}
    for _ in range(2):  # the second call finds all cells
        newton.main(newton.Options(**options, out=tmp_path))
    rows = read_json(tmp_path / "newton.json")["rows"]
    shares = {(row["seed"], row["guide"]): row.get("share") for row in rows}
    assert len(shares) == len({(row["seed"], row["guide"]) for row in rows}) == 10
    assert shares[0, "encoder of the VAE"] == 0
    text = (tmp_path / "newton.md").read_text()
    assert "| `newton:1` (2) |" in text
    assert "| `newton:1` (1) | equal time | 1 |" in text
    assert (tmp_path / "newton.png").exists()


@pytest.mark.parametrize(
    ("module", "folder"),
    [
        (gradient_variance, "docs/results"),
        (newton, "docs/results"),
        (ablation, "experiments/results"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_committed_pages_are_those_of_the_committed_records(module, folder, tmp_path):
    name, committed = module.__name__, ROOT / folder
    shutil.copy(committed / f"{name}.json", tmp_path)
    module.main(module.Options(render=True, out=tmp_path))
    assert (tmp_path / f"{name}.md").read_text() == (committed / f"{name}.md").read_text()


def row(method, seed=0, epochs=8, score=100.0):
    return {
        "method": method, "seed": seed, "epochs": epochs, "train_images": 4096,
        "validation_images": 256, "num_samples": 100, "log_evidence": score, "elbo": score - 5,
        "sigma": 0.25,
    }  # fmt: skip


def test_scores_over_the_seeds_of_each_method():
    rows = [row("gp", seed, score=110.0 + seed) for seed in range(3)]
    rows += [row("VAE x2", epochs=16), *(row("vae", seed) for seed in range(3))]
    text = ablation.page({"rows": rows})
    assert "Budget cut: 8 epochs" in text, "a control is not the budget"
    assert "| VAE x2 | 100.0 (1 seed) | 95.0 (1 seed) | +0.0 (1 seed) | 0.250 | 16 |" in text
    assert "| gp | 111.0 ± 1.0 | 106.0 ± 1.0 | +11.0 ± 1.0 |" in text
    assert "over 1 to 3 seeds;" in text
    alone = ablation.page({"rows": [row("gp", seed=0), row("vae", seed=1)]})
    assert "| gp | 100.0 (1 seed) | 95.0 (1 seed) | – |" in alone


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    # in a process of its own: it forks, which torch survives only before its threads have run
    script = crash_campaign.__file__
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
