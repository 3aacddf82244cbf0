"""Reports of runs: demo, gap, uncertainty, generation. What they write, refuse and resume."""

import base64
import html
import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.image import imread
from scipy import stats
from torch import nn

from pyro_gpvae import ImageModel, RunConfig, evaluate_run, load_data, load_run, train_run
from pyro_gpvae.core._files import read_json
from pyro_gpvae.evaluation import gap
from pyro_gpvae.evaluation.gap import decompose
from pyro_gpvae.evaluation.generation import reconstruct
from pyro_gpvae.runs import gap_report, sections, uncertainty_report
from pyro_gpvae.runs.demo import DEMO_FILES, run_demo
from pyro_gpvae.runs.gap_report import (
    GAP_FILES,
    gap_sections,
    measure_gaps,
    report_gaps,
    summarise,
)
from pyro_gpvae.runs.generation_report import GENERATION_FILES, report_generation
from pyro_gpvae.runs.programs import labels_of, open_run, open_runs
from pyro_gpvae.runs.report import Report, Section
from pyro_gpvae.runs.run_report import report_runs
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


def cells(path):
    """The texts of the cells in an HTML file."""
    found = re.findall("<td.*?>(.*?)</td>", path.read_text(encoding="utf-8"), re.DOTALL)
    return [html.unescape(re.sub("<.*?>", "", cell)) for cell in found]


def check_page(path, pictures):
    """The file has so many pictures, and refers to no other file and no network."""
    text = path.read_text(encoding="utf-8")
    sources = re.findall(' src="(.*?)"', text)
    assert len(sources) == pictures
    for picture in sources:
        content = base64.b64decode(picture.removeprefix("data:image/png;base64,"), validate=True)
        assert imread(io.BytesIO(content))[..., :3].std() > 0.01
    assert all(link.startswith("#") for link in re.findall(' href="(.*?)"', text))
    assert "://" not in text  # the letters of a picture may spell http


