"""Reports of runs: demo, gap, uncertainty, generation. What they write, refuse and resume."""

import json
import math
import re

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
from matplotlib.image import imread
from scipy import stats
from torch import nn

from pyro_gpvae import RunConfig, evaluate_run, load_run, train_run
from pyro_gpvae.core._files import read_json
from pyro_gpvae.evaluation import gap
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.runs import gap_report, generation_report, uncertainty_report
from pyro_gpvae.runs.demo import DEMO_FILES, run_demo
from pyro_gpvae.runs.gap_report import (
    GAP_FILES,
    gap_markdown,
    measure_gaps,
    read_table,
    report_gaps,
    summarise,
)
from pyro_gpvae.runs.generation_report import GENERATION_FILES, report_generation
from pyro_gpvae.runs.uncertainty_report import report_uncertainty

TINY = {
    "latent_dim": 2, "epochs": 1, "train_images": 32, "test_images": 9, "num_samples": 2,
    "decoder": "fc", "device": "cpu",
}  # fmt: skip
BUDGET = {"num_samples": 20, "reference_samples": 30}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for guide in ("vae", "gp"):
        train_run(RunConfig(guide=guide, seed=3, **TINY), folder / guide, progress=False)
    return folder


def words(text):
    """Without the spaces that align the columns of a table."""
    return " ".join(text.split())


def check_pictures(folder, names):
    for name in names:
        pixels = imread(folder / name)[..., :3]
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 0.01, f"{name} is blank"


