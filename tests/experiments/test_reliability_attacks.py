"""Attacks that once succeeded: each is refused by name, or does no harm."""

import dataclasses
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from _plans import read_plan
from scipy.io import savemat

from guides import GaussianGuide
from pyro_gpvae import (
    Checkpoints,
    ImageModel,
    RunConfig,
    evaluate_run,
    load_run,
    log_evidence,
    resume_run,
    train_run,
)
from pyro_gpvae.cli.main import main
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.data.images import load_data
from pyro_gpvae.plots import loss_curves
from pyro_gpvae.runs.report import Report, Section
from pyro_gpvae.runs.run_report import report_runs

CONFIG = RunConfig(
    guide="gp", latent_dim=2, decoder="fc", epochs=1, batch_size=48, train_images=64,
    test_images=4, num_samples=4, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gp"
    train_run(CONFIG, folder, progress=False)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "record.json", "weights.safetensors"])
def test_a_file_without_end_is_not_read(name, copy):
    with (copy / name).open("r+b") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(ValueError, match=rf"{name} has 1,099,511,627,776 bytes, expected at most"):
        load_run(copy)


@pytest.mark.parametrize(("field", "value"), [("train_images", 6400), ("test_images", 3)])
def test_counts_of_a_record_must_be_those_of_the_images(field, value, copy):
    """The number of training images scales the KL divergence of the weights."""
    record = read_json(copy / "record.json")
    record["data"][field] = value
    write_json(copy / "record.json", record)
    with pytest.raises(ValueError, match=rf"data.{field} is {value}, expected .* for the images"):
        evaluate_run(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": None},
        {"versions": False},
        {"seconds": {"training": "1"}},
        {"data": {"image_shape": [2**31 - 1, 28, 28]}},
        {"data": {"image_shape": [-1, -28, 28]}},
    ],
)
def test_a_record_that_no_report_can_read_is_refused(change, copy):
    record = read_json(copy / "record.json")
    for name, value in change.items():
        record[name] = record[name] | value if isinstance(value, dict) else value
    write_json(copy / "record.json", record)
    with pytest.raises(ValueError, match=r"record\.json is not the record of a run"):
        load_run(copy)


def test_a_damaged_history_is_refused_by_a_report(copy, tmp_path):
    history = (copy / "history.csv").read_text()
    for size in (2 * len(history), 1 << 40):
        with (copy / "history.csv").open("w") as file:
            file.write(2 * history)
            file.truncate(size)
        with pytest.raises(ValueError, match=r"history\.csv (is damaged|has 1,099)"):
            report_runs([copy], tmp_path / "report.html", images=0, progress=False)


class Kill(BaseException):
    """The process ends."""


@pytest.mark.parametrize("last", ["scores.csv", "record.json", "config.json"])
def test_a_run_killed_in_its_last_writes_is_not_finished_with_other_images(
    last, tmp_path, monkeypatch
):
    images = np.random.default_rng(0).integers(256, size=(72, 8, 8), dtype=np.uint8)
    data = tmp_path / "own.npz"
    np.savez(data, train=images[:64], test=images[64:])
    config = dataclasses.replace(CONFIG, data=str(data), train_images=None, test_images=None)
    wanted = train_run(config, tmp_path / "undisturbed", progress=False)
    for name in ("write_text", "write_json"):
        monkeypatch.setattr(f"pyro_gpvae.runs.train.{name}", dying(name, last))
    with pytest.raises(Kill):
        train_run(config, tmp_path / "run", progress=False, checkpoint_every=1)
    monkeypatch.undo()
    np.savez(data, train=images[:64], test=images[:8])
    with pytest.raises(ValueError, match="its test images changed"):
        resume_run(tmp_path / "run", progress=False)
    np.savez(data, train=images[:64], test=images[64:])
    assert resume_run(tmp_path / "run", progress=False)["scores"] == wanted["scores"]


