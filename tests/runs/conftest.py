"""Two finished runs that many tests read, and a copy of the first one."""

import shutil

import pytest

from pyro_gpvae import RunConfig, train_run

TINY = {
    "latent_dim": 2,
    "epochs": 1,
    "batch_size": 48,
    "train_images": 64,
    "test_images": 10,
    "num_samples": 5,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def tiny():
    """A function that makes the options of a run that takes a second."""
    return lambda **changes: RunConfig(**(TINY | changes))


@pytest.fixture(scope="session")
def vae(tmp_path_factory, tiny):
    """A finished VAE run and its record."""
    folder = tmp_path_factory.mktemp("runs") / "vae"
    return folder, train_run(tiny(guide="vae"), folder, progress=False)


@pytest.fixture(scope="session")
def gp(tmp_path_factory, tiny, vae):
    """A finished GPVAE run that started from the VAE, and its record."""
    folder = tmp_path_factory.mktemp("runs") / "gp"
    config = tiny(guide="gp", warm_start=str(vae[0]), validation=8)
    return folder, train_run(config, folder, progress=False)


@pytest.fixture
def folder(vae, tmp_path):
    """A copy of the VAE run, which a test may change."""
    return shutil.copytree(vae[0], tmp_path / "run")
