"""Splits are disjoint and fixed for all time, and no test image has a say in training."""

import hashlib

import numpy as np
import pytest
import torch

from pyro_gpvae import load_data
from pyro_gpvae.core._files import read_json
from pyro_gpvae.data.images import split_validation
from pyro_gpvae.runs.config import RunConfig
from pyro_gpvae.runs.train import train_run

# SHA-256 of the indices as int64, little-endian, training ones first: a score on a split is only
# worth something as long as everybody gets the same one
SPLITS = {
    (4_000, 400, 0): "a94cd9aaf608630d7b1bbf646d2fdbc29dd9a8ec21ea7f02dd65d76eb1793bc6",
    (60_000, 5_000, 0): "cdc303eae2d0cafef7de32fe248321e5e5af4d37d70e3c5f3b3d29abcf885406",
    (60_000, 5_000, 1): "956dd05de81cc7d0df3e49a88aa3088662534aed7d0f6c180b894124e0fcae04",
    (50_000, 5_000, 0): "207fcd4d2e7ff3778833e12f370ed95086852610b79b507af2f193e8c66b9e9c",
    (24_345, 1_345, 0): "abc08e908ef2f95005eaaf23f25d966e27c5725c197c7718ebc2aea6e38a0dd1",
}


def indices(count, held_out, seed):
    every = torch.arange(count)[:, None, None, None]
    train, validation = split_validation(every, held_out, seed)
    return train.flatten(), validation.flatten()


@pytest.mark.parametrize(("count", "held_out", "seed"), SPLITS)
def test_a_split_is_disjoint_complete_and_the_one_on_record(count, held_out, seed):
    torch.manual_seed(count)  # of no importance
    train, validation = indices(count, held_out, seed)
    assert (len(train), len(validation)) == (count - held_out, held_out)
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(count))
    content = torch.cat([train, validation]).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest() == SPLITS[count, held_out, seed]


def run(folder, name, test, **options):
    """Trains on the same images, beside other test images."""
    data = load_data("mnist5k")
    file = folder / f"{name}.npz"
    np.savez(file, train=data.train[:160, 0], test=test)
    config = RunConfig(
        data=str(file), epochs=2, validation=32, latent_dim=2, num_samples=3, batch_size=64,
        device="cpu", **options,
    )  # fmt: skip
    train_run(config, folder / name, progress=False)
    return folder / name


@pytest.mark.parametrize(
    ("guide", "likelihood"),
    [("vae", "gaussian"), ("gp:num_nodes=4", "bernoulli"), ("rme:2", "gaussian")],
)
def test_other_test_images_leave_training_bit_for_bit_as_it_was(guide, likelihood, tmp_path):
    images = load_data("mnist5k").test[:, 0].numpy()
    options = {"guide": guide, "likelihood": likelihood}
    a = run(tmp_path, "a", images[:9], **options)
    b = run(tmp_path, "b", 255 - images[20:24], **options)
    weights = [(folder / "weights.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]
    histories = [np.genfromtxt(f / "history.csv", delimiter=",", names=True) for f in (a, b)]
    for column in histories[0].dtype.names:
        if column != "seconds":
            assert np.array_equal(histories[0][column], histories[1][column]), column
    assert "validation_elbo" in histories[0].dtype.names
    scores = [read_json(folder / "record.json")["scores"]["elbo"] for folder in (a, b)]
    assert scores[0] != scores[1]  # the test images were others indeed
