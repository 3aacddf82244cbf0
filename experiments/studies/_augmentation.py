"""Minibatches in which half of the images are rotated, scaled and shifted at random."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_gpvae.data._torchvision import import_torchvision

#: The largest rotation in degrees, and the largest shift in widths of an image.
ROTATION, SHIFT = 12, 0.035
SCALES = (0.9, 1.1)


def augmented(images: Tensor, batch_size: int) -> DataLoader[Any]:
    """Returns minibatches of images (N, C, H, W); each image is transformed or left alone."""
    import_torchvision()
    v2: Any = import_module("torchvision.transforms.v2")
    bilinear = v2.InterpolationMode.BILINEAR
    affine = v2.RandomAffine(ROTATION, (SHIFT, SHIFT), SCALES, interpolation=bilinear)
    transform = v2.RandomApply([affine], p=0.5)

    def collate(items: list[Tensor]) -> Tensor:
        return torch.stack([transform(image) for image in items])

    dataset: Any = images
    return DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate)
