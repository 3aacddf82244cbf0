"""Precision: what is lowered, what is not, and that torch's flags are put back."""

import pytest
import torch
from torch import nn

from guides import GaussianGuide
from pyro_gpvae import ImageModel
from pyro_gpvae.core._precision import autocast, lowered
from pyro_gpvae.evaluation.importance import log_evidence, log_weights

BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
)


def flags():
    found = [backend.fp32_precision for backend in BACKENDS]
    for read in (
        torch.get_float32_matmul_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:  # torch's two sets of names exclude each other
            found.append("refused")
    return found


@pytest.fixture
def restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    strings = [backend.fp32_precision for backend in BACKENDS]
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    for backend, string in zip(BACKENDS, strings, strict=True):
        backend.fp32_precision = string


def nothing():
    pass


def older_names():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def newer_names():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16", None])
@pytest.mark.parametrize(
    "arrange",
    [nothing, lambda: torch.set_float32_matmul_precision("medium"), older_names, newer_names],
    ids=["default", "medium", "older names", "newer names"],
)
@pytest.mark.usefixtures("restored")
def test_flags_are_set_and_put_back(arrange, precision):
    arrange()
    before = flags()
    with autocast(precision, "cpu"):
        inside = flags()
    assert flags() == before
    if precision == "tf32":
        assert inside[:2] == ["tf32", "tf32"]
    elif precision is None:
        assert inside == before
    else:
        assert "tf32" not in inside[:2]


def test_only_bf16_changes_the_products_of_a_cpu():
    layer, x = nn.Linear(3, 4), torch.rand(2, 3)
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32)):
        with autocast(precision, "cpu"):
            assert layer(x).dtype == dtype
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with autocast("bf16", "cpu"):
        assert layer(x).dtype == torch.bfloat16
        with autocast("float32", "cpu"):
            assert layer(x).dtype == torch.float32
        with autocast(None, "cpu"):
            assert layer(x).dtype == torch.bfloat16


def test_one_module_is_lowered_and_nothing_after_it():
    inner, outer = nn.Linear(3, 3), nn.Linear(3, 4)
    seen = []
    inner.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    with lowered(inner, "bf16"):
        result = outer(inner(torch.rand(2, 3)))
    assert seen == [torch.bfloat16]
    assert result.dtype == torch.float32
    inner(torch.rand(2, 3))
    assert seen[-1] == torch.float32


def test_a_module_that_fails_leaves_its_precision():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError

    before, module = flags(), Broken()
    with pytest.raises(KeyError), lowered(module, "bf16"):
        module(torch.rand(1))
    assert not torch.is_autocast_enabled("cpu")
    assert flags() == before


def small():
    torch.manual_seed(0)
    model = ImageModel((1, 8, 8), 2, sigma=0.5)
    return model, GaussianGuide(model), torch.rand(3, 1, 8, 8)


def test_evaluation_is_exact_unless_asked_otherwise():
    model, guide, x = small()
    results = {
        precision: log_evidence(model, guide, x, 20, precision=precision, seed=0).log_evidence
        for precision in ("float32", "tf32", "bf16", None)
    }
    exact = log_evidence(model, guide, x, 20, seed=0).log_evidence
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = log_evidence(model, guide, x, 20, seed=0).log_evidence
    assert torch.equal(outside, exact)
    for precision in ("float32", "tf32", None):  # TF32 is a matter of GPUs
        assert torch.equal(results[precision], exact)
    assert not torch.equal(results["bf16"], exact)
    torch.testing.assert_close(results["bf16"], exact, rtol=0, atol=0.5)


def test_densities_and_guides_are_not_lowered():
    model, guide, x = small()
    seen = {}
    model.decoder[0].register_forward_hook(lambda m, i, output: seen.update(decoder=output.dtype))
    guide.head.register_forward_hook(lambda m, i, output: seen.update(guide=output.dtype))
    weights = log_weights(model, guide, x, 4, precision="bf16")
    assert seen == {"decoder": torch.bfloat16, "guide": torch.float32}
    assert weights.dtype == torch.float32
    assert not model.decoder._forward_pre_hooks


def test_bad_input():
    model, guide, x = small()
    message = "precision must be one of 'float32', 'tf32', 'bf16', or None, got 'half'"
    with pytest.raises(ValueError, match=message), autocast("half", "cpu"):
        pass
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, x, 2, precision="half")
    with pytest.raises(ValueError, match=r"no effect on a module in float64: convert .*\.float"):
        log_weights(model.double(), guide.double(), x, 2, precision="bf16")
    no_decoder = model.float().forward
    with pytest.raises(ValueError, match=r"lowers model\.decoder, which the model method does not"):
        log_weights(no_decoder, guide.float(), x, 2, precision="bf16")