def dying(name, last):
    from pyro_gpvae.core import _files

    write, count = getattr(_files, name), 0

    def write_or_die(path, value):
        nonlocal count
        count += path.name == last
        if count == (2 if last == "config.json" else 1):  # it is also written at the start
            raise Kill
        write(path, value)

    return write_or_die


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, resume=True)
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match="it unpacks to more than its size"):
        checkpoints.latest()


def test_a_plan_of_too_many_cells_is_refused(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('[budget]\nseeds = 1000000000\n[[methods]]\nguide = "vae"\n')
    with pytest.raises(
        ValueError, match="a method has 1,000,000,000 cells, expected at most 10,000"
    ):
        read_plan(plan)


def test_a_record_does_not_control_the_terminal(copy, capsys):
    write_json(
        copy / "record.json",
        read_json(copy / "record.json") | {"plan": {"method": "\x1b]0;title\x07\x1b[2Jred"}},
    )
    assert main(["results", str(copy)]) == 0
    write_json(copy / "config.json", read_json(copy / "config.json") | {"\x1b[2J": 0})
    assert main(["evaluate", str(copy)]) == 2
    found = capsys.readouterr()
    assert r"\x1b]0;title\x07\x1b[2Jred" in found.out
    assert not {"\x1b", "\x07"} & set(found.out + found.err)


def test_a_file_of_omniglot_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    blank = np.zeros((784, 500))
    arrays = {"data": blank, "testdata": blank}
    for compressed in (True, False):
        savemat(tmp_path / "chardata.mat", arrays, do_compression=compressed)
        assert len(load_data("omniglot", root=tmp_path).train) == 500
        with monkeypatch.context() as patch:
            patch.setattr("pyro_gpvae.data._files.RAW_LIMIT", 2 * blank.nbytes)
            with pytest.raises(ValueError, match=r"(more than|at most) 6,272,000"):
                load_data("omniglot", root=tmp_path)
    (tmp_path / "chardata.mat").write_bytes(bytes(1000))  # of MATLAB 4, of endless elements
    with pytest.raises(ValueError, match="not a file of MATLAB 5"):
        load_data("omniglot", root=tmp_path)


def test_an_archive_that_unpacks_in_one_piece_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "own.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("train.npy", bytes(1 << 20))
    with pytest.raises(ValueError, match="compressed in another way than numpy does"):
        load_data(tmp_path / "own.npz")


def test_a_raw_file_without_end_is_not_read(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").touch()
    with (raw / "t10k-labels-idx1-ubyte").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has 1,099,511,627,776 bytes"):
        load_data("mnist", root=tmp_path)


def test_a_training_that_diverged_gives_no_score_without_a_warning():
    images = load_data("mnist5k").test[:4]
    model = ImageModel((1, 28, 28), 2)
    guide = GaussianGuide(model)
    with torch.no_grad():
        model.decoder[-1].bias.fill_(1e30)
    with pytest.warns(UserWarning, match="of 4 of 4 images is not finite.* This is no score"):
        assert log_evidence(model, guide, images, 2).mean == -torch.inf


@pytest.mark.parametrize("count", [True, 2.5, "2"])
def test_a_number_of_samples_is_a_whole_number(count):
    model = ImageModel((1, 28, 28), 2)
    with pytest.raises(ValueError, match=f"num_samples must be a whole number, got {count!r}"):
        log_evidence(model, GaussianGuide(model), torch.rand(2, 1, 28, 28), count)


def test_links_in_a_folder_do_not_lead_writes_out_of_it(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("curves.png", "page.md", "report.html"):
        (folder / name).symlink_to(mine)
    figure = loss_curves({"vae": pd.DataFrame({"epoch": [1], "loss": [2.0]})})
    section = Section("Curves", figures={"curves.png": figure})
    Report("Title", "caption", [section]).save(folder, "page.md")
    assert mine.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
