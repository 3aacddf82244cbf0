"""The studies run with tiny settings, and their arithmetic is right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ablation
import compare
import crash_campaign
import gap_table
import gradient_variance
import newton
import pandas as pd
import pytest
import rme_ablation
from _gap_against_time import gap_against_time

from pyro_gpvae import load_data
from pyro_gpvae.core._files import read_json
from pyro_gpvae.runs import gap_report

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few_digits(monkeypatch):
    few = load_data("mnist5k").take(train=96, test=8)
    for module in (gradient_variance, newton, rme_ablation):
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
def test_rme_ablation(tmp_path, monkeypatch):
    monkeypatch.setattr(rme_ablation, "GUIDES", ("vae", "rme:2"))
    options = rme_ablation.Options(epochs=1, latent_dim=2, validation=16, out=tmp_path)
    rme_ablation.main(options)
    scores = read_json(tmp_path / "rme_ablation.json")["scores"]
    assert set(scores) == {"vae", "rme:2"}
    assert "16 held-out training digits" in (tmp_path / "rme_ablation.md").read_text()


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
        (rme_ablation, "docs/results"),
        (compare, "docs/results"),
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


def test_the_committed_gap_table_is_that_of_the_committed_record(tmp_path):
    (tmp_path / "results").mkdir()
    for kind in ("json", "csv"):
        shutil.copy(ROOT / "docs" / "results" / f"gap.{kind}", tmp_path / "results")
    gap_table.main(gap_table.Options(render=True, docs=tmp_path))
    pages = [(f / "results" / "gap.md").read_text() for f in (tmp_path, ROOT / "docs")]
    made, committed = [re.findall(r"-?\d+(?:\.\d+)?", page) for page in pages]
    assert made == committed


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


def comparison():
    def row(seed, guide, decoder, elbo, optimum, ms):
        times = {"ms": ms, "ms_low": ms * 0.9, "ms_high": ms * 1.1, "decoder_passes": ms / 2}
        scores = {"elbo": elbo, "log_evidence": elbo + 5, "monte_carlo_error": 0.1}
        return {
            "seed": seed, "guide": guide, "decoder": decoder, "optimum": optimum,
            "training_seconds": 1.0, **scores, **times,
        }  # fmt: skip

    return {
        "options": {"data": "toy", "latent_dim": 2, "epochs": 3, "num_samples": 5, "seeds": 2},
        "data": {"train_images": 10, "test_images": 4},
        "device": "a processor",
        "threads": 1,
        "rows": [
            row(0, "vae", "end to end", 60.0, 100.0, 2.0),
            row(0, "vlae:1", "VAE's decoder", 92.0, 100.0, 20.0),
            row(1, "vae", "end to end", 50.0, 100.0, 2.0),
            row(1, "vlae:1", "VAE's decoder", 95.0, 100.0, 40.0),
            row(1, "iaf:2", "end to end", 10.0, 120.0, 3.0),
        ],
    }


def test_shares_of_known_gaps():
    table = compare.summarise(comparison()).set_index("guide")
    assert table.loc["vae", "share"] == 0
    # 1 - 8/40 and 1 - 5/50, averaged
    assert table.loc["vlae:1", "share"] == pytest.approx(0.85)
    assert table.loc["vlae:1", "share_sd"] == pytest.approx(0.1 / 2**0.5)
    # another decoder: its own gap of 110 against the VAE's 50 of the same seed
    assert table.loc["iaf:2", "share"] == pytest.approx(1 - 110 / 50)
    text = compare.markdown(compare.summarise(comparison()), compare.caption(comparison()))
    assert "| `vlae:1` | – | – | – | – | 93.5 | 98.5 | 85 ± 7 % | 15.0 |" in text
    assert "| `iaf:2` | 10.0 | 15.0 | 120.0 | -120 % | – | – | – | 1.5 |" in text
    assert "3 epochs (the paper: 2000), K = 5, 2 seeds." in text


def test_the_figure_names_every_guide():
    table = compare.summarise(comparison())
    labels = gap_against_time(table, "caption").axes[-1].get_legend().get_texts()
    assert {label.get_text() for label in labels} == {"vae", "vlae:1", "iaf:2"}
    # a number stands at the points of a family with several guides
    other = table[table["guide"] == "vlae:1"].assign(guide="vlae:0,damping=1", share=0.1)
    axes = gap_against_time(pd.concat([table, other]), "caption").axes[-1]
    labels = [label.get_text() for label in axes.get_legend().get_texts()]
    assert labels == ["vae", "iaf:2", "vlae:0, 1"]
    assert {"0", "1"} <= {text.get_text() for text in axes.texts}


@pytest.mark.slow
def test_a_tiny_comparison_writes_its_files_and_repeats_nothing(tmp_path, capsys):
    options = compare.Options(
        epochs=1, latent_dim=4, train_images=64, test_images=8, num_samples=5,
        guides=("lowrank:4", "vlae:1"), device="cpu", out=tmp_path,
    )  # fmt: skip
    compare.main(options)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"seed-0", "compare.json", "compare.md", "compare.csv", "compare.png"}
    rows = read_json(tmp_path / "compare.json")["rows"]
    assert {(row["guide"], row["decoder"]) for row in rows} == {
        (guide, decoder)
        for guide in ("vae", "lowrank:4", "vlae:1")
        for decoder in ("end to end", "VAE's decoder")
    }
    assert all(row["optimum"] > row["elbo"] for row in rows)
    assert f"training {tmp_path}" in capsys.readouterr().out
    compare.main(options)
    assert f"training {tmp_path}" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_gap_table(tmp_path, capsys, monkeypatch):
    options = gap_table.Options(
        guides=("vae", "gp"), seeds=2, epochs=1, latent_dim=2, train_images=32, images=9,
        num_samples=20, reference_samples=30, ais_chains=0, device="cpu",
        runs=tmp_path / "runs", docs=tmp_path / "docs",
    )  # fmt: skip
    gap_table.main(options)
    printed = capsys.readouterr().out
    assert printed.count(f"training {tmp_path}") == 4
    results = tmp_path / "docs" / "results"
    text = (results / "gap.md").read_text()
    assert text in printed
    assert "`gp`, seed 1:" in text
    for kind in ("md", "json", "csv"):
        assert str(tmp_path) not in (results / f"gap.{kind}").read_text()
    assert (tmp_path / "docs" / "images" / "gap.png").exists()
    # again: nothing is trained or measured, the same table comes out
    monkeypatch.setattr(gap_table, "train_run", None)
    monkeypatch.setattr(gap_report, "decompose", None)
    gap_table.main(options)
    assert (results / "gap.md").read_text() == text
    options.epochs = 2
    with pytest.raises(ValueError, match="epochs = 1, not 2"):
        gap_table.main(options)


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
