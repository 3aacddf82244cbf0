"""Score tables from records with known numbers, Table 6, and the committed pages."""

import copy
import itertools
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import _records
import numpy as np
import pandas as pd
import pytest
import table6
import torch
from _records import PROPOSALS, compare_methods, holm
from scipy.stats import t as student
from score_tables import PUBLISHED, TABLE_4, TABLES, Options, Table, main

from pyro_gpvae import ImageModel, make_guide
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.training.step import TrainingStep

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SMALL = Table("small", "Small", [("", "mnist", 10, "conv")], ("vae", "sa:4", "me:2", "gp"))


def record(guide="vae", score=100.0, seed=0, data="mnist", latent_dim=10, decoder="conv", **config):
    options = asdict(
        RunConfig(
            data=data, guide=guide, seed=seed, latent_dim=latent_dim, decoder=decoder,
            **({"epochs": 20} | config),
        )
    )  # fmt: skip
    return {
        "config": options,
        "data": {
            "name": data, "train_images": 1000, "validation_images": 0, "test_images": 100,
            "train_sha256": f"{data}-train", "test_sha256": f"{data}-test",
        },
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "device": "a processor",
        "steps": 160,
        "seconds": {"training": 1.0, "evaluation": 1.0},
        "scores": {
            "log_evidence": score, "elbo": score - 10, "num_images": 100, "num_samples": 100,
            "seed": seed,
        },
    }  # fmt: skip


def write(folder, content):
    folder.mkdir(parents=True)
    write_json(folder / "record.json", content)
    return content


def evaluation_of(folder, content, own, optimum, **changes):
    """Writes an evaluation with a comparison of proposals, as the committed ones are."""
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
    write(folder.with_name(f"{folder.name}-evaluation"), evaluation)


def values(mean, sd, count, rng):
    """Numbers with exactly this mean and standard deviation."""
    noise = rng.normal(size=count)
    return mean + sd * (noise - noise.mean()) / noise.std(ddof=1)


def make(table, folder, out, **options):
    main(table, Options(records=(folder,), out=out, **options))
    return pd.read_csv(out / f"{table.name}.csv", keep_default_na=False, na_values=[""])


def test_means_deviations_and_p_values_by_hand():
    scores = {"VAE": [10.0, 12.0, 11.0, 13.0], "SA": [13.0, 15.0, 14.5],
              "GP": [15.0, 16.0, 14.0, 17.0, 15.5]}  # fmt: skip
    table = compare_methods(scores)
    assert table["mark"].to_dict() == {"VAE": "different", "SA": "no difference", "GP": "best"}
    best = np.array(scores["GP"])
    for name in ("VAE", "SA"):
        y = np.array(scores[name])
        n, m = len(best), len(y)
        var_best = ((best - best.mean()) ** 2).sum() / (n - 1)
        var = ((y - y.mean()) ** 2).sum() / (m - 1)
        assert table.loc[name, ["seeds", "mean"]].tolist() == [m, y.sum() / m]
        assert table.loc[name, "sd"] == pytest.approx(math.sqrt(var))
        pooled = ((n - 1) * var_best + (m - 1) * var) / (n + m - 2)
        t = (best.mean() - y.mean()) / math.sqrt(pooled * (1 / n + 1 / m))
        assert table.loc[name, "p"] == pytest.approx(2 * student.sf(t, n + m - 2))
        a, b = var_best / n, var / m
        df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
        welch = 2 * student.sf((best.mean() - y.mean()) / math.sqrt(a + b), df)
        assert table.loc[name, "p_welch"] == pytest.approx(welch)
    small, large = sorted(table["p"].dropna())
    assert sorted(table["p_holm"].dropna()) == pytest.approx([2 * small, max(2 * small, large)])
    # the mark is Student's, uncorrected
    table = compare_methods({"A": [1.0, 2.0, 3.0], "B": [2.5, 3.5, 4.0], "C": [5.0, 6.0, 7.0]})
    assert table.loc["A", "p"] < 0.01 < table.loc["A", "p_holm"]
    assert table.loc["A", "mark"] == "different"


