"""Score tables from records with known numbers, Table 6, and the committed pages."""

import itertools
import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import table6
from _significance import compare_methods, holm
from scipy.stats import t as student
from score_tables import PUBLISHED, TABLE_4, TABLES, Options, Table, main

from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.config import RunConfig

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SMALL = Table("small", "Small", [("", "mnist", 10, "conv")], ("vae", "sa:4", "me:2", "gp"))


def record(
    guide="vae",
    score=100.0,
    seed=0,
    data="mnist",
    latent_dim=10,
    decoder="conv",
    start=None,
    **config,
):
    options = asdict(
        RunConfig(
            data=data, guide=guide, seed=seed, latent_dim=latent_dim,
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
        "threads": 1,
        "warm_start": start,
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


def values(mean, sd, count, rng):
    """Numbers with exactly this mean and standard deviation."""
    noise = rng.normal(size=count)
    return mean + sd * (noise - noise.mean()) / noise.std(ddof=1)


def make(table, folder, out, **options):
    main(table, Options(records=(folder,), out=out, **options))
    frame = pd.read_csv(out / f"{table.name}.csv", keep_default_na=False, na_values=[""])
    return frame, (out / f"{table.name}.md").read_text()


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


def test_fewer_than_three_seeds_are_never_tested():
    table = compare_methods({"VAE": [1.0, 2.0, 1.5], "SA": [1.5, 2.0], "GP": [7.0, 8.0, 9.0]})
    assert table["mark"].to_dict() == {"VAE": "different", "SA": "untested", "GP": "best"}
    assert table.loc["SA", ["p", "p_holm", "p_welch", "p_welch_holm"]].isna().all()
    table = compare_methods({"VAE": [1.0, 2.0, 1.5], "GP": [3.0, 4.0]})
    assert set(table["mark"]) == {"untested"}
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
    rows, markdown = make(TABLE_4, tmp_path / "runs", tmp_path)
    assert rows["mean"].to_numpy() == pytest.approx(rows["published"])
    assert rows["sd"].to_numpy() == pytest.approx(rows["published_sd"])
    differences = rows[["difference_to_vae", "published_difference"]].to_numpy().T
    assert differences[0] == pytest.approx(differences[1])
    blue = rows[rows["mark"] == "no difference"]
    assert blue["method"].tolist() == ["RME(2)", "RME(3)", "RME(4)", "RME(5)"]
    assert r"| $\color{red}{\mathbf{1668.6 \pm 5.6}}$ | +22.9 | 1668.6 (+22.9) |" in markdown
    assert r"| $\color{blue}{\mathbf{2783.0 \pm" in markdown
    assert "| VAE | 1645.7 ± 4.9 | +0.0 | 1645.7 (+0.0) |" in markdown
    assert markdown.count("color{red}") == 3
    assert markdown.count("color{blue}") == 4
    assert "2,000 epochs (the paper: 2,000); K = 100; CIFAR10: all training and 100" in markdown
    assert "10 seeds" in markdown


@pytest.mark.parametrize("name", TABLES)
def test_no_records_are_no_numbers(name, tmp_path):
    main(TABLES[name], Options(out=tmp_path))
    frame = pd.read_csv(tmp_path / f"{name}.csv")
    assert set(frame["seeds"]) == {0}
    for column in ("mean", "sd", "p", "difference_to_vae"):
        assert frame[column].isna().all()
    text = (tmp_path / f"{name}.md").read_text()
    expected = {
        "table4": "| GPVAE | not run | – | 1668.6 (+22.9) |",
        "table5": "| VLAE(4) | not run | – | 605.2 (+41.6) |",
        "main_table": "| GPVAE | not run | – | 693.2 (+8.1) | not run | – | – | not run",
    }
    assert expected[name] in text


def test_a_column_whose_best_has_two_seeds_has_no_marks(tmp_path):
    for seed in range(2):
        write(tmp_path / "runs" / f"gp-{seed}", record("gp", 200.0 + seed, seed))
    for seed in range(3):
        write(tmp_path / "runs" / f"vae-{seed}", record("vae", 100.0 + seed, seed))
    _, text = make(SMALL, tmp_path / "runs", tmp_path / "out")
    assert "| VAE | 101.0 ± 1.0 | +0.0 |" in text
    assert "| GPVAE | 200.5 ± 0.7 (2 seeds) | +99.5 |" in text
    assert "color" not in text
    assert "With fewer than 3 seeds there is no test" in text


def test_other_likelihoods_have_no_published_scores(tmp_path):
    for guide, score in (("vae", -90.0), ("gp", -85.0)):
        write(tmp_path / guide, record(guide, score, likelihood="bernoulli"))
    table, text = make(SMALL, tmp_path, tmp_path / "out")
    assert table[["published", "published_difference"]].isna().all(axis=None)
    assert "bernoulli likelihood, and no published scores, which are Gaussian" in text
    assert "685.1" not in text


def test_controls_of_equal_compute(tmp_path):
    """A GPVAE that starts from a VAE has twice the epochs in all."""
    runs = tmp_path / "runs"
    vae = write(runs / "vae", record("vae", 100.0))
    write(runs / "me", record("me:2", 101.0))
    write(runs / "gp", record("gp", 105.0, start=vae, warm_start="vae"))
    write(runs / "vae-long", record("vae", 107.0, epochs=40))
    write(runs / "vae-twice", record("vae", 106.0, start=vae, warm_start="/elsewhere/vae"))
    frame, _ = make(SMALL, runs, tmp_path / "out")
    frame = frame.set_index("method")
    assert frame["mean"].dropna().to_dict() == {
        "VAE": 100.0, "ME(2)": 101.0, "GPVAE, warm start": 105.0, "VAE, 2 × epochs": 107.0,
        "VAE, 2 × epochs, warm start": 106.0,
    }  # fmt: skip
    assert frame.loc["VAE, 2 × epochs", "published"] != frame.loc["VAE", "published"]
    assert "GPVAE" not in frame.index, "its row is that of the warm start"


def test_a_warm_start_within_the_budget_needs_no_control(tmp_path):
    runs = tmp_path / "runs"
    write(runs / "vae", record("vae", 100.0))
    short = write(runs / "short", record("vae", 90.0, epochs=10))
    write(runs / "gp", record("gp", 105.0, epochs=10, start=short, warm_start="short"))
    frame, _ = make(SMALL, runs, tmp_path / "out", epochs=20)
    assert frame["mean"].tolist()[:1] == [100.0]
    assert frame["mean"].dropna().tolist() == [100.0, 105.0]


def test_one_row_has_one_total(tmp_path):
    """The own epochs of one, or the total of the other, are the budget: no mean over both."""
    vae = write(tmp_path / "vae", record("vae", 100.0))
    short = write(tmp_path / "short", record("vae", 90.0, 1, epochs=10))
    write(tmp_path / "gp-0", record("gp", 105.0, start=vae, warm_start="vae"))
    write(tmp_path / "gp-1", record("gp", 104.0, 1, epochs=10, start=short, warm_start="short"))
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
        gp, vae = (tmp_path / "runs" / name / "record.json" for name in ("gp", "vae-0"))
        assert f"commit is def+ in {gp}; abc in {vae} and 1 more" in said
        assert f"left out: {tmp_path / 'runs' / 'bad' / 'record.json'}" in said
    assert "2 seeds" in text


@pytest.mark.parametrize(("name", "runs"), [("table4", "cifar10"), ("table5", "mnist")])
def test_committed_score_tables_are_those_of_the_committed_records(
    name, runs, tmp_path, monkeypatch
):
    monkeypatch.chdir(RESULTS)
    main(TABLES[name], Options(records=(Path("records") / runs,), epochs=6, out=tmp_path))
    for file in (f"{name}.md", f"{name}.csv"):
        assert (tmp_path / file).read_text() == (RESULTS / file).read_text()


def test_the_committed_table_6_is_that_of_the_committed_record(tmp_path):
    shutil.copy(RESULTS / "table6.json", tmp_path)
    table6.main(table6.Options(render=True, out=tmp_path))
    for kind in ("md", "csv"):
        made, committed = (folder / f"table6.{kind}" for folder in (tmp_path, RESULTS))
        assert made.read_text() == committed.read_text()


@pytest.mark.slow
def test_table_6_times_every_guide(tmp_path):
    options = table6.Options(
        guides=("vae", "vlae:1", "gp"), latent_dims=(2,), repeats=3, train_images=64,
        omniglot="", out=tmp_path,
    )  # fmt: skip
    table6.main(options)
    content = read_json(tmp_path / "table6.json")
    found = {(r["guide"], r["decoder"]): len(r["samples_ms"]) for r in content["rows"]}
    assert found == dict.fromkeys(itertools.product(options.guides, ("fc", "conv")), 3)


def test_table_6_has_medians_quartiles_and_ratios():
    place = {"data": "mnist", "decoder": "fc", "latent_dim": 10}
    rows = [
        place | {"guide": "gp", "samples_ms": [1.0, 2.0, 3.0]},
        place | {"guide": "vlae:8", "samples_ms": [5.0, 7.0, 20.0]},
    ]
    table = table6.with_published(table6.summarise(rows).to_dict("records"))
    assert table.loc[1, ["ms", "ms_low", "ms_high", "ratio"]].tolist() == [7.0, 6.0, 13.5, 3.5]
    assert table.loc[1, "published_ratio"] == pytest.approx(20.7 / 5.7)
    texts = table6.blocks_of(table)["fully-connected decoders"].loc["VLAE(8)"]
    assert texts.tolist() == ["7.0 (6.0 to 13.5)", "3.50", "20.7 (3.63)"]
