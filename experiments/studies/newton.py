"""Newton steps with an amortised Hessian: the share of the gap they close, and what they cost.

    python experiments/studies/newton.py --seeds 3

For each seed this trains a VAE and finds the instance-wise optimum on its decoder, a full Gaussian
for each test image. The decoder is then frozen, and every guide is trained on it from the encoder
of the VAE, for --guide-epochs; SA and VLAE take the encoder as it is. With --augment, half of the
images are then rotated, scaled and shifted a little: an encoder needs more images than a decoder,
and may see any that the decoder can explain. With

    gap(q) = ELBO[optimum] - ELBO[q],    share closed = 1 - gap(q) / gap(VAE's encoder)

0 is the encoder of the VAE and 1 the optimum. The unit of cost is the time to decode one latent
vector for each of 128 images, measured in turn with the guides.

--end-to-end adds guides that are trained together with a decoder from random weights, for --epochs
and for the time that newton:1 needs for --epochs. There the learning rate of σ is 1e-2, because at
5e-4 a comparison of few epochs only shows how fast σ falls.

Every result is a file in --out/NAME and is not computed again. ``NAME.json``, ``NAME.md`` and
``NAME.png``, where NAME is ``newton_DATA_pDIMENSION``, are written to --out; ``--render`` makes the
last two from the first.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from _augmentation import augmented
from _newton_page import BUDGET, REFERENCE_SAMPLES, REPEATS, caption, markdown
from _share_against_passes import share_against_passes
from _study import publish
from torch import Tensor

from guides import GaussianGuide, InstanceGuide
from pyro_gpvae import (
    ImageModel,
    fit,
    initial_sigma,
    load_data,
    log_evidence,
    make_guide,
    reference_evidence,
)
from pyro_gpvae.core._files import read_json, write_json
from pyro_gpvae.data.batch import to_batch
from pyro_gpvae.evaluation.importance import ParetoWarning
from pyro_gpvae.training import TrainingStep

#: Guides that are trained on the frozen decoder, in the order of the table.
TRAINED = ("vae", "gp", "full", "iaf:2", "me:2", "iterative:3", "newton:1", "newton:2")
#: Guides that take the encoder of the VAE without further training.
UNTRAINED = ("sa:1", "sa:2", "sa:4", "sa:8", "vlae:1", "vlae:2")
#: Guides that are trained together with a decoder; the training step of the first is the unit.
END_TO_END = ("vae", "sa:1", "newton:1", "newton:1,covariance=diagonal")
LEARNING_RATES = {"model.log_sigma": 1e-2}
BATCH = 128
_START, _OPTIMUM = "encoder of the VAE", "instance-wise optimum"


@dataclass(kw_only=True)
class Options:
    """Options of the study.

    Attributes:
        data: Name of a data set, or path of an .npz file.
        root: Folder where data sets are kept; None is that of the command.
        epochs: Passes over the training images for the VAE, and for guides trained with a decoder.
        guide_epochs: Passes for every guide on the frozen decoder; None is epochs.
        augment: Train these guides on images of which half are rotated, scaled and shifted.
        seeds: The number of seeds, from 0.
        latent_dim: Dimension p of z.
        test_images: How many test images are used.
        train_images: Use only the first so many training images; None is all.
        num_samples: Importance samples K per image.
        sigma_learning_rate: That of σ while the VAE is trained.
        guides: Only these guides on the frozen decoder; none is all.
        only_finished: Leave out guides that have no result, instead of training them.
        end_to_end: Seeds of the training from scratch, from 0.
        out: Folder of the results.
        render: Only make page and picture from the record.
    """

    data: str = "mnist5k"
    root: str | None = None
    epochs: int = 20
    guide_epochs: int | None = None
    augment: bool = False
    seeds: int = 3
    latent_dim: int = 10
    test_images: int = 200
    train_images: int | None = None
    num_samples: int = 100
    sigma_learning_rate: float = 5e-4
    guides: tuple[str, ...] = ()
    only_finished: bool = False
    end_to_end: int = 0
    out: Path = Path("runs/newton")
    render: bool = False

    @property
    def name(self) -> str:
        """The name of the record."""
        return f"newton_{Path(self.data).stem}_p{self.latent_dim}"

    @property
    def chosen(self) -> list[str]:
        """The guides on the frozen decoder, in the order of the table."""
        return [g for g in (*TRAINED, *UNTRAINED) if not self.guides or g in self.guides]


def main(options: Options) -> None:
    record = publish(options.name, options, partial(measure, options), markdown)
    frozen = [row for row in record["rows"] if row["decoder"] == "frozen"]
    figure = share_against_passes(frozen, caption(record))
    figure.savefig(options.out / f"{options.name}.png", dpi=150)


def measure(options: Options) -> dict[str, Any]:
    """Computes the cells that are missing; returns a row for each seed and guide."""
    data = load_data(options.data, options.root)
    train = data.train[: options.train_images]
    x = to_batch(data.test[: options.test_images])[0]
    rows = []
    for seed in range(max(options.seeds, options.end_to_end)):
        study = _Study(options, seed, train, x)
        if seed < options.seeds:
            rows += study.frozen_decoder()
        if seed < options.end_to_end:
            rows += study.end_to_end()
    return {"train_images": len(train), "rows": rows}


class _Study:
    """The cells of one seed; each is a JSON file, with the weights of the VAE beside them."""

    def __init__(self, options: Options, seed: int, train: Tensor, x: Tensor) -> None:
        self.options = options
        self.seed = seed
        self.train = train
        self.x = x
        self.folder = options.out / options.name / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def frozen_decoder(self) -> list[dict[str, Any]]:
        model, encoder = self.vae()
        model.requires_grad_(False)
        optimum = self.cell("optimum", partial(self.optimum, model, encoder))
        start = self.cell("start", partial(self.scores, model, encoder))
        rows = [{"guide": _START} | start]
        for name in self.options.chosen:
            if self.options.only_finished and not self.path(name).exists():
                continue
            cell = self.cell(name, partial(self.guide, name, model, encoder))
            rows.append({"guide": name} | cell)
        passes = self.cell("passes", partial(self.passes, model, encoder))
        for row in rows:
            row["share"] = 1 - (optimum["elbo"] - row["elbo"]) / (optimum["elbo"] - start["elbo"])
            row["decoder_passes"] = passes[row["guide"]]
        rows.append({"guide": _OPTIMUM, "share": 1.0} | optimum)
        return [{"decoder": "frozen", "seed": self.seed} | row for row in rows]

    def vae(self) -> tuple[ImageModel, GaussianGuide]:
        """Returns the model and guide of the VAE, trained once."""
        torch.manual_seed(self.seed)
        model, encoder = self.programs("vae")
        path = self.folder / "vae.pt"
        if not path.exists():
            rates = {"model.log_sigma": self.options.sigma_learning_rate}
            self.fit(model, encoder, self.train, learning_rates=rates)
            torch.save([model.state_dict(), encoder.state_dict()], path)
        for program, state in zip((model, encoder), torch.load(path), strict=True):
            program.load_state_dict(state)
        return model.eval(), encoder.eval()

    def guide(self, name: str, model: ImageModel, encoder: GaussianGuide) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        guide = make_guide(name, model, warm_start=encoder)
        seconds = 0.0
        if name not in UNTRAINED:
            data: Any = self.train
            if self.options.augment:
                data = augmented(to_batch(self.train)[0], BATCH)
            seconds = self.fit(model, guide, data, self.options.guide_epochs)
        return self.scores(model, guide) | {"seconds": seconds}

    def end_to_end(self) -> list[dict[str, Any]]:
        steps = self.cell("training steps", self.training_steps)
        rows = []
        for budget in ("epochs", "time"):
            for name in END_TO_END:
                epochs = self.options.epochs
                if budget == "time":
                    epochs = max(1, round(epochs * steps[BUDGET] / steps[name]))
                cell = self.cell(f"{name} {epochs} epochs", partial(self.joint, name, epochs))
                ratio = steps[name] / steps[END_TO_END[0]]
                key = {"decoder": f"equal {budget}", "seed": self.seed, "guide": name}
                rows.append(key | cell | {"epochs": epochs, "step": ratio})
        return rows

    def joint(self, name: str, epochs: int) -> dict[str, Any]:
        """Trains model and guide together."""
        torch.manual_seed(self.seed)
        model, guide = self.programs(name)
        seconds = self.fit(model, guide, self.train, epochs, learning_rates=LEARNING_RATES)
        assert model.sigma is not None
        scores = self.scores(model, guide) | {"sigma": model.sigma.item(), "seconds": seconds}
        options: Any = {"num_samples": REFERENCE_SAMPLES, "num_chains": 0, "seed": self.seed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)  # the record has the number of images
            reference = reference_evidence(model, self.x, guide, **options)
        untrusted = int((~reference.trusted).sum())
        return scores | {"reference": float(reference.log_evidence.mean()), "untrusted": untrusted}

    def training_steps(self) -> dict[str, float]:
        """Returns the shortest CPU time of a training step in seconds, by guide, in turn."""
        batch = self.train[:BATCH]
        steps = {n: TrainingStep(*self.programs(n), batch, len(self.train)) for n in END_TO_END}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(REPEATS):
            for name, step in steps.items():
                start = time.process_time()
                step(batch)
                times[name].append(time.process_time() - start)
        return {name: min(kept) for name, kept in times.items()}

    def programs(self, name: str) -> tuple[ImageModel, Any]:
        _, channels, height, width = self.train.shape
        sigma = initial_sigma(self.train)
        model = ImageModel((channels, height, width), self.options.latent_dim, sigma=sigma)
        return model, make_guide(name, model)

    def fit(
        self, model: Any, guide: Any, data: Any, epochs: int | None = None, **options: Any
    ) -> float:
        start = time.process_time()
        epochs = epochs or self.options.epochs
        fit(model, guide, data, epochs=epochs, seed=self.seed, progress=False, **options)
        return time.process_time() - start

    def scores(self, model: ImageModel, guide: Any) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ParetoWarning)  # the optimum is the reference
            evidence = log_evidence(model, guide, self.x, self.options.num_samples, seed=self.seed)
        elbo = evidence.elbo
        return {
            "elbo": float(elbo.mean()),
            "median_elbo": float(elbo.median()),
            "log_evidence": float(evidence.log_evidence.mean()),
        }

    def optimum(self, model: ImageModel, encoder: GaussianGuide) -> dict[str, float]:
        guide = InstanceGuide(model, "full", warm_start=encoder)
        return self.scores(model, guide)

    @torch.no_grad()
    def passes(self, model: ImageModel, encoder: GaussianGuide) -> dict[str, float]:
        """Returns the fastest inference for a batch in units of its fastest decoding, by guide."""
        x = self.x[:BATCH]
        z = torch.zeros(len(x), self.options.latent_dim)
        guides = {_START: encoder}
        for name in self.options.chosen:
            guides[name] = make_guide(name, model, warm_start=encoder).eval()
        times: dict[str, list[float]] = {name: [] for name in ("decoder", *guides)}
        for _ in range(REPEATS):  # in turn, so that all of them meet the same other processes
            for name, kept in times.items():
                start = time.process_time()
                if name == "decoder":
                    model.decoder(z)
                else:
                    guides[name].posterior(x).sample()
                kept.append(time.process_time() - start)
        return {name: min(times[name]) / min(times["decoder"]) for name in guides}

    def path(self, name: str) -> Path:
        """Returns the file of a cell."""
        return self.folder / f"{name.replace(':', '-').replace('=', '-')}.json"

    def cell(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what a computation returned when it was first made."""
        path = self.path(name)
        if not path.exists():
            print(f"seed {self.seed}: {name}", flush=True)
            write_json(path, compute())
        return read_json(path)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