def test_one_seed_is_never_tested():
    table = compare_methods({"VAE": [1.0, 2.0], "SA": [1.5], "GP": [3.0, 4.0]})
    assert table.loc["SA", ["note", "mark"]].tolist() == ["1 seed", "untested"]
    assert table.loc["SA", ["sd", "p", "p_holm", "p_welch", "p_welch_holm"]].isna().all()
    table = compare_methods({"VAE": [1.0, 2.0], "GP": [3.0]})
    assert table["mark"].to_dict() == {"VAE": "untested", "GP": "best"}
    assert table["note"].to_dict() == {"VAE": "the best has 1 seed", "GP": "1 seed"}
    with pytest.raises(ValueError, match="'GP' must be finite"):
        compare_methods({"VAE": [1.0, 2.0], "GP": [math.nan]})


def test_holm():
    # 4 tests: 4 × 0.01, max(0.04, 3 × 0.012), 2 × 0.03, 1 × 0.04 raised to 0.06
    assert holm([0.03, 0.01, math.nan, 0.04, 0.012]) == pytest.approx(
        [0.06, 0.04, math.nan, 0.06, 0.04], nan_ok=True
    )
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    # 2000 families of 8 true hypotheses; 5 % ± 4 standard errors: fails once in 15,000
    p = np.random.default_rng(0).uniform(size=(2000, 8))
    wrong = np.mean([(holm(family) <= 0.05).any() for family in p])
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 2000)


def test_table_4_from_runs_with_the_published_scores(tmp_path):
    rng = np.random.default_rng(0)
    published = pd.read_csv(PUBLISHED / "table4.csv", comment="#")
    for line in published.itertuples():
        for seed, score in enumerate(values(line.score, line.sd, 10, rng)):
            write(
                tmp_path / "runs" / f"{line.guide}-{line.latent_dim}-{seed}".replace(":", "-"),
                record(line.guide, score, seed, "cifar10", line.latent_dim, epochs=2000),
            )
    frame = make(TABLE_4, tmp_path / "runs", tmp_path)
    rows = frame[frame["role"] == "method"]
    assert rows["mean"].to_numpy() == pytest.approx(rows["published"])
    assert rows["sd"].to_numpy() == pytest.approx(rows["published_sd"])
    differences = rows[["difference_to_vae", "published_difference_to_vae"]].to_numpy().T
    assert differences[0] == pytest.approx(differences[1])
    blue = rows[rows["mark"] == "no difference"]
    assert blue["method"].tolist() == ["RME(2)", "RME(3)", "RME(4)", "RME(5)"]
    markdown, latex = ((tmp_path / f"table4.{kind}").read_text() for kind in ("md", "tex"))
    assert r"| $\color{red}{\mathbf{1668.6 \pm 5.6}}$ | +22.9 | 1668.6 (+22.9) |" in markdown
    assert r"| $\color{blue}{\mathbf{2783.0 \pm" in markdown
    assert r"& \textcolor{blue}{\textbf{2783.0}}$^{" in latex
    assert "| VAE | 1645.7 ± 4.9 | +0.0 | 1645.7 (+0.0) |" in markdown
    assert "& 1645.7$^{4.9}$ &" in latex
    for text in (markdown, latex):
        assert text.count("color{red}") == 3
        assert text.count("color{blue}") == 4
    assert "2,000 epochs (the paper: 2,000); K = 100; CIFAR10: all training and 100" in markdown
    assert "10 seeds" in markdown
    assert "VAE, 15 × epochs: the gradient steps of RME(5)" in markdown
    assert "The proposal comparison was not run" in markdown
    assert latex.count("{") == latex.count("}")
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert all(len(re.findall(r"(?<!\\)&", line)) == 10 for line in lines)


@pytest.mark.parametrize("name", TABLES)
def test_no_records_are_no_numbers(name, tmp_path):
    main(TABLES[name], Options(out=tmp_path))
    frame = pd.read_csv(tmp_path / f"{name}.csv")
    assert set(frame["note"]) == {"not run"}
    for column in ("mean", "sd", "p", "difference_to_vae"):
        assert frame[column].isna().all()
    text = (tmp_path / f"{name}.md").read_text()
    expected = {
        "table4": "| GPVAE | not run | – | 1668.6 (+22.9) |",
        "table5": "| VLAE(4) | not run | – | 605.2 (+41.6) |",
        "main_table": "| GPVAE | not run | – | 693.2 (+8.1) | not run | – | – | not run",
    }
    assert expected[name] in text


