"""Folders of records are read whatever lies in them; a record alone repeats its run."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from pyro_gpvae import RunConfig, load_data, resume_run, train_run
from pyro_gpvae.cli.results import Results
from pyro_gpvae.cli.train import Train
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.runs.evaluate import evaluate_run
from pyro_gpvae.runs.reproduce import reproduce_run
from pyro_gpvae.runs.results import differences, read_results, score_table, select

TINY = RunConfig(
    latent_dim=2,
    epochs=1,
    batch_size=32,
    train_images=64,
    test_images=6,
    num_samples=5,
    device="cpu",
    guide="vae",
)
PLAN = {"file": "tiny.toml", "method": "VAE x2", "epochs_factor": 2, "cut": {"epochs": {}}}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with two VAEs, a GPVAE that starts from the first, and much that is none of it."""
    folder = tmp_path_factory.mktemp("results")
    train_run(TINY, folder / "vae-0", progress=False)
    train_run(
        dataclasses.replace(TINY, seed=1, epochs=2), folder / "vae-1", progress=False, plan=PLAN
    )
    warm = dataclasses.replace(TINY, guide="gp:num_nodes=8", warm_start=str(folder / "vae-0"))
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
    by_hand = frame.iloc[1]["cut"]
    assert by_hand["epochs"] == {"used": 1, "full": 2000}, "a run by hand says it as well"


def test_rows_are_selected_as_cells_are(results):
    frame, _ = read_results(results)
    assert list(select(frame, {"guide": ["gp"]})["run"]) == ["deeper/gp"]
    assert list(select(frame, {"guide": ["vae"], "seed": ["1", "2"]})["run"]) == ["vae-1"]
    assert list(select(frame, {})["run"]) == list(frame["run"])


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

    Results(folder=copy, csv=copy / "all.csv", where=("data=mnist5k",)).run()
    printed = capsys.readouterr()
    assert printed.err.count("skipped: ") == 10
    assert "3 runs, 10 files skipped" in printed.out
    table = pd.read_csv(copy / "all.csv")
    assert np.array_equal(table["log_evidence"], frame["log_evidence"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_results(copy / "none")


def test_what_makes_scores_incomparable_is_named(results):
    frame, _ = read_results(results)
    assert differences(frame) == [], "half of two epochs, by epochs_factor, is one"
    for name, field in {
        "commit": "commit",
        "device": "device",
        "test_sha256": "data.test_sha256",
        "epochs": "config.epochs",
        "train_images": "config.train_images",
    }.items():
        other = frame.copy()
        other.loc[1, name] = None if name == "train_images" else 4 if name == "epochs" else "x"
        lines = differences(other)
        assert len(lines) == 1
        assert lines[0].startswith(f"vae-0/record.json: {field} is ")
        if name in ("epochs", "train_images"):
            with pytest.raises(ValueError, match=rf"mixed budgets .*vae-0/record.json: {field}"):
                score_table(other)
        else:
            assert lines[0] in score_table(other), "a caption says it"


def test_a_cut_budget_is_in_the_caption(results):
    frame, _ = read_results(results)
    text = score_table(frame, "Tiny")
    assert "| VAE x2 |" in text
    for part in ("1 epochs (the paper: 2000)", "K = 5 (100)", "first 64 training", "CUT BUDGET"):
        assert part in text
    full = frame.assign(
        epochs=2000 * frame["epochs_factor"],
        num_samples=100,
        batch_size=128,
        train_images=None,
        test_images=None,
        cut=[{}] * len(frame),
    )
    assert "2,000 epochs, K = 100, 1 seed." in score_table(full)
    assert "CUT" not in score_table(full)
    with pytest.raises(ValueError, match="there is no run"):
        score_table(frame.iloc[:0])
    assert "| vae | 3.0 ± 2.6 |" in score_table(three_seeds(frame))


def three_seeds(frame):
    """Three runs of one kind."""
    rows = frame.iloc[[1, 1, 1]].reset_index(drop=True)
    return rows.assign(run=["a", "b", "c"], seed=range(3), log_evidence=[1.0, 2.0, 6.0])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 1e-3}, "config.learning_rate is 0.001; 2 runs"),
        ({"freeze_decoder": True}, "config.freeze_decoder is True; 2 runs"),
        ({"warm_start": "vae-0"}, "config.warm_start is a folder; 2 runs"),
        ({"guide": "gp"}, "config.guide is gp; 2 runs"),
        ({"epochs": 2, "epochs_factor": 2}, "plan.epochs_factor is 2; 2 runs"),
        ({"seed": 0}, "config.seed is 0, as in a/record.json"),
    ],
)
def test_what_is_averaged_differs_by_the_seed_alone(results, change, field):
    frame = three_seeds(read_results(results)[0])
    score_table(frame)
    for name, value in change.items():
        frame.at[2, name] = value
    where = "of vae, mnist5k, 2, conv, gaussian"
    assert [line for line in differences(frame) if field in line and where in line], "it is listed"
    with pytest.raises(ValueError, match=f"differ in more than the seed.*c/record.json: {field}"):
        score_table(frame)
    # in another cell it is what it is
    assert "| other | 6.0 |" in score_table(frame.assign(method=["vae", "vae", "other"]))


