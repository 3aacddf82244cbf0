"""Trains or scores with pythae, in an environment without this package: see peer.py."""

# mypy: disable-error-code="import-not-found,misc"
# pythae is not installed where types are checked

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from _handwritten import NETS, Net, decoder, encoder
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAE_IAF, VAE_IAF_Config, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback
from torch import Tensor


class Encoder(BaseEncoder):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = encoder(net)

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_variance = self.net(x).chunk(2, dim=1)
        return ModelOutput(embedding=loc, log_covariance=log_variance)


class Decoder(BaseDecoder):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = decoder(net)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z))


class Clock(TrainingCallback):
    """Records when epochs end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_end(self, training_config: Any, **others: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


class Trainer(BaseTrainer):
    """pythae's trainer without progress bar, messages and files."""

    def _setup_callbacks(self) -> None:
        self.callback_handler = CallbackHandler(callbacks=self.callbacks, model=self.model)

    def save_model(self, model: Any, dir_path: str) -> None:
        pass


def main(
    task: str, guide: str, latent_dim: int, device: str, images: str, seed: int, **options: Any
) -> dict[str, Any]:
    """Does the task with pythae's model and trainer on the networks of Table 1."""
    torch.manual_seed(seed)
    arrays = np.load(images)
    data = {name: torch.from_numpy(arrays[name]).float() / 255 for name in ("train", "test")}
    net = Net("conv", NETS["conv"].image_shape, latent_dim, NETS["conv"].batch_size)
    sizes = {"input_dim": net.image_shape, "latent_dim": latent_dim}
    networks = {"encoder": Encoder(net), "decoder": Decoder(net)}
    if guide == "iaf":  # as many steps, as wide as ours
        flow = {"n_made_blocks": 2, "n_hidden_in_made": 1, "hidden_size": 256}
        model = VAE_IAF(VAE_IAF_Config(**sizes, **flow), **networks)
    else:
        model = VAE(VAEConfig(**sizes), **networks)
    model.to(device)
    if weights := options.get("load"):
        load(model, weights)
    answer = {"torch": torch.__version__}
    if task == "train":
        return answer | train(model, data["train"], device, **options)
    return answer | nll(model.eval(), data["test"].to(device), **options)


def train(
    model: Any, images: Tensor, device: str, epochs: int, fused: bool = False
) -> dict[str, float]:
    """Returns the seconds of an epoch, without the first one."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            per_device_train_batch_size=NETS["conv"].batch_size,
            num_epochs=epochs + 1,
            learning_rate=5e-4,
            optimizer_params={"fused": True} if fused else None,
            no_cuda=device == "cpu",
        )
        data = BaseDataset(images, torch.zeros(len(images)))
        Trainer(model, data, None, config, [clock]).train()
    return {"epoch": (clock.times[-1] - clock.times[0]) / epochs}


@torch.no_grad()
def nll(
    model: Any, x: Tensor, num_samples: int, batch_sizes: list[int], **_: Any
) -> dict[str, float]:
    """Returns the seconds of an image's log p(x) with the fastest batch size, and its mean."""
    model.get_nll(x[:2], num_samples, batch_sizes[0])  # warm-up
    answers = []
    for batch_size in batch_sizes:
        start = time.perf_counter()
        mean = float(model.get_nll(x, num_samples, batch_size))  # its sign is that of log p(x)
        seconds = (time.perf_counter() - start) / len(x)
        answers.append({"seconds": seconds, "mean": mean, "batch_size": batch_size})
    return min(answers, key=lambda answer: answer["seconds"])


def load(model: Any, path: str) -> None:
    """Copies the parameters of our encoder and decoder."""
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    arrays = np.load(path)
    with torch.no_grad():
        for parameter, name in zip(parameters, arrays.files, strict=True):
            parameter.copy_(torch.from_numpy(arrays[name]))
        head = model.encoder.net[-1]
        for parameter in (head.weight, head.bias):
            parameter[len(parameter) // 2 :] *= 2  # the logarithm of a variance


if __name__ == "__main__":
    logging.disable(logging.INFO)
    print(json.dumps(main(**json.loads(sys.argv[1]))))