def test_what_was_not_tested_does_not_look_different(tmp_path):
    """The best has one seed: of no method is there evidence of a difference from it."""
    write(tmp_path / "runs" / "best", record("gp", 200.0))
    for seed in range(2):
        write(tmp_path / "runs" / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    make(SMALL, tmp_path / "runs", tmp_path / "out")
    assert "100.5 ± 0.7 (not tested)" in (tmp_path / "out" / "small.md").read_text()
    assert "100.5$^{0.7}$ (not tested)" in (tmp_path / "out" / "small.tex").read_text()


def test_other_likelihoods_have_no_published_scores(tmp_path):
    for guide, score in (("vae", -90.0), ("gp", -85.0)):
        content = write(tmp_path / guide, record(guide, score, likelihood="bernoulli"))
        evaluation_of(tmp_path / guide, content, score, score + 1)
    make(SMALL, tmp_path, tmp_path / "out")
    for name in ("small", "small_proposals"):
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        assert table[["published", "published_difference_to_vae"]].isna().all(axis=None)
        text = (tmp_path / "out" / f"{name}.md").read_text()
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
    step = TrainingStep(model, make_guide(guide, model), images, num_images=4)

    def add(module, args, output):
        nonlocal count
        count += args[0].shape[:-1].numel() if torch.is_grad_enabled() else 0

    model.decoder.register_forward_hook(add)
    step(images)
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
    assert _records.gradients("vlae:4") is None
    assert _records.gradients("their_guides:Guide:3") is None
    write(tmp_path / "vae", record("vae", 100.0))
    write(tmp_path / "vlae", record("vlae:4", 105.0, warm_start="vae"))
    write(tmp_path / "iterative", record("iterative:3", 105.0, warm_start="vae"))
    make(SMALL, tmp_path, tmp_path / "out")
    assert (
        "VAE, 2 × epochs: the gradient steps of ME(2), the epochs of iterative:3, warm start, the "
        "epochs of VLAE(4), warm start; VAE, 8 × epochs: the gradient steps of iterative:3, warm "
        "start."
    ) in (tmp_path / "out" / "small.md").read_text()


@pytest.mark.parametrize("start", [{"epochs": 10}, {"guide": "rme:2"}], ids=["epochs", "steps"])
def test_one_row_has_one_total(start, tmp_path):
    """The own epochs of one, or the total of the other, are the budget: no mean over both."""
    write(tmp_path / "vae", record("vae", 100.0))
    write(tmp_path / "start", record(**({"score": 90.0, "seed": 1} | start)))
    write(tmp_path / "gp-0", record("gp", 105.0, warm_start="vae"))
    odd = record("gp", 104.0, 1, epochs=start.get("epochs", 20), warm_start="start")
    write(tmp_path / "gp-1", odd)
    with pytest.raises(ValueError, match=r"the row GPVAE, warm start must agree") as error:
        make(SMALL, tmp_path, tmp_path / "out", epochs=20)
    for seed in range(2):
        assert str(tmp_path / f"gp-{seed}" / "record.json") in str(error.value)


REFUSED = {
    "epochs": ({"epochs": 21}, {}, "epochs is 21"),
    "batch size": ({"batch_size": 64}, {}, "batch_size is 64, but 128 in"),
    "samples": ({"num_samples": 5000}, {}, "num_samples is 5000, but 100"),
    "images": ({}, {"test_images": 50}, "num_test is 50, but 100"),
    "train hash": ({}, {"train_sha256": "x"}, "train_sha256 is 'x', but 'mnist-train'"),
    "held out": ({"validation": 9}, {}, "validation is 9"),
    "twice": ({"seed": 0}, {}, "seed is 0 in both, of GPVAE"),
    "frozen": ({"freeze_decoder": True, "warm_start": "vae-0"}, {}, "freeze_decoder"),
    "start": ({"warm_start": "/gone/away"}, {}, "warm_start is '/gone/away'"),
}


@pytest.mark.parametrize(("config", "data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_compare_is_refused(config, data, message, tmp_path):
    for seed in range(3):
        write(tmp_path / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    write(tmp_path / "gp-0", record("gp", 110.0, 0))
    odd = record("gp", 110.0, **({"seed": 7} | config))
    odd["data"] |= data
    write(tmp_path / "odd", odd)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(SMALL, tmp_path, tmp_path / "out")
    assert str(tmp_path / "odd" / "record.json") in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_commit_is_flagged_and_damage_too(tmp_path, capsys):
    for seed in range(2):
        write(tmp_path / "runs" / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    write(tmp_path / "runs" / "gp", record("gp", 110.0) | {"commit": "def+"})
    write(tmp_path / "runs" / "bad", {"config": {"guide": "vae"}})
    write(tmp_path / "runs" / "half.partial", record("vae", 0.0, 9))
    make(SMALL, tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "small.md").read_text()
    for said in (text, capsys.readouterr().err):
        assert "records differ in commit: 'def+' in" in said
        assert f"'abc' in {tmp_path / 'runs' / 'vae-0' / 'record.json'} (2 in all)" in said
        assert f"left out: {tmp_path / 'runs' / 'bad' / 'record.json'}" in said
    assert "2 seeds" in text


def with_evaluations(folder):
    rng = np.random.default_rng(1)
    for guide, own, optimum in (("vae", 100.0, 130.0), ("gp", 110.0, 120.0)):
        for seed, noise in enumerate(values(0.0, 1.0, 3, rng)):
            run = folder / f"{guide}-{seed}"
            content = write(run, record(guide, own + noise, seed))
            evaluation_of(run, content, own + 5 + noise, optimum + noise)


def test_every_score_of_a_proposal_comparison_is_ranked_and_tested(tmp_path):
    with_evaluations(tmp_path)
    content = write(tmp_path / "sa", record("sa:4", 100.0))
    missing = {"width": {"missing": "no posterior"}, "annealed": {"missing": "not asked for"}}
    evaluation_of(tmp_path / "sa", content, 100.0, 120.0, **missing)
    # of a guide that was not trained: no row
    evaluation_of(tmp_path / "sa-too", content, 0.0, 0.0)
    other = read_json(tmp_path / "sa-too-evaluation" / "record.json") | {"guide": "vlae:2"}
    write_json(tmp_path / "sa-too-evaluation" / "record.json", other)
    make(SMALL, tmp_path, tmp_path / "out")
    compared = pd.read_csv(tmp_path / "out" / "small_proposals.csv")
    assert list(dict.fromkeys(compared["score"])) == PROPOSALS
    rows = compared.set_index(["score", "method"])
    assert rows.loc[("IWAE, own q", "GPVAE"), "mean"] == pytest.approx(115.0)
    assert rows.loc[("AIS", "VAE"), "mean"] == pytest.approx(130.1)
    # sd 1 and three runs each: t = 10 / √(2/3), 4 degrees of freedom
    expected = 2 * student.sf(10 / math.sqrt(2 / 3), 4)
    assert rows.loc[("IWAE, optimum", "GPVAE"), "p"] == pytest.approx(expected)
    for name in ("small", "small_proposals"):
        text = (tmp_path / "out" / f"{name}.md").read_text()
        assert "MNIST, p = 10 (conv): 1 of 3 pairs" in text
    assert "7 of 350 images is not reliable" in text
    line = "| SA(4) | 90.0 (1 seed) | 100.0 (1 seed) | not run | 120.0 (1 seed) | not run | – |"
    assert line in text


def test_evaluations_with_reference_estimates(tmp_path):
    rows = {"IWAE(100)": 105.0, "IWAE(100), width c": 106.0, "IWAE(100), instance:full": 108.0,
            "AIS(30)": 107.0, "AIS(30), prior": 1.0}  # fmt: skip
    content = write(tmp_path / "vae", record())
    evaluation_of(tmp_path / "vae", content, 0.0, 0.0)
    evaluation = read_json(tmp_path / "vae-evaluation" / "record.json")
    del evaluation["companion"]
    evaluation["reference"] = {
        "num_images": 8, "num_samples": 100, "not_trusted": 1, "mean_width": 1.5,
        "estimates": {name: {"log_evidence": value} for name, value in rows.items()},
    }  # fmt: skip
    write_json(tmp_path / "vae-evaluation" / "record.json", evaluation)
    make(SMALL, tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "small_proposals.md").read_text()
    assert "| 1.50 |" in text
    assert "The reference of 1 of 8 images is not reliable." in text
    assert "ELBO |" not in text, "there is none of these images"
    compared = pd.read_csv(tmp_path / "out" / "small_proposals.csv")
    means = compared[compared["method"] == "VAE"]["mean"]
    assert means.tolist() == [105.0, 106.0, 108.0, 107.0]


def test_evaluations_of_other_runs_and_budgets_are_refused(tmp_path):
    with_evaluations(tmp_path)
    file = tmp_path / "gp-0" / "record.json"
    content = read_json(file)
    other = copy.deepcopy(content)
    other["scores"]["log_evidence"] += 1
    write_json(file, other)
    with pytest.raises(ValueError, match=r"gp-0-evaluation/record.json: recorded.log_evidence"):
        make(SMALL, tmp_path, tmp_path / "out")
    write_json(file, content)
    sa = write(tmp_path / "sa", record("sa:4", 100.0))
    evaluation_of(tmp_path / "sa", sa, 100.0, 120.0, num_images=20)
    with pytest.raises(ValueError, match=r"num_test is 20, but 50 in"):
        make(SMALL, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("name", "runs"), [("table4", "cifar10"), ("table5", "mnist")])
def test_committed_score_tables_are_those_of_the_committed_records(
    name, runs, tmp_path, monkeypatch
):
    monkeypatch.chdir(RESULTS)
    records = Path("records") / runs, Path("records/evaluations")
    main(TABLES[name], Options(records=records, epochs=6, out=tmp_path))
    for file in (f"{name}.md", f"{name}.csv", f"{name}_proposals.md", f"{name}.tex"):
        assert (tmp_path / file).read_text() == (RESULTS / file).read_text()


def test_the_committed_table_6_is_that_of_the_committed_record(tmp_path):
    shutil.copy(RESULTS / "table6.json", tmp_path)
    table6.main(table6.Options(render=True, out=tmp_path))
    for kind in ("md", "csv", "tex"):
        made, committed = (folder / f"table6.{kind}" for folder in (tmp_path, RESULTS))
        assert made.read_text() == committed.read_text()


@pytest.mark.slow
def test_table_6_times_every_guide(tmp_path):
    options = table6.Options(
        guides=("vae", "vlae:1", "gp"), latent_dims=(2,), repeats=3, train_images=64,
        omniglot="absent-omniglot", out=tmp_path,
    )  # fmt: skip
    table6.main(options)
    content = read_json(tmp_path / "table6.json")
    found = {(r["guide"], r["decoder"]): len(r["samples_ms"]) for r in content["rows"]}
    assert found == dict.fromkeys(itertools.product(options.guides, ("fc", "conv")), 3)
    assert [entry["data"] for entry in content["not_run"]] == ["omniglot"]


def test_table_6_has_medians_quartiles_and_ratios():
    place = {"data": "mnist", "decoder": "fc", "latent_dim": 10}
    rows = [
        place | {"guide": "gp", "samples_ms": [1.0, 2.0, 3.0]},
        place | {"guide": "vlae:8", "samples_ms": [5.0, 7.0, 20.0]},
    ]
    table = table6.frame(table6.summarise(rows).to_dict("records"), (10, 50))
    cells = table[table["column"].eq("MNIST, p = 10") & table["guide"].eq("vlae:8")]
    fc, conv = cells.to_dict("records")
    assert [fc[name] for name in ("ms", "ms_low", "ms_high", "ratio")] == [7.0, 6.0, 13.5, 3.5]
    assert fc["published_ratio"] == pytest.approx(20.7 / 5.7)
    assert math.isnan(conv["ms"])
    texts = table6.blocks_of(table)["fully-connected decoders"].loc["VLAE(8)"]
    assert texts.tolist()[:3] == ["7.0 (6.0 to 13.5)", "3.50", "20.7 (3.63)"]