class TestDemo:
    @pytest.mark.slow
    def test_it_writes_every_file_it_promises(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = {"train_images": 64, "test_images": 8, "num_samples": 3, "latent_dim": 2}
        options |= {"epochs": 2, "progress": False, "device": "cpu"}
        (tmp_path / "report" / "vae.partial").mkdir(parents=True)  # of a demo that was stopped
        metrics = run_demo("report", quick=True, gap_images=1, **options)
        printed = capsys.readouterr().out
        folder = tmp_path / "report"
        assert sorted(path.name for path in folder.iterdir()) == sorted(DEMO_FILES)
        assert json.loads((folder / "metrics.json").read_text()) == metrics
        text = (folder / "README.md").read_text()
        assert metrics["caption"].startswith(
            "QUICK DEMO, budget cut: mnist5k: 64 training and 8 test images, p = 2, 2 epochs"
        )
        assert metrics["caption"] in printed
        assert metrics["caption"] in text
        for picture in re.findall(r"\]\((\S+\.png)\)", text):
            check_pictures(folder, [picture])
        assert [row["method"] for row in metrics["methods"]] == ["VAE at half time", "VAE", "GPVAE"]
        assert [row["epochs"] for row in metrics["methods"]] == [1, 2, 2], "equal training"
        for name in ("vae", "gpvae"):
            config = read_json(folder / name / "config.json")
            assert (config["warm_start"], config["epochs"]) == ("report/start", 1)
        gp, vae = (pd.read_csv(folder / name / "scores.csv")["elbo"] for name in ("gpvae", "vae"))
        difference = gp - vae
        assert metrics["gpvae_minus_vae"]["elbo"] == pytest.approx(
            {"mean": difference.mean(), "standard_error": difference.std() / 8**0.5}
        )
        assert f"ELBO: {difference.mean():+.2f} ±" in printed
        gaps = read_table(folder / "gap" / "gap.csv").set_index("label")["amortisation"]
        assert metrics["methods"][2]["amortisation"] == gaps["GPVAE"]
        again = evaluate_run("report/gpvae")
        assert again["scores"]["log_evidence"] == again["recorded"]["log_evidence"]
        with pytest.raises(ValueError, match="epochs must be even"):
            run_demo("report", epochs=3)


def two_seeds():
    """Gaps of two seeds of one guide, and of one seed of another, on four images."""
    rows = []
    for run, label, level in (("a", "gp", 1.0), ("b", "gp", 3.0), ("c", "vae", 5.0)):
        for image in range(4):
            row = dict.fromkeys((*gap_report.QUANTITIES, *gap.LADDER), level + image)
            row |= {"run": run, "label": label, "image": image, "converged": True}
            rows.append(row | {"pareto_k": 0.1, "family": "diagonal", "seed": 0, "guide": label})
    return pd.DataFrame(rows)


class TestGap:
    def test_seeds_are_averaged_and_their_deviation_is_given(self):
        summary = summarise(two_seeds()).set_index(["label", "quantity"]).loc[("gp", "gap")]
        assert summary["mean"] == 3.5
        assert summary["sd"] == pytest.approx(math.sqrt(2))
        assert summary["seeds"] == 2
        assert "3.50 ± 1.41" in gap_markdown(two_seeds(), "")

    def test_unknown_costs_are_named(self):
        table = two_seeds().assign(kl_global=math.nan)
        assert "| not known | 8 of 8 |" in words(gap_markdown(table, ""))

    @pytest.mark.slow
    def test_a_stopped_measurement_continues(self, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(gap, "BATCH", 4)
        monkeypatch.setattr(gap_report, "BATCH", 4)
        folders, out = [runs / "vae", runs / "gp"], tmp_path / "out"
        expected, _ = measure_gaps(folders, tmp_path / "whole", BUDGET, progress=False)
        assert expected["image"].tolist() == [*range(9)] * 2
        starts = []

        def stop(*args, first_image, **options):
            starts.append(first_image)
            if len(starts) == 3:
                raise KeyboardInterrupt
            return decompose(*args, first_image=first_image, **options)

        monkeypatch.setattr(gap_report, "decompose", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_gaps(folders, out, BUDGET, progress=False)
        found, _ = measure_gaps(folders, out, BUDGET, progress=False)
        assert starts == [0, 4, 8, 8, 0, 4, 8], "what was finished is not repeated"
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        measure_gaps(folders[:1], out, BUDGET, num_images=8, progress=False)
        assert len(starts) == 7, "nor what other runs and fewer images need"
        measure_gaps(folders[:1], out, BUDGET | {"seed": 1}, num_images=4, progress=False)
        assert len(starts) == 8, "another budget is another measurement"

    def test_a_damaged_chunk_is_measured_again(self, runs, tmp_path):
        def measure():
            return measure_gaps([runs / "vae"], tmp_path, BUDGET, num_images=4, progress=False)[0]

        expected = measure()
        (chunk,) = (tmp_path / "chunks").iterdir()
        whole = chunk.read_bytes()
        lines = whole.splitlines(keepends=True)
        for damaged in (b"".join(lines[:-1]), whole[:-20], b"", b"".join(lines[1:])):
            chunk.write_bytes(damaged)
            with pytest.warns(UserWarning, match=f"{chunk.name} is damaged.*again"):
                found = measure()
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
            assert chunk.read_bytes() == whole

    @pytest.mark.slow
    def test_it_writes_tables_and_a_picture_and_replaces_them_only_when_told(self, runs, tmp_path):
        budget = BUDGET | {"num_chains": 2, "num_steps": 3, "seed": 0}
        options = {"budget": budget, "num_images": 4, "progress": False}
        text = report_gaps([runs / "vae", runs / "gp"], tmp_path, **options)
        record, table = read_json(tmp_path / "gap.json"), read_table(tmp_path / "gap.csv")
        assert record["budget"]["num_chains"] == 2
        assert [run["config"]["guide"] for run in record["runs"]] == ["vae", "gp"]
        assert {"versions", "commit", "device"} <= set(record)
        assert len(table) == 8
        assert bool(table[["annealed", "refined", "elbo"]].notna().all(axis=None))
        assert (tmp_path / "gap.md").read_text() == text
        assert "32 training and 4 test images" in text
        assert "| `gp` | -" in words(text)
        check_pictures(tmp_path, ["gap.png"])

        (tmp_path / "thesis.tex").write_text("mine")
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert {path.name for path in before} > {*GAP_FILES, "thesis.tex"}
        with pytest.raises(FileExistsError, match=r"gap\.csv belongs to an earlier .*--overwrite"):
            report_gaps([runs / "absent"], tmp_path, **options)
        assert before == {path: path.read_bytes() for path in before}, "refused before the work"
        report_gaps([runs / "vae"], tmp_path, overwrite=True, **options)
        assert len(read_table(tmp_path / "gap.csv")) == 4
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    def test_bad_runs(self, runs, tmp_path):
        with pytest.raises(ValueError, match="different run folders"):
            measure_gaps([runs / "vae", runs / "vae"], tmp_path, BUDGET)
        with pytest.raises(ValueError, match="images must be at least 1, got 0"):
            measure_gaps([runs / "vae"], tmp_path, BUDGET, num_images=0)
        with pytest.raises(FileNotFoundError, match="absent"):
            measure_gaps([runs / "absent"], tmp_path, BUDGET)


UNCERTAINTY = BUDGET | {"images": 9, "bootstrap": 50, "seed": 0, "progress": False}


class TestUncertainty:
    def test_it_writes_scores_correlations_and_pictures(self, runs, tmp_path):
        text = report_uncertainty(runs / "gp", tmp_path, **UNCERTAINTY)
        record = read_json(tmp_path / "uncertainty.json")
        table = read_table(tmp_path / "uncertainty.csv")
        assert (tmp_path / "uncertainty.md").read_text() == text
        assert {*uncertainty_report.SCORES, "gap", "converged"} <= set(table.columns)
        kept = table[table["converged"]]
        for row in record["correlations"]:
            expected = stats.spearmanr(kept[row["score"]], kept[row["against"]]).statistic
            assert row["rho"] == pytest.approx(expected)
            assert row["num_images"] == len(kept)
        assert len(record["correlations"]) == 2 * len(uncertainty_report.SCORES)
        check_pictures(tmp_path, ["uncertain.png", "scatter.png", "posterior.png"])

    @pytest.mark.parametrize(
        ("guide", "images", "message"),
        [
            ("vae", 9, "GaussianGuide has no uncertainty"),
            ("gp", 5, r"at least 8 images, got 5 \(images = 5, of 9 test"),
        ],
    )
    def test_a_refusal_comes_before_the_work(
        self, guide, images, message, runs, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(uncertainty_report, "measure_gaps", None)
        with pytest.raises(ValueError, match=message):
            report_uncertainty(runs / guide, tmp_path, **UNCERTAINTY | {"images": images})

    def test_an_encoder_of_constant_uncertainty_has_no_correlation(self):
        generator = np.random.default_rng(0)
        table = pd.DataFrame({name: np.arange(12.0) for name in uncertainty_report.SCORES})
        table = table.assign(
            gap=generator.exponential(size=12), converged=True, amortisation=1.0 * np.arange(12)
        )
        table["uncertainty"] = 0.0
        found = uncertainty_report.correlate(table, 50)
        assert found[found["score"] == "uncertainty"]["rho"].isna().all()
        assert found[found["score"] != "uncertainty"]["rho"].notna().all()
        assert "| Σ v/h² + r | – | – |" in words(uncertainty_report.correlation_markdown(found))


class NoDensity(nn.Module):
    """A user's guide without posterior(x)."""

    def __init__(self, model):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(model.image_shape), 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def generate(run, out, **options):
    options = {"samples": 6, "steps": 5, "progress": False} | options
    text = report_generation(run, out, **options)
    with np.load(out / "arrays.npz") as saved:
        return dict(saved), read_json(out / "latent.json"), text


class TestGeneration:
    def test_it_writes_what_it_promises(self, runs, tmp_path):
        out = tmp_path / "out"
        arrays, record, _ = generate(runs / "vae", out, images=(4, 0, 7))
        assert sorted(path.name for path in out.iterdir()) == sorted(GENERATION_FILES)
        check_pictures(out, [name for name in GENERATION_FILES if name.endswith(".png")])
        for name in ("samples", "reconstructions", "interpolations", "traversals"):
            assert arrays[name].shape[-3:] == (1, 28, 28)
            assert arrays[f"{name}_z"].shape == (*arrays[name].shape[:-3], 2)
        assert arrays["interpolations"].shape[:2] == arrays["traversals"].shape[:2] == (2, 5)
        assert arrays["image_index"].tolist() == record["image_index"] == [4, 0, 7]
        ends, mean = arrays["interpolations_z"][:, [0, -1]], arrays["reconstructions_z"]
        np.testing.assert_allclose(ends, np.stack([mean[:2], mean[1:]], 1), rtol=1e-5, atol=1e-6)
        assert arrays["traversals_z"][1, :, 1].tolist() == [-3, -1.5, 0, 1.5, 3]
        assert record["seed"] == record["run"]["config"]["seed"] == 3
        assert record["active_units"]["num_images"] == 9
        # the figures show the arrays, and their captions say what they show
        units = record["active_units"]
        run = load_run(runs / "vae")
        figures = generation_report._figures(arrays, run, "spherical", units, record["caption"])
        for name, figure in figures.items():
            said = " ".join(text.get_text() for text in figure.texts).replace("\xa0", " ")
            for part in ("Guide vae", "p = 2", "1 epochs, seed 3", "Draws: seed 3"):
                assert part in said.replace("\n", " "), f"{name} does not say {part}"
        shown = np.asarray(figures["samples.png"].axes[0].images[0].get_array())
        np.testing.assert_allclose(shown[:28, :28], arrays["samples"][0, 0].clip(0, 1))

    def test_it_repeats_itself_and_keeps_folders(self, runs, tmp_path):
        first, _, _ = generate(runs / "vae", tmp_path / "first")
        again, _, _ = generate(runs / "vae", tmp_path / "again")
        for name, array in first.items():
            np.testing.assert_array_equal(array, again[name])
        with pytest.raises(FileExistsError, match="not empty"):
            generate(runs / "vae", tmp_path / "again")
        options = {"overwrite": True, "path": "linear", "seed": 4}
        other, record, _ = generate(runs / "vae", tmp_path / "again", **options)
        assert (record["path"], record["seed"], record["run"]["config"]["seed"]) == ("linear", 4, 3)
        assert (first["samples"] != other["samples"]).any()
        np.testing.assert_array_equal(first["reconstructions"], other["reconstructions"])
        (tmp_path / "again" / "precious.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"precious\.txt"):
            generate(runs / "vae", tmp_path / "again", overwrite=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": (0, 12)}, "12 is not between 0 and 8"),
            ({"images": (1,)}, "at least 2 of 9"),
            ({"samples": 0}, "num_images must be at least 1"),
        ],
    )
    def test_it_refuses_and_leaves_nothing(self, runs, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            generate(runs / "vae", tmp_path / "out", **options)
        assert list(tmp_path.iterdir()) == []

    def test_colour_bernoulli_and_a_guide_without_density(self, tmp_path):
        pixels = np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "colour.npz", train=pixels[:30], test=pixels[30:])
        options = {"data": str(tmp_path / "colour.npz"), "train_images": None, "test_images": None}
        guide = f"{__name__}:NoDensity"
        config = RunConfig(**TINY | options, guide=guide, likelihood="bernoulli")
        train_run(config, tmp_path / "run", progress=False)
        with pytest.raises(ValueError, match="--trust-guide"):
            generate(tmp_path / "run", tmp_path / "out")
        arrays, _, text = generate(tmp_path / "run", tmp_path / "out", trust_guide=True)
        assert arrays["samples"].shape == (6, 3, 32, 32)
        assert set(np.unique(arrays["samples_noise"])) == {0.0, 1.0}
        assert "active units" in text
