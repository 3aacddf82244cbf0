"""A VAE in plain PyTorch, the baseline of the benchmarks. Only torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Net:
    """Sizes of the networks: shape of an image, dimension p of z, images per step."""

    kind: str
    image_shape: tuple[int, int, int]
    latent_dim: int
    batch_size: int


#: Table 1 of the paper's supplement, limited by arithmetic; a tiny network, limited by overhead.
NETS = {"conv": Net("conv", (1, 28, 28), 50, 128), "tiny": Net("fc", (1, 8, 8), 5, 32)}


def features(net: Net) -> nn.Sequential:
    """Images (B, C, H, W) to features (B, d)."""
    if net.kind == "fc":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LeakyReLU())
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.LeakyReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.LeakyReLU(),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, 256),
        nn.LeakyReLU(),
    )


def encoder(net: Net) -> nn.Sequential:
    """Images (B, C, H, W) to mean and log-scale of q(z|x), side by side (B, 2p)."""
    layers = features(net)
    layers.append(nn.Linear(64 if net.kind == "fc" else 256, 2 * net.latent_dim))
    return layers


def decoder(net: Net) -> nn.Sequential:
    """Latents (B, p) to means of images (B, C, H, W)."""
    if net.kind == "fc":
        return nn.Sequential(
            nn.Linear(net.latent_dim, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.Unflatten(1, net.image_shape),
        )
    return nn.Sequential(
        nn.Linear(net.latent_dim, 256),
        nn.ReLU(),
        nn.Linear(256, 64 * 3 * 3),
        nn.ReLU(),
        nn.Unflatten(1, (64, 3, 3)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )


class VAE(nn.Module):
    """An encoder, a decoder and one log σ."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.encoder = encoder(net)
        self.decoder = decoder(net)
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def loss(self, x: Tensor) -> Tensor:
        """Returns minus the ELBO with the analytic KL, in nats per image, up to a constant."""
        loc, log_scale = self.encoder(x).chunk(2, dim=1)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        squares = (x - self.decoder(z)).square().sum() / (2 * (2 * self.log_sigma).exp())
        kl = (0.5 * (loc.square() + scale.square() - 1) - log_scale).sum()
        return (squares + kl) / len(x) + x[0].numel() * self.log_sigma


def eager(vae: VAE, images: Tensor, learning_rate: float = 5e-4) -> Step:
    """Returns a step on some of the uint8 images: gather, loss, gradients, fused Adam."""
    optimizer = torch.optim.Adam(vae.parameters(), learning_rate, fused=True)

    def step(index: Tensor) -> Tensor:
        loss = vae.loss(images[index].float() / 255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
