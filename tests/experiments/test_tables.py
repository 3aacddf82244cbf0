"""Tables from records with known numbers: every colour, every cell, every refusal."""

import copy
import json
import math
import re
from dataclasses import asdict

import _frames
import _records
import main_table
import numpy as np
import pandas as pd
import pytest
import table4
import table5
import table6
import torch
from _dots import companion_dots, score_dots, time_dots
from _tables import Options, main
from matplotlib.figure import Figure
from scipy.stats import t as student

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.training.step import TrainingStep

SMALL = _records.Table(
    "small", "Small", {"": (_records.Column("mnist", 10),)}, ("vae", "sa:4", "me:2", "gp")
)


def record(guide="vae", score=100.0, seed=0, data="mnist", latent_dim=10, decoder="conv", **config):
    options = asdict(
        RunConfig(
            data=data, guide=guide, seed=seed, latent_dim=latent_dim, decoder=decoder,
            **({"epochs": 20} | config),
        )
    )  # fmt: skip
    return {
        "format": 1,
        "config": options,
        "data": {
            "name": data, "train_images": 1000, "validation_images": 0, "test_images": 100,
            "train_sha256": f"{data}-train", "test_sha256": f"{data}-test",
        },
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "device": "a processor",
        "threads": 1,
        "steps": 160,
        "seconds": {"training": 1.0, "evaluation": 1.0},
        "scores": {
            "log_evidence": score, "elbo": score - 10, "monte_carlo_error": 0.1,
            "sampling_error": 1.0, "num_images": 100, "num_samples": 100, "seed": seed,
        },
    }  # fmt: skip


def write(folder, content):
    folder.mkdir(parents=True)
    write_json(folder / "record.json", content)
    return content


def companion_of(folder, content, own, optimum, **changes):
    """An evaluation with a companion beside a run."""
    parts = {
        "num_images": 50, "num_samples": 100, "validation": "held-out training images",
        "own": {"elbo": own - 10, "log_evidence": own},
        "width": {"log_evidence": own + 1, "factor": 1.5},
        "optimum": {"log_evidence": optimum, "not_converged": 1},
        "annealed": {"log_evidence": optimum + 0.1},
    }  # fmt: skip
    evaluation = copy.deepcopy(content) | {
        "run": str(folder),
        "guide": content["config"]["guide"],
        "trained_guide": content["config"]["guide"],
        "recorded": content["scores"],
        "companion": parts | changes,
    }
    write(folder.with_name(f"{folder.name}-companion"), evaluation)


def values(mean, sd, count, rng):
    """Numbers with exactly this mean and standard deviation."""
    noise = rng.normal(size=count)
    return mean + sd * (noise - noise.mean()) / noise.std(ddof=1)


def make(table, folder, out, **options):
    main(table, Options(records=(folder,), out=out, **options))
    return pd.read_csv(out / f"{table.name}.csv", keep_default_na=False, na_values=[""])


def published4():
    return pd.read_csv(_frames.PUBLISHED / "table4.csv", comment="#")


@pytest.fixture(scope="module")
def full4(tmp_path_factory):
    """10 runs for each cell of Table 4, with the published means and standard deviations."""
    folder, rng = tmp_path_factory.mktemp("table4"), np.random.default_rng(0)
    for line in published4().itertuples():
        for seed, score in enumerate(values(line.score, line.sd, 10, rng)):
            write(
                folder / "runs" / f"{line.guide}-{line.latent_dim}-{seed}".replace(":", "-"),
                record(line.guide, score, seed, "cifar10", line.latent_dim, epochs=2000),
            )
    frame = make(table4.TABLE, folder / "runs", folder / "out")
    return folder / "out", frame