def test_likelihoods_have_columns_of_their_own(results):
    frame = three_seeds(read_results(results)[0])
    frame.loc[2, ["likelihood", "train_sha256", "seed"]] = ["bernoulli", "binarised", 0]
    text = score_table(frame)
    assert "| method | mnist5k, p = 2, conv | mnist5k, p = 2, conv, bernoulli |" in text
    assert "| vae | 1.5 ± 0.7 | 6.0 |" in text
    assert "1 to 2 seeds" in text
    assert "Note:" not in text, "binarised images are others"


def test_a_mixed_folder_is_listed(copy, capsys):
    """Runs that no table may average are listed all the same, with what differs."""
    shutil.copytree(copy / "vae-0", copy / "again")
    record = read_json(copy / "vae-0" / "record.json")
    record["config"]["learning_rate"] = 1e-3
    del record["config"]["freeze_decoder"]  # as a version without that option wrote it
    (copy / "faster").mkdir()
    write_json(copy / "faster" / "record.json", record)
    Results(folder=copy).run()
    printed = capsys.readouterr().out
    assert "5 runs, 0 files skipped" in printed
    assert "differs: faster/record.json: config.learning_rate is 0.001; 2 runs of vae" in printed
    assert "freeze_decoder" not in printed
    assert (
        "differs: faster/record.json, vae-0/record.json: config.seed is 0, as in again" in printed
    )
    with pytest.raises(ValueError, match="differ in more than the seed"):
        Results(folder=copy, table=True).run()


def test_a_record_alone_repeats_its_run(results, tmp_path, monkeypatch):
    """Also where the warm start is gone: it is trained again."""
    (tmp_path / "alone").mkdir()
    source = tmp_path / "alone" / "record.json"
    record = read_json(results / "deeper" / "gp" / "record.json")
    record["config"]["warm_start"] = str(tmp_path / "gone")
    source.write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    Train(from_record=source, out=tmp_path / "again", quiet=True).run()
    again = read_json(tmp_path / "again" / "record.json")
    assert again["scores"] == record["scores"]
    start = read_json(tmp_path / "again-warm-start" / "record.json")
    assert start["scores"] == read_json(results / "vae-0" / "record.json")["scores"]
    assert again["warm_start"]["scores"] == start["scores"]


def test_a_warm_start_that_is_there_is_used(copy, tmp_path):
    """By its recorded path, or beside the record; only if it is the very same run."""
    record = copy / "deeper" / "gp" / "record.json"
    content = read_json(record)
    content["config"]["warm_start"] = "vae-0"
    write_json(record, content)
    shutil.move(copy / "vae-0", copy / "deeper" / "vae-0")
    again = reproduce_run(record, tmp_path / "again", progress=False)
    assert again["scores"] == content["scores"]
    assert not (tmp_path / "again-warm-start").exists()
    other = read_json(copy / "deeper" / "vae-0" / "record.json") | {"steps": 99}
    write_json(copy / "deeper" / "vae-0" / "record.json", other)
    reproduce_run(record, tmp_path / "once more", progress=False)
    assert (tmp_path / "once more-warm-start").exists()


OTHER_DATA = {"image_shape": [1, 28, 28], "train_images": 64, "train_sha256": "0"}
OTHER_DATA["test_sha256"] = "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": OTHER_DATA}, "data.train_sha256 is not that"),
        ({"scores": {}}, "not the record of a run: KeyError"),
        ({"threads": "two"}, "threads must be a positive number"),
        ({"config": {"colour": 1}}, "config has the unknown option 'colour'"),
        ({"config": {"guide": "strange:Guide"}}, "names the guide 'strange:Guide'"),
        ({"config": {"warm_start": "x"}}, "whose record is not in this one"),
    ],
)
def test_a_record_that_cannot_be_repeated_is_refused(results, tmp_path, change, message):
    source = tmp_path / "record.json"
    write_json(source, read_json(results / "vae-0" / "record.json") | change)
    with pytest.raises(ValueError, match=message) as caught:
        reproduce_run(source, tmp_path / "again", progress=False)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_other_code_and_other_scores_are_flagged(results, tmp_path):
    source = tmp_path / "record.json"
    record = read_json(results / "vae-0" / "record.json")
    record["commit"] = "123"
    record["scores"]["log_evidence"] += 1
    write_json(source, record)
    with pytest.warns(UserWarning, match=r"not as recorded: the score \(recorded .*commit"):
        reproduce_run(source, tmp_path / "again", progress=False)


def test_options_beside_a_record_are_refused(results, tmp_path):
    source = results / "vae-0" / "record.json"
    with pytest.raises(ValueError, match=r"--from-record repeats .*drop --epochs"):
        Train(from_record=source, epochs=3, out=tmp_path / "x").run()
    with pytest.raises(ValueError, match=r"--resume continues .*drop --from-record"):
        Train(from_record=source, resume=tmp_path / "x").run()


def test_images_at_hand_are_those_of_the_options(results, tmp_path):
    """A run on images that were loaded before is the same, and so is one that is continued."""
    data = load_data("mnist5k")
    record = train_run(TINY, tmp_path / "run", progress=False, data=data, plan={"file": "p.toml"})
    expected = read_json(results / "vae-0" / "record.json")
    assert record["scores"] == expected["scores"]
    assert record["data"] == expected["data"]
    assert record["plan"] == {"file": "p.toml"}
    assert resume_run(tmp_path / "run") == record
