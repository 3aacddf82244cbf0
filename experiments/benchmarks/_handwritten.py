"""A VAE as one writes it in plain PyTorch: the yardstick. Nothing but torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Net:
    """Which networks: shape of an image, dimension p of z, images per step."""

    kind: str
    image_shape: tuple[int, int, int]
    latent_dim: int
    batch_size: int


#: Table 1 of the paper's supplement, bound by arithmetic; a tiny net, bound by overhead.
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
    """Encoder, decoder and one log σ."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.encoder = encoder(net)
        self.decoder = decoder(net)
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO with the analytic KL, in nats per image, but for a constant."""
        loc, log_scale = self.encoder(x).chunk(2, dim=1)
        scale = log_scale.exp()
        z = loc + scale * torch.randn_like(loc)
        squares = (x - self.decoder(z)).square().sum() / (2 * (2 * self.log_sigma).exp())
        kl = (0.5 * (loc.square() + scale.square() - 1) - log_scale).sum()
        return (squares + kl) / len(x) + x[0].numel() * self.log_sigma


def eager(vae: VAE, images: Tensor, learning_rate: float = 5e-4) -> Step:
    """A step on some of the uint8 images: gather, loss, gradients, fused Adam."""
    optimizer = torch.optim.Adam(vae.parameters(), learning_rate, fused=True)

    def step(index: Tensor) -> Tensor:
        loss = vae.loss(images[index].float() / 255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(vae: VAE, images: Tensor, batch_size: int, learning_rate: float = 5e-4) -> Step:
    """The same step as one CUDA graph, replayed: a launch instead of hundreds."""
    optimizer = torch.optim.Adam(vae.parameters(), learning_rate, fused=True, capturable=True)
    chosen = torch.zeros(batch_size, dtype=torch.long, device=images.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = vae.loss(images[chosen].float() / 255)
        loss.backward()
        optimizer.step()
        return loss.detach()

    with torch.cuda.device(images.device):
        aside = torch.cuda.Stream()  # PyTorch wants some steps on a stream of their own before
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=aside):
            loss = step()

    def replay(index: Tensor) -> Tensor:
        chosen.copy_(index)
        graph.replay()
        return loss.detach()

    return replay
