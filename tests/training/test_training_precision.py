"""fit(..., precision=): bf16 trains, and nothing changes unless asked for."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide, GPGuide
from pyro_gpvae import fit
from pyro_gpvae.training.step import TrainingStep


def uint8(count):
    return (images(count) * 255).to(torch.uint8)


def pair(kind=GPGuide, seed=0):
    torch.manual_seed(seed)
    model = linear_model(seed=seed).float()
    return model, kind(model, linear_encoder())


def parameters(programs):
    return [p.detach().clone() for program in programs for p in program.parameters()]


def trained(precision, **options):
    programs = pair()
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    history = fit(
        *programs, uint8(40), epochs=20, batch_size=10, learning_rate=1e-2, progress=False,
        precision=precision, **options,
    )  # fmt: skip
    after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert after == before
    assert not torch.is_autocast_enabled("cpu")
    return history.frame()["loss"], parameters(programs)


def test_float32_and_tf32_are_the_default_on_a_cpu_and_bf16_is_close():
    loss, weights = trained(None)
    for precision in ("float32", "tf32"):
        same_loss, same = trained(precision)
        assert same_loss.equals(loss)
        assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    low, other = trained("bf16")
    assert not all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
    assert all(p.dtype == torch.float32 for p in other)
    assert low.iloc[-1] == pytest.approx(loss.iloc[-1], abs=0.1)
    assert loss.iloc[-1] < loss.iloc[0] - 1


def test_the_casts_are_in_the_graph_and_noise_and_loss_are_not_lowered():
    step = TrainingStep(*pair(), uint8(20), batch_size=10, precision="bf16")
    pure = step.pure(0, step.prepare(uint8(10)))
    dtypes = [node.meta["val"].dtype for node in pure.graph.graph.nodes if "mm" in node.name]
    assert torch.bfloat16 in dtypes
    assert {draw.dtype for draw in pure.draws} == {torch.float32}
    noise = pure.noise(torch.Generator().manual_seed(0))
    loss, gradients = pure(step.prepare(uint8(10)), noise)
    assert loss.dtype == torch.float32
    assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize("kind", [GaussianGuide, GPGuide])
def test_eager_and_traced_agree_in_bf16(kind):
    results = []
    for traced in (False, True):
        torch.manual_seed(1)
        step = TrainingStep(*pair(kind), uint8(20), batch_size=10, precision="bf16")
        torch.manual_seed(2)
        x = step.prepare(uint8(10))
        if traced:
            pure = step.pure(0, x)
            results.append(pure(x, pure.noise()))
        else:
            results.append(step.eager(0)(x))
    (loss, gradients), (same, others) = results
    assert torch.allclose(loss, same, rtol=1e-6)
    for a, b in zip(gradients, others, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_stacked_runs_in_bf16_are_those_of_single_ones():
    alone, together = [], [pair(seed=seed) for seed in range(2)]
    for seed in range(2):
        programs = pair(seed=seed)
        fit(*programs, uint8(20), epochs=2, batch_size=10, seed=seed, precision="bf16",
            progress=False)  # fmt: skip
        alone.append(parameters(programs))
    models, guides = zip(*together, strict=True)
    fit(models, guides, uint8(20), epochs=2, batch_size=10, seeds=range(2), precision="bf16",
        progress=False)  # fmt: skip
    for programs, expected in zip(together, alone, strict=True):
        for a, b in zip(parameters(programs), expected, strict=True):
            assert torch.allclose(a, b, atol=2e-3)


def test_unknown_names_and_float64_are_refused():
    with pytest.raises(ValueError, match="precision must be one of 'float32', 'tf32', 'bf16'"):
        fit(*pair(), uint8(10), epochs=1, precision="fp16", progress=False)
    model = linear_model()
    guide = GaussianGuide(model, linear_encoder()).double()
    with pytest.raises(ValueError, match="no effect on a module in float64"):
        fit(model, guide, uint8(10), epochs=1, precision="bf16", progress=False)


def test_a_checkpoint_of_another_precision_is_refused(tmp_path):
    options = {"epochs": 1, "checkpoints": tmp_path, "progress": False}
    fit(*pair(), uint8(10), **options)
    with pytest.raises(ValueError, match="its precision is None, not bf16"):
        fit(*pair(), uint8(10), resume=True, precision="bf16", **options)


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = torch.nn.Linear(6, 2), torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.loc(x), self.log_scale(x)


@pytest.mark.parametrize("how", ["tuple", "list"])
def test_networks_that_return_tuples_and_networks_in_lists(how):
    seen, inside = set(), set()

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.ModuleList([Two()]) if how == "list" else Two()

        def forward(self, x):
            network = self.network[0] if how == "list" else self.network
            handle = network.loc.register_forward_hook(lambda m, i, out: inside.add(out.dtype))
            loc, log_scale = network(x.flatten(1))
            handle.remove()
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            seen.add(z.dtype)

    model = linear_model().float()
    step = TrainingStep(model, Guide(), uint8(20), batch_size=10, precision="bf16")
    inside.clear()
    step(torch.arange(10))
    assert seen == {torch.float32}
    assert inside == {torch.bfloat16}