class TestReport:
    def test_texts_are_escaped_in_html_and_in_markdown_tables(self, tmp_path):
        table = pd.DataFrame({"q": ["`<b>`", "a|b"], "KL": ["1.0 ± 0.1", "–"]})
        section = Section("<script>", ["`code` & 1 < 2"], table)
        report = Report("A & B", "caption <i>", [section])
        report.save(tmp_path, "page.md")
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "<h1>A &amp; B</h1>" in page
        assert "<code>code</code> &amp; 1 &lt; 2" in page
        assert page.count("<script>") == 1, "the one that sorts tables"
        assert cells(tmp_path / "report.html") == ["<b>", "1.0 ± 0.1", "a|b", "–"]
        markdown = words((tmp_path / "page.md").read_text(encoding="utf-8"))
        assert "| `<b>` | 1.0 ± 0.1 | | a\\|b | – |" in markdown

    @pytest.mark.parametrize("width", ["80", "120"])
    def test_it_is_printed_in_the_width_of_the_terminal(self, width, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", width)
        table = pd.DataFrame([{f"a long name {n}": "12345.6 ± 1.23" for n in range(6)}])
        Report("title", "word " * 60, [Section("part", ["text [b]"], table)]).print()
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= int(width)
        assert "text [b]" in printed
        assert printed.count("12345.6") == 6

    def test_sections_of_figures_print_no_empty_lines(self, capsys):
        Report("title", "a", [Section("figures"), Section("texts", ["b"])]).print()
        assert capsys.readouterr().out == "a\n\nb\n"

    def test_tables_in_the_terminal_have_no_marks_of_code(self, capsys):
        table = pd.DataFrame({"guide": ["`vae`"], "ELBO": ["1.0"]})
        Report("title", "", [Section("part", table=table)]).print()
        printed = capsys.readouterr().out
        assert "vae" in printed
        assert "`" not in printed

    def test_runs_side_by_side(self, runs, tmp_path):
        out = tmp_path / "report.html"
        report_runs([runs / "vae", runs / "gp"], out, images=2, progress=False)
        check_page(out, pictures=1 + 1 + 2 + 2 * 3)
        for name in ("vae", "gp"):
            score = read_json(runs / name / "record.json")["scores"]["elbo"]
            assert f"{score:.1f}" in cells(out)
        assert not (tmp_path / "chunks").exists()
        with pytest.raises(FileExistsError, match="--overwrite"):
            report_runs([runs / "vae"], out, images=0)
        with pytest.raises(ValueError, match="different run folders, got 2"):
            report_runs([runs / "vae"] * 2, out, images=0, overwrite=True)
        report_runs([runs / "vae"], out, images=0, overwrite=True)
        check_page(out, pictures=4)

    def test_a_table_that_is_too_wide_is_printed_as_columns(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        wide = pd.DataFrame([{"guide": "vae"} | {f"quantity {n}": f"{n}234.5" for n in range(9)}])
        Report("title", "", [Section("part", table=wide)]).print()
        printed = capsys.readouterr().out
        for n in range(9):
            assert f"quantity {n}" in printed
            assert f"{n}234.5" in printed

    def test_runs_of_one_guide_are_named_by_their_folders(self, runs):
        run = load_run(runs / "vae")
        assert labels_of([run, load_run(runs / "gp")]) == ["vae", "gp"]
        assert labels_of([run, run]) == [str(runs / "vae")] * 2


def own_programs():
    """A model and a guide that were trained elsewhere; the guide is no module."""
    torch.manual_seed(0)
    model = ImageModel(
        (1, 28, 28), 2, nn.Sequential(nn.Linear(2, 784), nn.Unflatten(1, (1, 28, 28)))
    )
    return model, SimpleNamespace(
        posterior=lambda x: dist.Normal(x.mean((1, 2, 3))[:, None].expand(-1, 2), 0.5).to_event(1)
    )


class TestOwnPrograms:
    SPEC = f"{__name__}:own_programs"

    def test_they_are_measured_as_in_python(self, tmp_path):
        options = {"budget": BUDGET | {"num_chains": 0, "num_steps": 1, "seed": 0}}
        options |= {"num_images": 3, "progress": False, "trust_guide": True}
        report = report_gaps([self.SPEC], tmp_path, **options)
        assert "trained elsewhere" in report.caption
        model, guide = own_programs()
        images = load_data("mnist5k").test[:3]
        expected = decompose(model.eval(), guide, images, num_train=4000, **options["budget"])
        found = pd.read_csv(tmp_path / "gap.csv")
        assert found["elbo"].to_list() == pytest.approx(expected.elbo.tolist())
        report_runs([self.SPEC], tmp_path / "r.html", images=0, progress=False, trust_guide=True)
        check_page(tmp_path / "r.html", pictures=3)

    @pytest.mark.parametrize(
        ("spec", "options", "message"),
        [
            (SPEC, {}, "pass --trust-guide"),
            (
                f"{__name__}:absent",
                {"trust_guide": True},
                r"AttributeError.*\(model, guide",
            ),
            (f"{__name__}:two_numbers", {"trust_guide": True}, "model of type int"),
            ("absent_module:f", {"trust_guide": True}, "No module named 'absent_module'"),
        ],
    )
    def test_what_cannot_be_opened_is_named(self, spec, options, message):
        with pytest.raises(ValueError, match=message):
            open_run(spec, **options)

    def test_other_images_are_refused(self, tmp_path):
        np.savez(
            tmp_path / "a.npz",
            train=np.zeros((4, 8, 8), np.uint8),
            test=np.zeros((2, 8, 8), np.uint8),
        )
        with pytest.raises(ValueError, match="name its own with --data"):
            open_run(self.SPEC, trust_guide=True, data=str(tmp_path / "a.npz"))


def two_numbers():
    return 1, 2


class TestDemo:
    @pytest.mark.slow
    def test_it_writes_every_file_it_promises(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        options = {"train_images": 64, "test_images": 8, "num_samples": 3, "latent_dim": 2}
        options |= {"epochs": 2, "progress": False, "device": "cpu"}
        (tmp_path / "report" / "vae.partial").mkdir(parents=True)  # of a demo that was stopped
        report = run_demo("report", quick=True, gap_images=2, **options)
        folder = tmp_path / "report"
        assert sorted(path.name for path in folder.iterdir()) == sorted(DEMO_FILES)
        text = (folder / "README.md").read_text()
        assert report.caption.startswith(
            "QUICK DEMO, budget cut: mnist5k: 64 training and 8 test images, p = 2, 2 epochs"
        )
        assert report.caption in text
        pictures = re.findall(r"\]\((\S+\.png)\)", text)
        check_pictures(folder, pictures)
        check_page(folder / "report.html", len(pictures))
        for name in ("vae", "gp", "newton"):
            config = read_json(folder / name / "config.json")
            assert (config["warm_start"], config["epochs"]) == ("report/start", 1)
        table = pd.read_csv(folder / "gap.csv").set_index("label")
        for label in ("VAE", "GPVAE", "newton:1"):
            log_evidence = table.loc[label, "log_evidence"].mean()
            assert f"| {label} | 2 | {log_evidence:.1f} |" in words(text)
        difference = table.loc["GPVAE", "log_evidence"] - table.loc["VAE", "log_evidence"].values
        assert f"GPVAE - VAE, log p(x): {difference.mean():+.2f} ±" in report.sections[0].text[1]
        again = evaluate_run("report/gp")
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
            rows.append(row | {"pareto_k": 0.1, "trusted": True, "family": "diagonal"})
    return pd.DataFrame(rows)


def gap_rows(table):
    return words(Report("", "", gap_sections(table)).markdown())


class TestGap:
    def test_seeds_are_averaged_and_their_deviation_is_given(self):
        summary = summarise(two_seeds()).set_index(["label", "quantity"]).loc[("gp", "gap")]
        assert summary["mean"] == 3.5
        assert summary["sd"] == pytest.approx(math.sqrt(2))
        assert summary["seeds"] == 2
        assert "3.50 ± 1.41" in gap_rows(two_seeds())

    def test_unknown_costs_are_named(self):
        table = two_seeds().assign(kl_global=math.nan)
        assert "| not known | 8 of 8 |" in gap_rows(table)

    @pytest.mark.slow
    def test_a_stopped_measurement_continues(self, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(gap, "BATCH", 4)
        monkeypatch.setattr(gap_report, "BATCH", 4)
        opened, out = open_runs([runs / "vae", runs / "gp"]), tmp_path / "out"
        expected = measure_gaps(opened, tmp_path / "whole", BUDGET, progress=False)
        assert expected["image"].tolist() == [*range(9)] * 2
        starts = []

        def stop(*args, first_image, **options):
            starts.append(first_image)
            if len(starts) == 3:
                raise KeyboardInterrupt
            return decompose(*args, first_image=first_image, **options)

        monkeypatch.setattr(gap_report, "decompose", stop)
        with pytest.raises(KeyboardInterrupt):
            measure_gaps(opened, out, BUDGET, progress=False)
        found = measure_gaps(opened, out, BUDGET, progress=False)
        assert starts == [0, 4, 8, 8, 0, 4, 8], "what was finished is not repeated"
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        measure_gaps(opened[:1], out, BUDGET, num_images=8, progress=False)
        assert len(starts) == 7, "nor what other runs and fewer images need"
        measure_gaps(opened[:1], out, BUDGET | {"seed": 1}, num_images=4, progress=False)
        assert len(starts) == 8, "another budget is another measurement"

    def test_a_damaged_chunk_is_measured_again(self, runs, tmp_path):
        def measure():
            return measure_gaps([run], tmp_path, BUDGET, num_images=4, progress=False)

        run = load_run(runs / "vae")
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
        report = report_gaps([runs / "vae", runs / "gp"], tmp_path, **options)
        text = (tmp_path / "gap.md").read_text()
        record, table = read_json(tmp_path / "gap.json"), pd.read_csv(tmp_path / "gap.csv")
        assert record["budget"]["num_chains"] == 2
        assert [run["config"]["guide"] for run in record["runs"]] == ["vae", "gp"]
        assert {"versions", "commit", "device"} <= set(record)
        assert len(table) == 8
        assert bool(table[["annealed", "refined", "elbo"]].notna().all(axis=None))
        assert report.markdown() == text
        check_page(tmp_path / "report.html", pictures=1)
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
        assert len(pd.read_csv(tmp_path / "gap.csv")) == 4
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    def test_bad_runs(self, runs, tmp_path):
        with pytest.raises(ValueError, match="different run folders"):
            open_runs([runs / "vae", runs / "vae"])
        with pytest.raises(ValueError, match="images must be at least 1, got 0"):
            report_gaps([runs / "vae"], tmp_path, BUDGET, num_images=0)
        with pytest.raises(FileNotFoundError, match="absent"):
            report_gaps([runs / "absent"], tmp_path, BUDGET)


UNCERTAINTY = BUDGET | {"images": 9, "bootstrap": 50, "seed": 0, "progress": False}


class TestUncertainty:
    def test_it_writes_scores_correlations_and_pictures(self, runs, tmp_path):
        report = report_uncertainty(runs / "gp", tmp_path, **UNCERTAINTY)
        record = read_json(tmp_path / "uncertainty.json")
        table = pd.read_csv(tmp_path / "uncertainty.csv")
        assert (tmp_path / "uncertainty.md").read_text() == report.markdown()
        check_page(tmp_path / "report.html", pictures=3)
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
        shown = uncertainty_report.correlation_table(found)
        assert shown.iloc[0].to_list() == ["Σ v/h² + r", "–", "–"]


class NoDensity(nn.Module):
    """A user's guide without posterior(x)."""

    def __init__(self, model):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(model.image_shape), 2))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def generate(run, out, **options):
    report = report_generation(run, out, **{"samples": 6} | options)
    return report, read_json(out / "generated.json")


def pixels(report):
    """The pixels of all figures."""
    figures = [f for section in report.sections for f in section.figures.values()]
    drawn = [np.asarray(axes.images[0].get_array()) for f in figures[:2] for axes in f.axes]
    return np.concatenate([image.ravel() for image in drawn])


class TestGeneration:
    def test_it_writes_what_it_promises(self, runs, tmp_path):
        out = tmp_path / "out"
        report, record = generate(runs / "vae", out, images=(4, 0, 7))
        assert sorted(path.name for path in out.iterdir()) == sorted(GENERATION_FILES)
        check_pictures(out, [name for name in GENERATION_FILES if name.endswith(".png")])
        check_page(out / "report.html", pictures=3)
        assert record["image_index"] == [4, 0, 7]
        assert record["seed"] == record["run"]["config"]["seed"] == 3
        for section in report.sections:
            for name, figure in section.figures.items():
                said = " ".join(text.get_text() for text in figure.texts).replace("\xa0", " ")
                for part in ("Guide vae", "p = 2", "1 epochs, seed 3", "Draws: seed 3"):
                    assert part in said.replace("\n", " "), f"{name} does not say {part}"
        run = load_run(runs / "vae")
        (axes,) = report.sections[0].figures["reconstructions.png"].axes
        shown = axes.images[0].get_array()[..., 0]
        test = run.data.test[[4, 0, 7], 0].numpy() / 255
        decoded = reconstruct(run.model, run.guide, run.data.test[[4, 0, 7]], seed=3)
        for n in range(3):
            column = shown[:, 30 * n : 30 * n + 28]
            np.testing.assert_allclose(column[:28], test[n])
            np.testing.assert_allclose(column[30:58], decoded.images[n, 0].clamp(0, 1), rtol=1e-5)

    def test_it_counts_active_units(self, runs):
        run = load_run(runs / "vae")
        means = reconstruct(run.model, run.guide, run.data.test).z
        active = int((means.var(0) > 0.01).sum())
        assert sections.latent(run, 0).text[0].startswith(f"{active} of 2 latent dimensions")

    def test_it_repeats_itself_and_keeps_folders(self, runs, tmp_path):
        first, _ = generate(runs / "vae", tmp_path / "first")
        again, _ = generate(runs / "vae", tmp_path / "again")
        np.testing.assert_array_equal(pixels(first), pixels(again))
        with pytest.raises(FileExistsError, match="not empty"):
            generate(runs / "vae", tmp_path / "again")
        other, record = generate(runs / "vae", tmp_path / "again", overwrite=True, seed=4)
        assert (record["seed"], record["run"]["config"]["seed"]) == (4, 3)
        assert (pixels(first) != pixels(other)).any()
        (tmp_path / "again" / "precious.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"precious\.txt"):
            generate(runs / "vae", tmp_path / "again", overwrite=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"images": (0, 12)}, "12 is not between 0 and 8"),
            ({"images": ()}, "at least one"),
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
        report, _ = generate(tmp_path / "run", tmp_path / "out", trust_guide=True)
        draws = report.sections[0].figures["samples.png"].axes[1].images[0].get_array()
        assert set(np.unique(draws)) == {0.0, 1.0}