def test_table_4_marks_what_a_t_test_by_hand_says(full4):
    out, frame = full4
    published = published4().set_index(["guide", "latent_dim"])
    markdown, latex = ((out / f"table4.{kind}").read_text() for kind in ("md", "tex"))
    blue = 0
    for p in (10, 20, 50):
        best, best_sd = published.loc[("gp", p), ["score", "sd"]].astype(float)
        rows = frame[(frame["latent_dim"] == p) & (frame["role"] == "method")]
        assert len(rows) == 22
        assert rows.loc[rows["mark"] == "best", "guide"].tolist() == ["gp"]
        for row in rows.itertuples():
            mean, sd = published.loc[(row.guide, p), ["score", "sd"]].astype(float)
            assert row.seeds == 10
            assert (row.mean, row.sd) == (pytest.approx(mean), pytest.approx(sd))
            vae = published.loc[("vae", p), "score"]
            assert row.difference_to_vae == pytest.approx(mean - vae)
            assert row.published == mean
            assert row.published_difference_to_vae == pytest.approx(mean - vae)
            score = rf"{mean:.1f} \pm {sd:.1f}"
            if row.guide == "gp":
                assert rf"$\color{{red}}{{\mathbf{{{score}}}}}$" in markdown
                assert rf"\textcolor{{red}}{{\textbf{{{mean:.1f}}}}}$^{{{sd:.1f}}}$" in latex
                continue
            # ten runs each: pooled variance (s₁² + s₂²) / 2, 18 degrees of freedom
            t = (best - mean) / math.sqrt((best_sd**2 + sd**2) / 2 * (2 / 10))
            p_value = 2 * student.sf(abs(t), 18)
            assert row.p == pytest.approx(p_value, rel=1e-6)
            assert row.mark == ("no difference" if p_value > 0.01 else "different")
            line = next(x for x in markdown.splitlines() if x.startswith(f"| {row.method} |"))
            cell = line.split(" | ")[1 + 3 * (10, 20, 50).index(p)]
            if p_value > 0.01:
                blue += 1
                assert cell == rf"$\color{{blue}}{{\mathbf{{{score}}}}}$"
                assert rf"\textcolor{{blue}}{{\textbf{{{mean:.1f}}}}}$^{{{sd:.1f}}}$" in latex
            else:
                assert cell == f"{mean:.1f} ± {sd:.1f}"
                assert f"& {mean:.1f}$^{{{sd:.1f}}}$ &" in latex
    assert blue == 4, "RME(2) to RME(5) for p = 50: both colours are there to be checked"
    assert markdown.count("color{red}") == 3
    assert latex.count("textcolor{red}") == 3


def test_table_4_corrects_over_the_column(full4):
    _, frame = full4
    for p in (10, 20, 50):
        rows = frame[(frame["latent_dim"] == p) & frame["p"].notna()]
        ordered = np.sort(rows["p"].to_numpy())
        corrected = np.maximum.accumulate(np.minimum(1, ordered * np.arange(21, 0, -1)))
        assert np.sort(rows["p_holm"].to_numpy()) == pytest.approx(corrected)
        assert (rows["p_welch"] != rows["p"]).any()


