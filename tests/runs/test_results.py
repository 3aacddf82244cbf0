"""Folders of records are read whatever lies in them; a record repeats its run."""

import shutil

import numpy as np
import pandas as pd
import pytest

from pyro_gpvae import load_data, resume_run, train_run
from pyro_gpvae.cli.commands import Results
from pyro_gpvae.cli.train import Train
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.results import differences, over_seeds, read_results

PLAN = {"file": "tiny.toml", "method": "VAE x2", "epochs_factor": 2, "cut": {"epochs": {}}}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny, vae):
    """A folder with two VAEs, a GPVAE that starts from the first, and much that is none of it."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(vae[0], folder / "vae-0")
    longer = tiny(guide="vae", seed=1, epochs=2)
    train_run(longer, folder / "vae-1", progress=False, plan=PLAN)
    warm = tiny(guide="gp:num_nodes=8", warm_start=str(folder / "vae-0"))
    train_run(warm, folder / "deeper" / "gp", progress=False)
    return folder


@pytest.fixture
def copy(results, tmp_path):
    return shutil.copytree(results, tmp_path / "results")


def test_every_run_is_a_row(results):
    frame, skipped = read_results(results)
    assert skipped == []
    assert list(frame["run"]) == ["deeper/gp", "vae-0", "vae-1"]
    assert list(frame["seed"]) == [0, 0, 1]
    record = read_json(results / "vae-1" / "record.json")
    row = frame.iloc[2]
    assert row["log_evidence"] == record["scores"]["log_evidence"]
    assert row["train_sha256"] == record["data"]["train_sha256"]
    assert row["method"] == "VAE x2"
    assert frame.iloc[0]["method"].startswith("gp:num_nodes=8 after ")
    assert row["cut"] == {"epochs": {}}, "the plan's"


def test_options_that_all_runs_share_are_no_columns(results, capsys):
    Results(folder=results).run()
    head, *_, common, _ = capsys.readouterr().out.split("differs:")[0].splitlines()
    assert head.split() == ["run", "method", "seed", "epochs", "log_evidence", "elbo"]
    assert common.startswith("all runs: data ")
    assert "latent_dim 2" in common


def test_damaged_and_foreign_files_are_skipped(copy, capsys):
    for name, content in {
        "empty": "",
        "list": "[1, 2]",
        "binary": "\0\x01",
        "other": '{"name": "another program"}',
        "nan": '{"config": {}, "scores": {"log_evidence": NaN}}',
        "deep": "[" * 100_000,
    }.items():
        (copy / name).mkdir()
        (copy / name / "record.json").write_text(content)
    evaluate_run(copy / "vae-0", out=copy / "evaluation")
    record = read_json(copy / "vae-0" / "record.json")
    for name, change in {
        "option": {"config": record["config"] | {"colour": "red"}},
        "score": {"scores": record["scores"] | {"log_evidence": "high"}},
        "hash": {"data": record["data"] | {"train_sha256": None}},
    }.items():
        (copy / name).mkdir()
        write_json(copy / name / "record.json", record | change)
    shutil.copytree(copy / "vae-0", copy / "vae-2.partial")

    frame, skipped = read_results(copy)
    assert list(frame["run"]) == ["deeper/gp", "vae-0", "vae-1"], "unfinished runs are no results"
    reasons = {line.split("/")[-2]: line.partition("record.json: ")[2] for line in skipped}
    assert set(reasons) == {
        *("empty", "list", "binary", "other", "nan", "deep"),
        *("evaluation", "option", "score", "hash"),
    }
    assert reasons["evaluation"] == "an evaluation of another run, not a run"
    assert "unknown option 'colour'" in reasons["option"]
    assert reasons["score"] == "not the record of a run: scores.log_evidence is 'high'"
    assert reasons["hash"] == "not the record of a run: data.train_sha256 is None"

    Results(folder=copy, csv=copy / "all.csv", verbose=True).run()
    assert capsys.readouterr().err.count("skipped: ") == 10
    Results(folder=copy, seeds=True).run()
    printed = capsys.readouterr()
    assert printed.err == "", "a mixed folder is not an error"
    assert "3 runs, 10 other records" in printed.out
    assert "seeds" in printed.out
    table = pd.read_csv(copy / "all.csv")
    assert np.array_equal(table["log_evidence"], frame["log_evidence"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_results(copy / "none")


def test_what_makes_scores_incomparable_is_named_once_for_each_field(results):
    frame, _ = read_results(results)
    assert differences(frame) == [], "half of two epochs, by epochs_factor, is one"
    for name, value, line in (
        ("commit", "x", "commit is {} in deeper/gp and 1 more; x in vae-0"),
        (
            "test_sha256",
            "x",
            "data.test_sha256 on mnist5k is {} in deeper/gp and 1 more; x in vae-0",
        ),
        ("epochs", 4, "config.epochs is 1 in deeper/gp and 1 more; 4 in vae-0"),
        ("train_images", None, "config.train_images is 64 in deeper/gp and 1 more; None in vae-0"),
    ):
        other = frame.copy()
        other.loc[1, name] = value
        known = str(frame.loc[0, name])  # hashes are cut
        expected = line.format(known[:12] + "+" * known.endswith("+"))
        assert differences(other) == [expected]


def three_seeds(frame):
    """Three runs of one kind."""
    rows = frame.iloc[[1, 1, 1]].reset_index(drop=True)
    return rows.assign(run=["a", "b", "c"], seed=range(3), log_evidence=[1.0, 2.0, 6.0])


def test_scores_are_averaged_over_seeds_alone(results):
    table = over_seeds(three_seeds(read_results(results)[0]))
    expected = ["vae", "mnist5k", "2", "conv", 3, 3.0, pytest.approx(7**0.5)]
    assert table.to_numpy().tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("learning_rate", 1e-3, "0.001"),
        ("freeze_decoder", True, "True"),
        ("warm_start", "vae-0", "yes"),
        ("epochs", 2, "2"),
        ("likelihood", "bernoulli", "bernoulli"),
    ],
)
def test_other_options_are_another_row(results, name, value, shown):
    frame = three_seeds(read_results(results)[0])
    frame.at[2, name] = value
    table = over_seeds(frame)
    assert table["seeds"].tolist() == [2, 1]
    assert table["log_evidence"].tolist() == [1.5, 6.0]
    assert table[name].tolist()[1] == shown


def test_a_seed_that_is_there_twice_is_named(results):
    frame = three_seeds(read_results(results)[0]).assign(seed=[0, 1, 0])
    assert differences(frame) == ["the same options and seed are those of a, c"]
    with pytest.raises(ValueError, match="a seed is there twice among a, b, c"):
        over_seeds(frame)


def test_a_record_of_an_older_version_has_the_defaults_of_newer_options(copy):
    record = read_json(copy / "vae-0" / "record.json")
    del record["config"]["freeze_decoder"]
    write_json(copy / "vae-0" / "record.json", record)
    assert read_results(copy)[0]["freeze_decoder"].tolist() == [False, False, False]


def test_a_run_is_repeated_from_its_record(results, tmp_path, capsys):
    source = results / "deeper" / "gp" / "record.json"
    Train(from_record=source, out=tmp_path / "again", quiet=True).run()
    again, record = read_json(tmp_path / "again" / "record.json"), read_json(source)
    for name in ("config", "data", "scores", "warm_start"):
        assert again[name] == record[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {}}, "not the record of a run: KeyError"),
        ({"config": {"colour": 1}}, "config has the unknown option 'colour'"),
        ({"config": {"guide": "strange:Guide"}}, "names the guide 'strange:Guide'"),
    ],
)
def test_a_record_that_cannot_be_repeated_is_refused(results, tmp_path, change, message):
    source = tmp_path / "record.json"
    write_json(source, read_json(results / "vae-0" / "record.json") | change)
    with pytest.raises(ValueError, match=message) as caught:
        Train(from_record=source, out=tmp_path / "again").run()
    assert str(source) in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_images_at_hand_are_those_of_the_options(results, tiny, tmp_path):
    """A run on images that were loaded before is the same, and so is one that is continued."""
    data = load_data("mnist5k")
    record = train_run(
        tiny(guide="vae"), tmp_path / "run", progress=False, data=data, plan={"file": "p.toml"}
    )
    expected = read_json(results / "vae-0" / "record.json")
    assert record["scores"] == expected["scores"]
    assert record["data"] == expected["data"]
    assert record["plan"] == {"file": "p.toml"}
    assert resume_run(tmp_path / "run") == record
