"""The embedded digits, :class:`ImageData`, and the one conversion of images."""

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch

from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.data.images import ImageData, check_images, load_data, split_validation


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def images(*shape, seed=0):
    return torch.from_numpy(pixels(*shape, seed=seed))


def equal(data, *expected):
    found = (data.train, data.test, data.train_labels, data.test_labels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_embedded_digits_are_those_of_their_readme(tmp_path):
    folder = resources.files("pyro_gpvae.data")
    content = (folder / "mnist5k.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text("utf-8")
    data = load_data("mnist5k", root=tmp_path)
    assert data.train_labels.bincount().tolist() == [400] * 10
    assert data.test_labels.bincount().tolist() == [100] * 10
    distinct = {image.numpy().tobytes() for image in torch.cat([data.train, data.test])}
    assert len(distinct) == 5000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": images(3, 1, 8, 8) / 255}, "train: expected uint8.*multiply by 255"),
        (
            {"test": images(3, 8, 8)},
            r"test: expected at least one image, shape \(B, C, H, W\).*unsqueeze\(1\)",
        ),
        ({"test": images(3, 1, 8, 7)}, r"test: expected images of shape \(1, 8, 8\)"),
        ({"test": images(0, 1, 8, 8)}, "test: expected at least one image"),
        ({"train": images(2, 8, 8, 3)}, r"movedim\(-1, 1\)"),
        ({"train": pixels(3, 1, 8, 8)}, r"train: .*ndarray"),
        ({"train_labels": torch.arange(2)}, r"train_labels: .*shape \(3,\)"),
        ({"test_labels": torch.zeros(3)}, "test_labels: .*int64"),
        ({"test_labels": [1]}, r"test_labels: .*list"),
    ],
)
def test_image_data_refuses(change, message):
    arguments = {"name": "blank", "train": images(3, 1, 8, 8), "test": images(3, 1, 8, 8)}
    with pytest.raises((TypeError, ValueError), match=message):
        ImageData(**{**arguments, **change})


def test_to_batch_divides_pixels_and_takes_floats_as_they_are():
    every = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    module = torch.nn.Linear(1, 1).double()
    assert torch.equal(to_batch(every)[0].flatten(), torch.arange(256).float() / 255)
    assert torch.equal(
        to_batch(every, print, module)[0].flatten(), torch.arange(256).double() / 255
    )
    assert to_batch(100 * torch.ones(2, 3), module)[0].dtype == torch.float64
    assert to_batch(100 * torch.ones(2, 3))[0].max() == 100
    for dtype in (torch.int64, torch.bool):  # counts, labels and masks
        labels = torch.arange(256).to(dtype)
        pair = to_batch((every, labels), module)
        assert pair[0].dtype == torch.float64
        assert torch.equal(pair[1], labels)
    check_images(every)


def test_binarized_keeps_the_intensity_on_average():
    # 20,000 draws for each of the 256 values; z-scores beyond 5 have probability 6e-7 each
    values = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16).expand(20_000, 1, 16, 16)
    data = ImageData("grey", values, values[:1]).binarized(seed=3)
    assert set(data.train.unique().tolist()) == {0, 255}
    p = torch.arange(256, dtype=torch.float64) / 255
    mean = (data.train == 255).double().mean(0).flatten()
    assert (mean[0], mean[255]) == (0, 1)
    z = (mean - p)[1:255] / (p * (1 - p) / 20_000).sqrt()[1:255]
    assert z.abs().max() < 5


def test_binarized_is_fixed_by_its_seed_and_nothing_else():
    data = load_data("mnist5k").take(50, 20)
    state = torch.get_rng_state()
    once, again, other = data.binarized(1), data.binarized(1), data.binarized(2)
    assert torch.equal(torch.get_rng_state(), state)
    equal(once, again.train, again.test, data.train_labels, data.test_labels)
    assert not torch.equal(once.train, other.train)
    equal(once.take(7, 3), *(getattr(data.take(7, 3).binarized(1), p) for p in ("train", "test")),
          data.train_labels[:7], data.test_labels[:3])  # fmt: skip
    swapped = ImageData("x", data.test, data.train).binarized(1)
    assert not torch.equal(once.train[:20], swapped.test[:20]), "training and test draws differ"
    assert once.name == "mnist5k-binarized"


def test_take_keeps_the_first_and_refuses_other_numbers():
    data = load_data("mnist5k")
    part = data.take(30)
    equal(part, data.train[:30], data.test, data.train_labels[:30], data.test_labels)
    for wrong in ({"train": 0}, {"train": 4001}, {"test": -1}, {"test": 1001}):
        with pytest.raises(ValueError, match=r"expected 1 to .* got"):
            data.take(**wrong)
    for size in (0, -1, 4000):
        with pytest.raises(ValueError, match=f"between 1 and 3999 of the 4000 images, got {size}"):
            split_validation(data.train, size)
