"""An update that is not finite is not made, and its step, images and cause are named."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from toy import uint8
from trainings import B, N, of, tensors, trained

from guides import GaussianGuide
from pyro_gpvae import Checkpoints, NonFiniteError
from pyro_gpvae.model.elbo import Block
from pyro_gpvae.training import _divergence, loop
from pyro_gpvae.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("interpreted")
GOOD = uint8(N).clamp(max=254)
with_backends = pytest.mark.parametrize("backend", ["eager", "compiled"])


class Breaking(GaussianGuide):
    """Its mean is not a number for images whose first pixel is white, or while it is told so."""

    def __init__(self, model, encoder):
        super().__init__(model, encoder)
        self.register_buffer("broken", torch.zeros(()), persistent=False)

    def bad(self, x):
        return (x.flatten(1)[:, :1] == 1) | (self.broken > 0)

    def posterior(self, x):
        q = super().posterior(x)
        mean = torch.where(self.bad(x), torch.nan, q.mean)
        return dist.Normal(mean, q.stddev, validate_args=False).to_event(1)


class SlopeBreaks(Breaking):
    """Its loss is finite, its gradient is not."""

    def posterior(self, x):
        q = GaussianGuide.posterior(self, x)
        bad = self.bad(x).to(x)
        root = (q.mean * (1 - bad)).square().sqrt()  # 0 · ∞ in the backward pass
        return dist.Normal(q.mean + bad * root, q.stddev).to_event(1)


class Normalised(Breaking):
    """Its running statistics would take up what is not a number."""

    def __init__(self, model, encoder):
        super().__init__(model, nn.Sequential(encoder, nn.BatchNorm1d(3)))

    def posterior(self, x):
        return super().posterior(torch.where(self.broken > 0, x * torch.nan, x))


class Second(Breaking):
    """Three blocks; only the second breaks."""

    def second(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", GaussianGuide.posterior(self, x))

    def blocks(self, model):
        head, encoder = list(self.head.parameters()), list(self.encoder.parameters())
        return [
            Block(TraceMeanField_ELBO(), encoder),
            Block(TraceMeanField_ELBO(), head, guide=self.second),
            Block(TraceMeanField_ELBO(), list(model.parameters())),
        ]


class WithRoot(TraceMeanField_ELBO):
    """Adds 0, whose derivative in a parameter is not a number."""

    def __init__(self, parameter):
        super().__init__()
        self.parameter = parameter

    def differentiable_loss(self, *args):
        root = (0 * self.parameter).sum().sqrt()
        return super().differentiable_loss(*args) + root


class Unused(GaussianGuide):
    """The first block's loss has no finite gradient, but only in what the second one trains."""

    def blocks(self, model):
        theirs = list(model.parameters())
        return [
            Block(WithRoot(theirs[0]), list(self.parameters())),
            Block(WithRoot(theirs[-1]), theirs),
        ]


def with_white(*numbers):
    """Images of which some break the guide."""
    data = GOOD.clone()
    data[list(numbers), 0, 0, 0] = 255
    return data


