r"""Trains a GPVAE in several processes with torch's DistributedDataParallel.

Each process computes the ELBO of its part of every minibatch, and DistributedDataParallel averages
the gradients. Eq. (2) per image is a mean over images, so this is the gradient of the whole
minibatch. The global weights W and U are drawn by each process for itself::

    torchrun --nproc-per-node 2 experiments/distributed_training.py --epochs 10
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from pyro.infer import Trace_ELBO
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from pyro_gpvae import ImageModel, PerImage, initial_sigma, load_data, make_guide, pair


@dataclass
class Options:
    data: str = "mnist5k"
    guide: str = "gp"
    latent_dim: int = 10
    train_images: int | None = None
    epochs: int = 10
    batch_size: int = 128  # images in a minibatch, over all processes
    seed: int = 0
    out: Path = Path("weights.pt")


def main(options: Options) -> None:
    dist.init_process_group()  # gloo on a CPU, NCCL on CUDA
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    images = load_data(options.data).take(options.train_images).train
    torch.manual_seed(options.seed)  # the same networks in all processes
    shape = (images.shape[1], images.shape[2], images.shape[3])
    model = ImageModel(shape, options.latent_dim, sigma=initial_sigma(images)).to(device)
    guide = make_guide(options.guide, model).to(device)
    programs = PerImage(pair(model, guide), len(images)), PerImage(guide, len(images))
    loss = DistributedDataParallel(Trace_ELBO()(*programs))
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-4)
    dataset: Any = images
    sampler: Any = DistributedSampler(dataset, seed=options.seed)
    loader: Any = DataLoader(dataset, options.batch_size // size, sampler=sampler, drop_last=True)
    torch.manual_seed(options.seed + rank)  # other draws of z in each process
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss(batch.to(device) / 255).backward()
            optimizer.step()
    if rank == 0:
        torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
