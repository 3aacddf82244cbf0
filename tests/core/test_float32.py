"""Evaluation is exact, whatever the process allows, and torch's flags are restored."""

import pytest
import torch
from toy import images, linear_encoder, linear_model

from guides import GaussianGuide
from pyro_gpvae import log_weights
from pyro_gpvae.core._float32 import exact_float32

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


def older_names():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def newer_names():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.mark.parametrize(
    "arrange",
    [lambda: None, lambda: torch.set_float32_matmul_precision("medium"), older_names, newer_names],
    ids=["default", "medium", "older names", "newer names"],
)
@pytest.mark.usefixtures("restored")
def test_tf32_is_off_inside_and_the_flags_are_restored(arrange):
    arrange()
    before = flags()
    with exact_float32():
        assert "tf32" not in flags()[:2]
    assert flags() == before


def test_an_autocast_around_an_evaluator_changes_nothing():
    model, x = linear_model().float(), images(3).float()
    guide = GaussianGuide(model, linear_encoder())
    torch.manual_seed(0)
    expected = log_weights(model, guide, x, 5)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_weights(model, guide, x, 5), expected)
        assert torch.is_autocast_enabled("cpu")