def place_of(number, seed=3, batch_size=B):
    """The step of the first epoch in which an image is seen."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    return int((order == number).nonzero()) // batch_size + 1


@with_backends
@pytest.mark.parametrize("kind", [Breaking, SlopeBreaks, Normalised])
@pytest.mark.parametrize("good", [0, 2])
def test_an_update_that_is_not_finite_is_not_made(kind, backend, good):
    results = []
    for bad in (True, False):
        model, guide = of(kind)
        step = TrainingStep(model, guide, GOOD[:B], N, backend=backend, on_nonfinite="skip")
        for seed in range(good):
            torch.manual_seed(seed)
            step(GOOD[seed : seed + B])
        if bad:
            before = tensors(model, guide), copy.deepcopy(step.optimizers[0].state_dict())
            loss, seen = float(step.counters.loss), float(step.counters.seen)
            guide.broken.fill_(1.0)
            step(GOOD[:B])
            guide.broken.fill_(0.0)
            after = tensors(model, guide), step.optimizers[0].state_dict()
            assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
            for number, moments in after[1]["state"].items():
                for name, moment in moments.items():
                    old = before[1]["state"].get(number, {}).get(name, torch.zeros_like(moment))
                    assert torch.equal(moment, old), name
            assert int(step.counters.skipped) == 1
            assert (float(step.counters.loss), float(step.counters.seen)) == (loss, seen)
        torch.manual_seed(9)
        step(GOOD[:B])
        assert int(step.counters.refused) == 0
        results.append(tensors(model, guide))
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


@with_backends
def test_halt_makes_no_update_after_the_first_that_is_refused(backend):
    model, guide = of(Breaking)
    step = TrainingStep(model, guide, GOOD[:B], N, backend=backend, on_nonfinite="stop")
    step(GOOD[:B])
    before = tensors(model, guide)
    guide.broken.fill_(1.0)
    step(GOOD[:B])
    guide.broken.fill_(0.0)
    for _ in range(3):
        step(GOOD[:B])
    assert all(torch.equal(tensors(model, guide)[name], v) for name, v in before.items())
    assert int(step.counters.skipped) == 4
    assert int(step.counters.seen) == B


@with_backends
@pytest.mark.parametrize("kind", [Breaking, SlopeBreaks, Second])
@pytest.mark.parametrize("interval", [1, 100], ids=["every step", "late"])
def test_stop_names_the_step_the_image_and_the_term(kind, backend, interval, monkeypatch):
    # a GPU is read every 100 steps, and at the end of an epoch
    monkeypatch.setattr(loop, "_read_interval", lambda device: interval)
    where = "gradient of guide" if kind is SlopeBreaks else "site 'z'"
    for number in (0, 4, 17):
        with pytest.raises(NonFiniteError) as caught:
            trained(lambda: of(kind), with_white(number), backend=backend)
        assert caught.value.step == place_of(number)
        assert caught.value.images == (number,)
        message = str(caught.value)
        assert f"at step {place_of(number)}:" in message
        assert f"in image {number} (1 of the" in message
        assert where in message


@pytest.mark.parametrize("kind", [Breaking, SlopeBreaks, Normalised])
def test_the_images_are_told_apart_in_a_batch(kind):
    with pytest.raises(NonFiniteError) as caught, pyro.validation_enabled(False):
        trained(lambda: of(kind), with_white(3, 17), batch_size=N)
    assert set(caught.value.images) == {3, 17}
    assert f"(2 of the {N} of the minibatch)" in str(caught.value)


def test_the_error_names_the_last_good_checkpoint(tmp_path):
    step, checkpoints = place_of(4, batch_size=3), Checkpoints(tmp_path, every=1)
    with pytest.raises(NonFiniteError) as caught:
        trained(lambda: of(Breaking), with_white(4), batch_size=3, checkpoints=checkpoints)
    assert f"The last good checkpoint is of step {step - 1}, in {tmp_path}" in str(caught.value)
    assert Checkpoints(tmp_path).latest().step == step - 1


@with_backends
def test_skipped_updates_are_counted_up_to_a_limit(backend, monkeypatch):
    options = {"data": with_white(4), "backend": backend, "on_nonfinite": "skip"}
    with pytest.warns(UserWarning, match=f"not finite at step {place_of(4)}: this update is"):
        _, frame = trained(lambda: of(Breaking), epochs=4, **options)
    assert list(frame["skipped"]) == [1, 2, 3, 4]
    assert bool(frame["loss"].notna().all())  # of the other minibatches
    monkeypatch.setattr(_divergence, "MAX_SKIPPED", 2)
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(NonFiniteError) as caught:
        trained(lambda: of(Breaking), epochs=9, **options)
    assert caught.value.images == (4,)
    assert "after 2 skipped updates" in str(caught.value)


def test_broken_parameters_are_named_as_such():
    model, guide = of(GaussianGuide)
    with torch.no_grad():
        guide.head.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"step 1: before it, guide.head.weight is not finite"):
        trained(lambda: (model, guide), epochs=1)


def test_a_block_is_blamed_only_for_what_it_trains():
    model, guide = of(Unused)
    *_, (last, _) = model.named_parameters()
    with pytest.raises(NonFiniteError, match=f"step 1: gradient of model.{last}, in"):
        trained(lambda: (model, guide), epochs=1)