def test_table_4_says_what_was_run(full4):
    out, frame = full4
    markdown = (out / "table4.md").read_text()
    assert "2,000 epochs (the paper: 2,000); K = 100; CIFAR10: 1,000 training and 100 test" in (
        markdown
    )
    assert "10 seeds" in markdown
    controls = frame[frame["role"] == "control"]
    assert set(controls["note"]) == {"not run"}
    assert controls["mean"].isna().all()
    assert "| VAE, 2 × epochs | not run | – | – |" in markdown
    assert "VAE, 2 × epochs: the gradient steps of ME(2)" in markdown
    assert "VAE, 15 × epochs: the gradient steps of RME(5)" in markdown
    assert "scores that separate model from proposal were not run" in markdown
    companion = pd.read_csv(out / "table4_companion.csv")
    assert set(companion["note"]) == {"not run"}
    assert not re.search(r"\d\.\d ±", (out / "table4_companion.md").read_text())
    for name in ("table4", "table4_companion"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        text = (out / f"{name}.tex").read_text()
        assert text.count("{") == text.count("}")
        assert "usepackage{booktabs,xcolor}" in text


def test_latex_has_one_cell_for_each_column(full4):
    for line in (full4[0] / "table4.tex").read_text().splitlines():
        if line.endswith(r"\\"):
            assert len(re.findall(r"(?<!\\)&", line)) == 10, line


def test_no_records_are_no_numbers(tmp_path):
    for table in (table4.TABLE, table5.TABLE, main_table.TABLE):
        main(table, Options(out=tmp_path))
        frame = pd.read_csv(tmp_path / f"{table.name}.csv")
        assert set(frame["note"]) == {"not run"}
        for name in ("mean", "sd", "p", "difference_to_vae"):
            assert frame[name].isna().all()
    assert "| VLAE(4) | not run | – | 605.2 (+41.6) |" in (tmp_path / "table5.md").read_text()
    text = (tmp_path / "main_table.md").read_text()
    assert "| GPVAE | not run | – | 693.2 (+8.1) | not run | – | – | not run" in text


def test_table_5_has_both_decoders(tmp_path):
    for decoder, score in (("fc", 560.0), ("conv", 680.0)):
        for seed in range(2):
            folder = tmp_path / "runs" / f"{decoder}-{seed}"
            write(folder, record("vae", score + seed, seed, decoder=decoder))
            folder = tmp_path / "runs" / f"gp-{decoder}-{seed}"
            write(folder, record("gp", score + 9 + seed, seed, decoder=decoder))
    frame = make(table5.TABLE, tmp_path / "runs", tmp_path / "out")
    rows = frame[(frame["data"] == "mnist") & (frame["latent_dim"] == 10) & (frame["seeds"] > 0)]
    assert rows.groupby("decoder")["difference_to_vae"].max().to_dict() == {"conv": 9, "fc": 9}
    assert rows[rows["mark"] == "best"]["guide"].tolist() == ["gp", "gp"]
    gp = rows[rows["guide"] == "gp"].set_index("decoder")["published"]
    assert gp.to_dict() == {"fc": 568.7, "conv": 693.2}


def test_published_numbers_are_complete():
    counts = [len(_frames.published_scores(name)) for name in ("score", "ms")]
    assert counts == [22 * 3 + 16 * 4, 6 * 4]
    frame = _frames.published_scores()
    assert frame.index.is_unique
    assert frame.loc[("gp", "cifar10", 50, "conv"), "score"] == 2786.5
    assert frame.loc[("vlae:8", "omniglot", 50, "fc"), "score"] == 553.1


def test_one_seed_has_no_p_value(tmp_path):
    write(tmp_path / "runs" / "vae-0", record("vae", 100.0, 0))
    write(tmp_path / "runs" / "vae-1", record("vae", 101.0, 1))
    write(tmp_path / "runs" / "sa", record("sa:4", 90.0, 0))
    frame = make(SMALL, tmp_path / "runs", tmp_path / "out").set_index("method")
    assert frame.loc["SA(4)", "note"] == "1 seed"
    assert math.isnan(frame.loc["SA(4)", "p"])
    text = (tmp_path / "out" / "small.md").read_text()
    assert "| SA(4) | 90.0 (1 seed) | -10.5 |" in text
    assert "1 to 2 seeds" in text
    assert "| VAE | $\\color{red}{\\mathbf{100.5 \\pm 0.7}}$ |" in text


def test_what_was_not_tested_does_not_look_different(tmp_path):
    """The best has one seed: of no method is there evidence of a difference from it."""
    write(tmp_path / "runs" / "best", record("gp", 200.0))
    for seed in range(2):
        write(tmp_path / "runs" / f"vae-{seed}", record("vae", 100.0 + seed, seed))
        write(tmp_path / "runs" / f"me-{seed}", record("me:2", 90.0 + seed, seed))
    frame = make(SMALL, tmp_path / "runs", tmp_path / "out").set_index("method")
    assert frame["p"].isna().all()
    for kind, pm in (("md", " ± 0.7"), ("tex", "$^{0.7}$")):
        text = (tmp_path / "out" / f"small.{kind}").read_text()
        assert f"100.5{pm} (not tested)" in text
        assert f"90.5{pm} (not tested)" in text
        assert "Not tested: a method of one seed, or any where the best mean is of one" in text


def test_other_likelihoods_have_no_published_scores(tmp_path):
    for guide, score in (("vae", -90.0), ("gp", -85.0)):
        for seed in range(2):
            run = tmp_path / "runs" / f"{guide}-{seed}"
            content = write(run, record(guide, score + seed, seed, likelihood="bernoulli"))
            companion_of(run, content, score + seed, score + 1 + seed)
    frame = make(SMALL, tmp_path / "runs", tmp_path / "out")
    beside = pd.read_csv(tmp_path / "out" / "small_companion.csv")
    for table in (frame, beside):
        assert table["mean"].notna().any()
        assert table["published"].isna().all()
        assert table["published_difference_to_vae"].isna().all()
    for name in ("small.md", "small_companion.md", "small.tex"):
        text = (tmp_path / "out" / name).read_text()
        assert "bernoulli likelihood, and no published scores, which are Gaussian" in text
        assert "685.1" not in text


def test_controls_of_equal_compute(tmp_path):
    """GPVAE from a VAE has twice the epochs in all, ME(2) twice the gradient steps."""
    runs = tmp_path / "runs"
    write(runs / "vae", record("vae", 100.0))
    write(runs / "me", record("me:2", 101.0))
    write(runs / "gp", record("gp", 105.0, warm_start="vae"))
    write(runs / "vae-long", record("vae", 107.0, epochs=40))
    write(runs / "vae-twice", record("vae", 106.0, warm_start="/elsewhere/vae"))
    frame = make(SMALL, runs, tmp_path / "out").set_index("method")
    assert frame["mean"].dropna().to_dict() == {
        "VAE": 100.0, "ME(2)": 101.0, "GPVAE, warm start": 105.0, "VAE, 2 × epochs": 107.0,
        "VAE, 2 × epochs, warm start": 106.0,
    }  # fmt: skip
    assert frame.loc["VAE, 2 × epochs", "mark"] == "best", "more training beats both"
    assert frame.loc["VAE, 2 × epochs", "epochs"] == 40
    assert "GPVAE" not in frame.index, "its row is that of the warm start"
    text = (tmp_path / "out" / "small.md").read_text()
    assert (
        "VAE, 2 × epochs: the gradient steps of ME(2), the epochs of GPVAE, warm start, the "
        "gradient steps of GPVAE, warm start"
    ) in text


def test_a_warm_start_within_the_budget_needs_no_control(tmp_path):
    runs = tmp_path / "runs"
    write(runs / "vae", record("vae", 100.0))
    write(runs / "short", record("vae", 90.0, epochs=10))
    write(runs / "gp", record("gp", 105.0, epochs=10, warm_start="short"))
    frame = make(SMALL, runs, tmp_path / "out", epochs=20).set_index("method")
    assert frame.loc["GPVAE, warm start", "mean"] == 105.0
    assert frame["mean"].dropna().index.tolist() == ["VAE", "GPVAE, warm start"]
    assert "VAE: the epochs of GPVAE, warm start" in (tmp_path / "out" / "small.md").read_text()


def decoded(guide):
    """Latent vectors that one training step decodes with a gradient, for an image."""
    model, count = ImageModel((1, 28, 28), latent_dim=2), 0
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    step = TrainingStep(model, make_guide(guide, model), images, batch_size=4)

    def add(module, args, output):
        nonlocal count
        count += args[0].shape[:-1].numel() if torch.is_grad_enabled() else 0

    model.decoder.register_forward_hook(add)
    step(torch.arange(4))
    return count / 4


@pytest.mark.parametrize(
    ("guide", "expected"),
    {
        "vae": 1, "gp": 1, "gp:estimator=weights": 1, "full": 1, "lowrank": 1, "iaf:2": 1,
        "hf:2": 1, "me": 2, "me:3": 3, "me:num_components=3": 3, "rme:1": 1, "rme:2": 6,
        "rme:max_divergence=5": 6, "rme:repulsion=3": 6, "rme:3,repulsion=0": 9, "sa:0": 1,
        "sa:1": 3, "sa": 9, "sa:4": 9, "sa:step_size=0.1,num_steps=8": 17,
        "sa:2,num_samples=3,line_search=False": 7, "iterative:3": 7, "iterative": 9,
    }.items(),
)  # fmt: skip
def test_gradient_steps_are_those_of_a_training_step(guide, expected):
    assert decoded(guide) == expected
    assert _records.gradients(guide) == expected


def test_gradient_steps_of_jacobians_and_of_strangers_are_not_claimed(tmp_path):
    assert decoded("vlae:4") == 6, "five of them of p tangents each"
    assert _records.gradients("vlae:4") is None
    assert _records.gradients("their_guides:Guide:3") is None
    runs = tmp_path / "runs"
    write(runs / "vae", record("vae", 100.0))
    write(runs / "vlae", record("vlae:4", 105.0, warm_start="vae"))
    write(runs / "iterative", record("iterative:3", 105.0, warm_start="vae"))
    make(SMALL, runs, tmp_path / "out")
    text = (tmp_path / "out" / "small.md").read_text()
    assert (
        "VAE, 2 × epochs: the gradient steps of ME(2), the epochs of iterative:3, warm start, the "
        "epochs of VLAE(4), warm start; VAE, 8 × epochs: the gradient steps of iterative:3, warm "
        "start."
    ) in text
    assert "those of methods that are not named here are not matched" in text


@pytest.mark.parametrize("start", [{"epochs": 10}, {"guide": "rme:2"}], ids=["epochs", "steps"])
def test_one_row_has_one_total(start, tmp_path):
    """The own epochs of one, or the total of the other, are the budget: no mean over both."""
    write(tmp_path / "vae", record("vae", 100.0))
    write(tmp_path / "start", record(**({"score": 90.0, "seed": 1} | start)))
    write(tmp_path / "gp-0", record("gp", 105.0, warm_start="vae"))
    odd = record("gp", 104.0, 1, epochs=start.get("epochs", 20), warm_start="start")
    write(tmp_path / "gp-1", odd)
    with pytest.raises(ValueError, match=r"the row GPVAE, warm start has one total") as error:
        make(SMALL, tmp_path, tmp_path / "out", epochs=20)
    for seed in range(2):
        assert str(tmp_path / f"gp-{seed}" / "record.json") in str(error.value)
    assert "40 in all with 40 gradient steps" in str(error.value)


REFUSED = {
    "epochs": ({"epochs": 21}, {}, "config.epochs is 21"),
    "batch size": ({"batch_size": 64}, {}, "config.batch_size is 64, but 128 in"),
    "learning rate": ({"learning_rate": 0.1}, {}, "config.learning_rate is 0.1"),
    "samples": ({}, {"scores.num_samples": 5000}, "scores.num_samples is 5000, but 100"),
    "images": ({}, {"scores.num_images": 50}, "scores.num_images is 50, but 100"),
    "train hash": ({}, {"data.train_sha256": "x"}, "data.train_sha256 is 'x', but 'mnist-train'"),
    "test hash": ({}, {"data.test_sha256": "x"}, "data.test_sha256 is 'x'"),
    "held out": ({}, {"data.validation_images": 9}, "data.validation_images is 9"),
    "twice": ({"seed": 0}, {}, "config.seed is 0, as in"),
    "frozen": ({"freeze_decoder": True, "warm_start": "vae-0"}, {}, "config.freeze_decoder"),
    "start": ({"warm_start": "/gone/away"}, {}, "config.warm_start is '/gone/away'"),
}


@pytest.mark.parametrize(("config", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_compare_is_refused(config, fields, message, tmp_path):
    for seed in range(3):
        write(tmp_path / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    write(tmp_path / "gp-0", record("gp", 110.0, 0))
    odd = record("gp", 110.0, **({"seed": 7} | config))
    for name, value in fields.items():
        part, key = name.split(".")
        odd[part][key] = value
    write(tmp_path / "odd", odd)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(SMALL, tmp_path, tmp_path / "out")
    assert str(tmp_path / "odd" / "record.json") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_budget_is_no_control(tmp_path):
    write(tmp_path / "gp", record("gp", 110.0))
    write(tmp_path / "odd", record("vae", 110.0, epochs=30))
    with pytest.raises(ValueError, match=r"config.epochs is 30 .* expected 20, or a multiple"):
        make(SMALL, tmp_path, tmp_path / "out")


def test_another_commit_is_flagged_and_damage_too(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path / "runs" / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    write(tmp_path / "runs" / "gp", record("gp", 110.0) | {"commit": "def+"})
    write(tmp_path / "runs" / "bad", {"config": {"guide": "vae"}})
    write(tmp_path / "runs" / "half.partial", record("vae", 0.0, 9))
    make(SMALL, tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "small.md").read_text()
    for said in (text, capsys.readouterr().err):
        assert "records differ in commit: 'abc' in" in said
        assert f"'def+' in {tmp_path / 'runs' / 'gp' / 'record.json'}" in said
        assert f"left out: {tmp_path / 'runs' / 'bad' / 'record.json'}" in said
    assert "2 seeds" in text


def test_missing_fields_and_folders_are_named(tmp_path):
    odd = record()
    del odd["data"]["validation_images"]
    write(tmp_path / "runs" / "odd", odd)
    write(tmp_path / "runs" / "vae", record(seed=1))
    with pytest.raises(ValueError, match=r"odd/record.json: the field 'data.validation_images'"):
        make(SMALL, tmp_path / "runs", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="absent"):
        make(SMALL, tmp_path / "absent", tmp_path / "out")


def test_guides_of_other_tables_are_rows_and_other_columns_are_not(tmp_path):
    write(tmp_path / "runs" / "vae", record("vae", 100.0))
    write(tmp_path / "runs" / "iterative", record("iterative:3", 120.0))
    write(tmp_path / "runs" / "p50", record("vae", 999.0, latent_dim=50, epochs=7))
    frame = make(SMALL, tmp_path / "runs", tmp_path / "out").set_index("method")
    assert frame.loc["iterative:3", "mark"] == "best"
    assert 999.0 not in frame["mean"].tolist()
    assert "| `iterative:3` | " in (tmp_path / "out" / "small.md").read_text()


def with_companions(folder, optimum_of_gp):
    rng = np.random.default_rng(1)
    for guide, own, optimum in (("vae", 100.0, 130.0), ("gp", 110.0, optimum_of_gp)):
        for seed, noise in enumerate(values(0.0, 1.0, 3, rng)):
            run = folder / f"{guide}-{seed}"
            content = write(run, record(guide, own + noise, seed))
            companion_of(run, content, own + 5 + noise, optimum + noise)


def test_the_companion_ranks_and_tests_every_score(tmp_path):
    with_companions(tmp_path / "runs", 120.0)
    frame = make(SMALL, tmp_path / "runs", tmp_path / "out")
    assert frame.set_index("method").loc["GPVAE", "mark"] == "best"
    companion = pd.read_csv(tmp_path / "out" / "small_companion.csv")
    assert list(dict.fromkeys(companion["score"])) == list(_frames.COMPANION)
    rows = companion.set_index(["score", "method"])
    assert rows.loc[("IWAE, own q", "GPVAE"), "mark"] == "best"
    assert rows.loc[("IWAE, own q", "GPVAE"), "mean"] == pytest.approx(115.0)
    assert rows.loc[("IWAE, optimum", "VAE"), "mark"] == "best"
    assert rows.loc[("IWAE, optimum", "GPVAE"), "mark"] == "different"
    assert rows.loc[("IWAE, optimum", "GPVAE"), "difference_to_vae"] == pytest.approx(-10.0)
    assert rows.loc[("AIS", "VAE"), "mean"] == pytest.approx(130.1)
    # sd 1 and three runs each: t = 10 / √(2/3), 4 degrees of freedom
    expected = 2 * student.sf(10 / math.sqrt(2 / 3), 4)
    assert rows.loc[("IWAE, optimum", "GPVAE"), "p"] == pytest.approx(expected)
    change = "the best is no longer GPVAE but VAE"
    for name in ("small", "small_companion"):
        text = (tmp_path / "out" / f"{name}.md").read_text()
        assert "The order of methods changes" in text
        assert f"MNIST, p = 10 (conv): 1 of 1 pairs swap, {change}" in text
    assert "| 1.50 |" in text
    assert "6 of 300 images had not converged" in text
    assert "chosen on held-out training images" in text


def test_the_companion_says_when_the_order_stays(tmp_path):
    with_companions(tmp_path / "runs", 140.0)
    make(SMALL, tmp_path / "runs", tmp_path / "out")
    assert "The order of methods is the same" in (tmp_path / "out" / "small.md").read_text()


def test_companions_of_other_runs_are_refused(tmp_path):
    with_companions(tmp_path, 120.0)
    content = read_json(tmp_path / "gp-0" / "record.json")
    content["scores"]["log_evidence"] += 1
    write_json(tmp_path / "gp-0" / "record.json", content)
    with pytest.raises(ValueError, match=r"gp-0-companion/record.json: recorded.log_evidence"):
        make(SMALL, tmp_path, tmp_path / "out")


def test_companions_of_other_budgets_are_refused(tmp_path):
    with_companions(tmp_path, 120.0)
    content = record("sa:4", 100.0)
    write(tmp_path / "sa", content)
    companion_of(tmp_path / "sa", content, 100.0, 120.0, num_images=20)
    with pytest.raises(ValueError, match=r"companion.num_images is 20, but 50 in"):
        make(SMALL, tmp_path, tmp_path / "out")


def test_scores_that_a_guide_lacks_are_not_run(tmp_path):
    with_companions(tmp_path / "runs", 120.0)
    content = write(tmp_path / "runs" / "sa", record("sa:4", 100.0))
    missing = {"width": {"missing": "no posterior"}, "annealed": {"missing": "not asked for"}}
    companion_of(tmp_path / "runs" / "sa", content, 100.0, 120.0, **missing)
    make(SMALL, tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "small_companion.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| SA(4) |"))
    cells = line.split(" | ")
    assert cells[2] == "100.0 (1 seed) (-5.0)"
    assert cells[3:5] == ["not run", "–"]
    assert cells[6] == "not run"


def test_evaluations_of_untrained_guides_are_no_rows(tmp_path):
    content = write(tmp_path / "vae", record())
    companion_of(tmp_path / "vae", content, 100.0, 120.0)
    file = tmp_path / "vae-companion" / "record.json"
    evaluation = read_json(file) | {"guide": "vlae:2"}
    evaluation["config"]["guide"] = "vlae:2"
    write_json(file, evaluation)
    make(SMALL, tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "small_companion.md").read_text()
    assert "vlae" not in text
    assert "±" not in text.split("## ")[1].split("The same models")[0]


def test_pictures_need_their_columns():
    frame = pd.DataFrame({"panel": [""], "column": ["c"], "method": ["VAE"], "mean": [1.0]})
    for draw in (score_dots, companion_dots, time_dots):
        with pytest.raises(ValueError, match="lacks the columns"):
            draw(frame)
        with pytest.raises(ValueError, match="lacks the columns"):
            draw(pd.DataFrame())


def test_score_dots_show_every_mean_and_what_was_published(full4):
    frame = full4[1].assign(mark=full4[1]["mark"].fillna(""))
    figure = score_dots(frame[frame["role"] == "method"], "caption", "title")
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title() == ("CIFAR10, p = 10\nVAE 1645.7, paper 1645.7")
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].lines if line.get_marker() == "D")
    assert drawn == 1, "one best method"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "published" in labels
    assert any("p > 0.01" in label for label in labels)


@pytest.fixture(scope="module")
def times(tmp_path_factory):
    out = tmp_path_factory.mktemp("table6")
    options = table6.Options(
        guides=("vae", "vlae:1", "gp"), latent_dims=(2,), repeats=3, train_images=64,
        omniglot="absent-omniglot", out=out,
    )  # fmt: skip
    table6.main(options)
    return out


def test_table_6_is_a_benchmark(times):
    content = read_json(times / "table6.json")
    assert content["batch_size"] == 128
    assert content["device"]
    assert content["threads"] >= 1
    rows = content["rows"]
    assert {(row["guide"], row["decoder"]) for row in rows} == {
        (guide, decoder) for guide in ("vae", "vlae:1", "gp") for decoder in ("fc", "conv")
    }
    for row in rows:
        assert len(row["samples_ms"]) == 3
        low, median, high = np.quantile(row["samples_ms"], [0.25, 0.5, 0.75])
        assert (row["ms_low"], row["ms"], row["ms_high"]) == pytest.approx((low, median, high))
        gp = next(r for r in rows if r["guide"] == "gp" and r["decoder"] == row["decoder"])
        assert row["ratio"] == pytest.approx(row["ms"] / gp["ms"])
    assert [entry["data"] for entry in content["not_run"]] == ["omniglot"]
    for kind in ("md", "tex", "csv", "png"):
        assert (times / f"table6.{kind}").stat().st_size > 500
    text = (times / "table6.md").read_text()
    assert content["device"] in text
    assert "not run" in text


def test_table_6_renders_known_times(tmp_path):
    rows = [
        {"guide": guide, "data": "mnist", "decoder": "fc", "latent_dim": 10, "samples_ms": samples}
        for guide, samples in (("gp", [1.0, 2.0, 3.0]), ("vlae:8", [5.0, 7.0, 20.0]))
    ]
    table = table6.summarise(rows)
    vlae = table.set_index("guide").loc["vlae:8"]
    assert (vlae["ms"], vlae["ms_low"], vlae["ms_high"]) == (7.0, 6.0, 13.5)
    assert vlae["ratio"] == 3.5
    frame = table6.frame(json.loads(table.to_json(orient="records")), (10, 50))
    cell = frame[
        (frame["guide"] == "vlae:8") & (frame["data"] == "mnist") & (frame["latent_dim"] == 10)
    ].set_index("decoder")
    assert cell.loc["fc", "published"] == 20.7
    assert cell.loc["fc", "published_ratio"] == pytest.approx(20.7 / 5.7)
    assert math.isnan(cell.loc["conv", "ms"])
    text = table6.markdown(frame, "caption")
    assert "| VLAE(8) | 7.0 (6.0 to 13.5) | 3.50 | 20.7 (3.63) |" in text
