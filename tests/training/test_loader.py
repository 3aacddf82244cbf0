"""Images from a DataLoader: every image once an epoch, and resuming bit for bit."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset
from toy import Dying, Kill, uint8
from trainings import assert_same, of, trained

from guides import GaussianGuide
from pyro_gpvae import Checkpoints


class Noisy(Dataset):
    """Images with noise of the global generator, as augmentation adds it."""

    def __len__(self):
        return 22

    def __getitem__(self, i):
        return (uint8(22)[i] / 255 + 0.01 * torch.randn(1, 2, 3)).clamp(0, 1)


def plain(**options):
    return DataLoader(uint8(22), batch_size=8, **options)


LOADERS = {
    "in order": plain,
    "shuffled": lambda: plain(shuffle=True),
    "drop_last": lambda: plain(shuffle=True, drop_last=True),
    "tuples": lambda: DataLoader(TensorDataset(uint8(22)), 8, shuffle=True),
    "own generator": lambda: plain(shuffle=True, generator=torch.Generator().manual_seed(9)),
    "replacement": lambda: plain(sampler=RandomSampler(uint8(22), replacement=True)),
    "random transform": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True),
    "workers": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2),
}
SLOW = pytest.param("workers", marks=pytest.mark.slow)


def train(loader, checkpoints=None):
    return trained(lambda: of(GaussianGuide), loader, epochs=2, checkpoints=checkpoints)


@pytest.mark.parametrize("kind", [SLOW if kind == "workers" else kind for kind in LOADERS])
def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(kind, tmp_path):
    torch.manual_seed(1)
    expected = train(LOADERS[kind]())
    torch.manual_seed(2)  # a new process has another random state
    with pytest.raises(Kill):
        train(LOADERS[kind](), Dying(tmp_path, every=1))
    torch.manual_seed(3)
    found = train(LOADERS[kind](), Checkpoints(tmp_path, resume=True))
    assert_same(found, expected)


def test_other_images_are_refused(tmp_path):
    train(plain(), tmp_path)
    other = DataLoader(255 - uint8(22), batch_size=8)
    with pytest.raises(ValueError, match="its data is"):
        train(other, Checkpoints(tmp_path, resume=True))


class Endless(IterableDataset):
    def __iter__(self):
        yield from uint8(22)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(uint8(22), batch_size=None), "must have a batch_size"),
        (lambda: DataLoader(Endless(), batch_size=8), r"must have len\(\) and an index"),
        (
            lambda: DataLoader(uint8(22), batch_size=23, drop_last=True),
            "no minibatch of its 22 members",
        ),
        (lambda: DataLoader(uint8(22)[:0], batch_size=3), "no minibatch of its 0 members"),
        (
            lambda: DataLoader([{"x": 1}] * 9, batch_size=3),
            "must give a tensor or a tuple of tensors, got dict",
        ),
        (lambda: DataLoader(torch.zeros(9, 1, 4, 4), batch_size=3), "the model expects images"),
        (
            lambda: DataLoader(TensorDataset(uint8(9), torch.arange(9)), batch_size=3),
            "takes images alone, got 2 tensors: leave out labels",
        ),
    ],
)
def test_loaders_that_cannot_be_used_are_named(loader, message):
    with pytest.raises(ValueError, match=message):
        train(loader())
